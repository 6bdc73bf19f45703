"""Read one mask file, PNG or DICOM SEG, as a boolean mask at the size of its film. Messages quote no header text."""

from __future__ import annotations

import io
import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pneumo_dist.data.films import codecs
from pneumo_dist.data.films.codecs import FilmError
from pneumo_dist.data.films.dicom import inflated, load
from pneumo_dist.data.films.header import TRANSFER_SYNTAX, text
from pneumo_dist.data.films.listing import HEAD_BYTES, dicom_head

SEG_CLASSES = ("1.2.840.10008.5.1.4.1.1.66.4", "1.2.840.10008.5.1.4.1.1.66.7")  # Segmentation, Label Map Segmentation
HEADER_PIXELS = 64_000_000  # as max_pixels, for the headers of deflated files
SEG_FILMS = 8  # as many films of max_pixels as a segmentation may cover
FINDING = re.compile(r"(?<!no )(?<!without )pneumothora", re.IGNORECASE)


@dataclass(frozen=True)
class MaskFile:
    """One mask file of a film."""

    name: str  # relative to the folder of the masks
    path: str
    sha256: str
    uid: str = ""  # of a DICOM SEG: the SOP Instance UID of the film


def sop_uid(path: Path) -> str:
    """Return the SOP Instance UID in a film's header, "" if there is none."""
    return str(dicom_header(path, "SOPInstanceUID").get("SOPInstanceUID", ""))


def seg_references(path: Path) -> list[str] | None:
    """Return the SOP Instance UIDs of the images that a DICOM SEG refers to, None for any other file."""
    header = dicom_header(path, "SOPClassUID", "ReferencedSeriesSequence")
    if header.get("SOPClassUID") not in SEG_CLASSES:
        return None
    series = header.get("ReferencedSeriesSequence") or []
    images = [image for item in series for image in item.get("ReferencedInstanceSequence") or []]
    return [str(image.get("ReferencedSOPInstanceUID", "")) for image in images]


def dicom_header(path: Path, *names: str) -> Any:
    """Return these elements of a DICOM file, those that it has; none of another file."""
    import pydicom

    pydicom.config.settings.reading_validation_mode = pydicom.config.IGNORE
    try:
        with path.open("rb") as handle:
            head = dicom_head(handle.read(HEAD_BYTES)) or {}
        source: Any = path
        if text(head, TRANSFER_SYNTAX) == pydicom.uid.DeflatedExplicitVRLittleEndian:  # pydicom inflates any size
            source = io.BytesIO(inflated(load(path, HEADER_PIXELS), HEADER_PIXELS))
        header = pydicom.dcmread(source, stop_before_pixels=True, specific_tags=list(names), force=True)
        for name in names:  # values are decoded when they are read
            header.get(name)
    except Exception:  # the parser raises various errors on damaged and on other files
        return {}
    return header


def read_mask(
    file: MaskFile, film_uid: str, size: tuple[int, int], max_pixels: int
) -> tuple[np.ndarray, tuple[str, ...]]:
    """Return (boolean mask, warnings) of one file: pixels above 0 of a PNG file, the pneumothorax of a DICOM SEG.

    Args:
        film_uid: SOP Instance UID in the film's header, "" where it has none.
        size: (rows, columns) of the film.
    Raises:
        FilmError: the file is unreadable or ambiguous, or is not the mask of a film of this size.
    """
    try:
        data = load(file.path, max_pixels)
        if file.uid:
            mask, warned = _seg(inflated(data, max_pixels), file.uid, film_uid, size, SEG_FILMS * max_pixels)
        else:
            mask, warned = _png(data, max_pixels), ()
        _check_size(mask.shape, size)
    except FilmError as error:
        raise FilmError(f"mask {file.name}: {error}") from None
    return mask, warned


def _check_size(shape: tuple[int, ...], size: tuple[int, int]) -> None:
    if shape != size:
        raise FilmError(
            f"{shape[0]} x {shape[1]} pixels, but its film has {size[0]} x {size[1]}: export it at the film's size"
        )


def _png(data: bytes, max_pixels: int) -> np.ndarray:
    from PIL import Image

    if not data.startswith(b"\x89PNG\r\n\x1a\n"):
        raise FilmError("not a PNG file")
    pixels, _ = codecs.decode_picture(data, max_pixels)
    with Image.open(io.BytesIO(data)) as image:
        if image.has_transparency_data and np.asarray(image.convert("RGBA"))[..., 3].min() < 255:
            raise FilmError("it has transparent pixels: save it in grey without transparency")
        # A low label must not get lost: among nearly equal channels, in a palette, or in Pillow's 8 of 16 bits.
        depth, kind = data[24:26]
        lost = depth == 16 and kind != 0
        if image.mode in ("P", "RGB", "RGBA"):
            colours = image.convert("RGB")
            lost |= bool((np.asarray(colours) != pixels[..., None]).any())
            lost |= image.mode == "P" and len(np.unique(np.asarray(image))) > len(colours.getcolors() or ())
        if lost:
            raise FilmError("colour picture, or a palette with one colour for several labels: save it in 8 bit grey")
    return pixels > 0


def _seg(data: bytes, uid: str, film_uid: str, size: tuple[int, int], most: int) -> tuple[np.ndarray, tuple[str, ...]]:
    """Return the union of the frames of a film and of the segments to take, and what to say about the choice.

    Args:
        data: not deflated.
        most: pixels of all frames together.
    """
    import pydicom

    if film_uid not in ("", uid):
        raise FilmError("it refers to another SOP Instance UID than the one in the film's header")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # they quote header values
            seg = pydicom.dcmread(io.BytesIO(data), force=True)
            seg.file_meta.setdefault("TransferSyntaxUID", pydicom.uid.ExplicitVRLittleEndian)  # of inflated data
            _check_size((seg.Rows, seg.Columns), size)
            if (frames := int(seg.NumberOfFrames)) * seg.Rows * seg.Columns > most:
                raise FilmError(f"{frames} frames, more than {SEG_FILMS} films of data.max_pixels: write one per film")
            if seg.SegmentationType == "FRACTIONAL":
                raise FilmError("a fractional segmentation: convert it to a binary one")
            taken, others, warned = _segments(seg)
            return _frames(seg, uid, taken, others), warned
    except FilmError:
        raise
    except Exception as error:  # pydicom raises various errors, with header values in their texts
        raise FilmError(f"damaged DICOM SEG ({type(error).__name__})") from None


def _segments(seg: Any) -> tuple[set[int], set[int], tuple[str, ...]]:
    """Return the numbers of the segments to take and of the others, and what to say about the choice."""
    called = {
        int(item.SegmentNumber): bool(FINDING.search(f"{item.SegmentLabel}\n{_meaning(item)}"))
        for item in seg.SegmentSequence
    }
    if len(called) == 1:
        said = () if all(called.values()) else ("DICOM SEG whose only segment is not called pneumothorax: taken",)
        return set(called), set(), said
    taken = {number for number, is_finding in called.items() if is_finding}
    if not taken:
        raise FilmError(f"none of its {len(called)} segments is called pneumothorax: name it so, or keep one segment")
    others = called.keys() - taken
    return taken, others, ("DICOM SEG: segments called pneumothorax taken, others not",) if others else ()


def _meaning(segment: Any) -> str:
    codes = segment.get("SegmentedPropertyTypeCodeSequence") or [{}]
    return str(codes[0].get("CodeMeaning", ""))


def _frames(seg: Any, uid: str, taken: set[int], others: set[int]) -> np.ndarray:
    """Return the union of the frames that refer to this image and belong to these segments."""
    shared, groups = seg.get("SharedFunctionalGroupsSequence") or [{}], seg.PerFrameFunctionalGroupsSequence
    frames = seg.pixel_array.reshape(len(groups), seg.Rows, seg.Columns)
    mask, found = np.zeros(frames.shape[1:], bool), False
    for frame, group in zip(frames, groups, strict=True):
        derivations = group.get("DerivationImageSequence") or shared[0].get("DerivationImageSequence") or []
        sources = [image for item in derivations for image in item.SourceImageSequence]
        sources = [image for image in sources if image.ReferencedSOPInstanceUID == uid]
        if any(image.get("SpatialLocationsPreserved", "YES") != "YES" for image in sources):
            raise FilmError("its pixels are not those of the film (spatial locations not preserved)")
        if not sources:
            continue
        found = True
        if seg.SegmentationType == "LABELMAP":
            mask |= np.isin(frame, list(taken))
            continue
        name = "SegmentIdentificationSequence"
        number = int((group.get(name) or shared[0][name].value)[0].ReferencedSegmentNumber)
        if number not in taken | others:
            raise FilmError("a frame of an unknown segment")
        if number in taken:
            mask |= frame != 0
    if not found:
        raise FilmError("none of its frames refers to the film")
    return mask

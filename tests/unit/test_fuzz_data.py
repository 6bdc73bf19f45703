"""Thousands of damaged films and lists with a fixed seed: each is refused with a reason or read correctly.

The films go through the real preprocessing, so that a crash, a hang or a wrong shard would show.
"""

from __future__ import annotations

import csv
import io
import json
import resource
from pathlib import Path

import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom.pixels import get_encoder
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEGBaseline8Bit,
    JPEGExtended12Bit,
    JPEGLossless,
    JPEGLosslessSV1,
)

from pneumo_dist import config as configuration
from pneumo_dist.config import ConfigError
from pneumo_dist.data.cases import read_cases
from pneumo_dist.data.films.dicom import FilmError, read_film
from pneumo_dist.data.films.masks import MaskFile, read_mask
from pneumo_dist.data.films.rle import RleError, decode_union
from pneumo_dist.data.lists import read_annotations
from pneumo_dist.data.preprocess import decoding, preprocess
from pneumo_dist.data.preprocess.finalize import finalize
from pneumo_dist.data.preprocess.manifest import verify
from pneumo_dist.data.shards import ShardReader, to_size
from pneumo_dist.inference.dicomseg import SegJob, seg_bytes
from pneumo_dist.run import Run
from pneumo_dist.runtime import processes
from pneumo_dist.runtime.task import Task
from tests.film_files import COMPRESSED, film_bytes, grey, jpeg, lut, streamed_bytes, write_png
from tests.streams import extended_jpeg, lossless_jpeg

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # the other reader warns where it accepts damage

FILMS, HOSTILE, LISTS, MASKS = 1900, 300, 700, 450
MAX_PIXELS = 100_000
MEMORY_BYTES = 1 << 30  # on top of what a worker has at its start: no header may make it want more


def whole_films() -> list[bytes]:
    """Undamaged files of every kind."""
    eight, twelve, signed = grey(40, 48), grey(40, 48, 12), grey(40, 48, 16, signed=True)
    png = io.BytesIO()
    Image.fromarray(eight).save(png, "PNG")
    films = [
        film_bytes(eight, syntax=JPEGBaseline8Bit),
        film_bytes(grey(64, 64), syntax=JPEGBaseline8Bit, PhotometricInterpretation="MONOCHROME1"),
        film_bytes(eight, syntax=ImplicitVRLittleEndian),
        film_bytes(twelve, 12, WindowCenter=2000, WindowWidth=3000),
        film_bytes(signed, RescaleSlope=2, RescaleIntercept=-5),
        png.getvalue(),
        jpeg(eight),
    ]
    colour = {"SamplesPerPixel": 3, "PlanarConfiguration": 0, "PhotometricInterpretation": "RGB"}
    films += [
        streamed_bytes(eight, lossless_jpeg(eight, 8), JPEGLosslessSV1),
        streamed_bytes(twelve, lossless_jpeg(twelve, 12), JPEGLosslessSV1, 12, WindowCenter=2000, WindowWidth=3000),
        streamed_bytes(twelve, lossless_jpeg(twelve, 12, 6), JPEGLossless, 12, PhotometricInterpretation="MONOCHROME1"),
        streamed_bytes(twelve, extended_jpeg(twelve), JPEGExtended12Bit, 12),
        film_bytes(np.dstack([eight] * 3), **colour),
        film_bytes(twelve, 12, DeflatedExplicitVRLittleEndian, WindowCenter=2000, WindowWidth=3000),
        film_bytes(twelve, 12, VOILUTSequence=lut([3 * i for i in range(4096)], 0, 16)),
        film_bytes(eight, ModalityLUTSequence=lut([4095 - 16 * i for i in range(256)], 0, 12)),
    ]
    for syntax in COMPRESSED.values():
        if get_encoder(syntax).is_available:
            films += [film_bytes(eight, syntax=syntax), film_bytes(twelve, 12, syntax=syntax)]
    return films


def damaged(random: np.random.Generator, data: bytes) -> bytes:
    """Cut, flip, overwrite, insert, repeat or remove."""
    changed = bytearray(data)
    # Half of the damage goes to the first 1,500 bytes, where the headers are.
    end = len(changed) if random.random() < 0.5 else min(len(changed), 1500)
    at, length = int(random.integers(0, end)), int(random.integers(1, 64))
    kind = random.integers(0, 7)
    if kind == 0:
        del changed[at:]
    elif kind == 1:
        for place in random.integers(0, end, random.integers(1, 12)):
            changed[place] ^= 1 << int(random.integers(0, 8))
    elif kind == 2:
        changed[at : at + length] = bytes([random.choice([0, 255])]) * len(changed[at : at + length])
    elif kind == 3:
        changed[at : at + length] = random.bytes(length)
    elif kind == 4:
        changed[at:at] = random.bytes(length)
    elif kind == 5:
        del changed[at : at + length]
    else:
        changed[at:at] = changed[at : at + length] * int(random.integers(1, 20))
    return bytes(changed)


def hostile(random: np.random.Generator) -> bytes:
    """A well-formed file whose header claims something extreme."""
    numbers = [0, 1, 2, 7, 39, 41, 255, 256, 32767, 32768, 65535]
    tags: dict[str, object] = {}
    names = ("Rows", "Columns", "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation", "SamplesPerPixel")
    for name in random.choice(names, random.integers(0, 4), replace=False):
        tags[str(name)] = int(random.choice(numbers))
    for name, values in (
        ("NumberOfFrames", [0, 1, 2, 2**31 - 1, -5]),
        ("RescaleSlope", ["0", "-1", "1e300", "-1e-300"]),
        ("RescaleIntercept", ["0", "1e308", "-32768"]),
        ("WindowCenter", ["0", "1e30", "-5"]),
        ("WindowWidth", ["0", "1", "-3", "1e-5", "1e300"]),
        ("VOILUTFunction", ["SIGMOID", "LINEAR_EXACT", "NONSENSE"]),
        ("PhotometricInterpretation", ["RGB", "MONOCHROME1", "PALETTE COLOR", "X" * 16]),
    ):
        if random.random() < 0.25:
            tags[name] = values[random.integers(0, len(values))]
    syntaxes = [ExplicitVRLittleEndian, ImplicitVRLittleEndian, JPEGBaseline8Bit]
    syntaxes += [syntax for syntax in COMPRESSED.values() if get_encoder(syntax).is_available]
    syntax = syntaxes[random.integers(0, len(syntaxes))]
    deep = bool(random.random() < 0.4) and syntax != JPEGBaseline8Bit
    return film_bytes(grey(40, 48, 12 if deep else 8), 12 if deep else None, syntax, **tags)


def reference(data: bytes) -> tuple[np.ndarray, bool, bool]:
    """Another reader's stored values, whether the film is inverted, and whether it is to be taken as it is."""
    if data[128:132] != b"DICM" and data.startswith((b"\x89PNG", b"\xff\xd8")):
        return np.asarray(Image.open(io.BytesIO(data)).convert("RGBA"))[..., 0], False, True
    film = pydicom.dcmread(io.BytesIO(data), force=True)
    if film.file_meta.get("TransferSyntaxUID") == JPEGBaseline8Bit:
        film.pixel_array_options(decoding_plugin="pillow")  # gdcm shows damage otherwise than libjpeg-turbo
    if film.SamplesPerPixel != 1:
        return film.pixel_array[..., 0], False, True
    if film.get("HighBit", film.BitsStored - 1) != film.BitsStored - 1:
        raise NotImplementedError("pydicom does not shift pixels down to bit 0, as older films need it")
    if "VOILUTSequence" in film or "ModalityLUTSequence" in film:
        raise NotImplementedError("a damaged table may have any order")
    tags = ("RescaleSlope", "RescaleIntercept", "WindowCenter", "WindowWidth", "VOILUTSequence", "ModalityLUTSequence")
    plain = film.BitsStored == 8 and not film.PixelRepresentation and not any(tag in film for tag in tags)
    return film.pixel_array, film.PhotometricInterpretation == "MONOCHROME1", plain


def monotone(values: np.ndarray, shown: np.ndarray) -> bool:
    """Whether equal values are shown alike, and brighter ones never darker (or, inverted, never brighter)."""
    order = np.argsort(values.ravel(), kind="stable")
    steps, greys = np.diff(values.ravel()[order].astype(np.int64)), np.diff(shown.ravel()[order].astype(int))
    return bool((greys[steps == 0] == 0).all() and ((greys >= 0).all() or (greys <= 0).all()))


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz")
    random = np.random.default_rng(20190910)
    whole = whole_films()
    (folder / "films").mkdir()
    for i in range(FILMS + HOSTILE):
        data = damaged(random, whole[i % len(whole)]) if i < FILMS else hostile(random)
        (folder / "films" / f"{i:05d}.dcm").write_bytes(data)
    for i, data in enumerate(whole):
        (folder / "films" / f"whole{i:02d}.dcm").write_bytes(data)
    (folder / "list.csv").write_text("ImageId,EncodedPixels\nwhole00,5 3\n")
    words = [f"data.dicom_dir={folder / 'films'}", f"data.rle_csv={folder / 'list.csv'}", "data.unannotated=negative"]
    words += ["data.shards=8", "data.workers=2", "data.max_bad=1", f"data.max_pixels={MAX_PIXELS}"]
    words += ["stage1.size=32", "stage2.size=64"]
    task = Task(run=Run(folder, configuration.load(None, words)), stage="preprocess")
    prepare = decoding._prepare

    def confined() -> None:
        prepare()
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY_BYTES, used + MEMORY_BYTES))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decoding, "_prepare", confined)
        patch.setattr(processes, "TIMEOUT_S", 60.0)
        preprocess.write_shards(task)
        finalize(task)
    audit = json.loads((folder / "shards" / "audit.json").read_text())
    return folder, audit, len(whole)


def test_every_film_is_refused_with_a_reason_or_is_in_the_shards(fuzzed):
    folder, audit, whole = fuzzed
    reasons = {Path(film["path"]).stem: film["reason"] for film in (*audit["unreadable"], *audit["ignored"])}
    cases = read_cases(folder / "shards")
    assert len(cases) + len(reasons) == FILMS + HOSTILE + whole >= 2200
    assert all(f"whole{i:02d}" in {case.id for case in cases} for i in range(whole))
    for name, reason in reasons.items():
        assert 5 < len(reason) < 200 and "\n" not in reason and "SECRET" not in reason, (name, reason)
        for fault in ("crashed", "not decoded within", "not enough memory", "unexpected", "0x"):
            assert fault not in reason, (name, reason)
    # Both happen, or the damage was no test.
    assert len(cases) > 200 and len(reasons) > 800


def test_what_was_read_is_what_the_file_says(fuzzed):
    folder, _, _ = fuzzed
    compared = 0
    for case in read_cases(folder / "shards"):
        path = folder / "films" / f"{case.id}.dcm"
        film = read_film(path, MAX_PIXELS)
        pixels = film.pixels
        assert pixels.shape == (case.rows, case.columns) and pixels.dtype == np.uint8
        if any("the header says" in warning for warning in film.warnings):
            continue  # the other reader believes the header
        assert pixels.size <= MAX_PIXELS
        try:
            values, inverted, plain = reference(path.read_bytes())
        except Exception:  # the other reader is stricter about something
            continue
        compared += 1
        if plain:
            assert np.array_equal(pixels, 255 - values if inverted else values), case.id
        else:
            assert monotone(values, pixels), case.id
    assert compared > 200


def test_shards_hold_what_was_read(fuzzed):
    folder, _, _ = fuzzed
    assert not verify(folder / "shards")
    readers = {size: ShardReader(folder / "shards", size) for size in (32, 64)}
    for case in read_cases(folder / "shards"):
        pixels = read_film(folder / "films" / f"{case.id}.dcm", MAX_PIXELS).pixels
        for size, reader in readers.items():
            assert np.array_equal(reader.image(case.shard, case.row), to_size(pixels, size))


def plain_loop(texts: list[str], rows: int, columns: int, first: int | None = None) -> np.ndarray:
    """Offsets count from the end of the run before; with `first`, they are positions that count from it."""
    flat = np.zeros(rows * columns, bool)
    for text in texts:
        at, tokens = 0, [int(token) for token in text.split()]
        for offset, length in zip(tokens[::2], tokens[1::2], strict=False):
            start = at + offset if first is None else offset - first
            flat[start : start + length] = True
            at += offset + length
    return flat.reshape(columns, rows).T


# Encoding and separator, convention of the offsets, number of the first pixel, and an undamaged list.
FORMS = [
    ("utf-8", ",", None, None, "ImageId, EncodedPixels\na, -1\nb, 30 10 2 3\nb, 7 2\nc,13 1 4 1 5 9\n"),
    ("utf-8-sig", ",", "siim", None, 'ImageId,EncodedPixels\r\n"a","-1"\r\n"b"," 1 1022"\r\nc, 1000 24\r\n'),
    ("utf-16", "\t", None, None, "ImageId\tEncodedPixels\na\t-1\nb\t30 10 2 3\nb\t7 2\nc\t13 1 4 1 5 9\n"),
    ("utf-8", ";", "absolute", 1, "ImageId;EncodedPixels\na;-1\nb;1 10 20 3\nb;7 2\nc.dcm;3 1 4 1 5 9 1020 5\n"),
    (
        "utf-8",
        ",",
        "absolute0",
        0,
        "Usage,EncodedPixels,ImageId\nx,-1,a\nx,0 10 20 3,b\ny,7 2,d/b.png\nz,30 1 40 1,c\n",
    ),
]


def test_every_list_is_refused_with_a_line_or_read_as_it_stands(tmp_path):
    random = np.random.default_rng(1904)
    path = tmp_path / "list.csv"
    refused, read = 0, [0] * len(FORMS)
    for i in range(LISTS):
        encoding, separator, rle, first, text = FORMS[i % len(FORMS)]
        data = damaged(random, text.encode(encoding))
        path.write_bytes(data)
        try:
            annotations = read_annotations(path, rle)
        except ConfigError as error:
            assert "list.csv" in str(error) and "\n" not in str(error)
            refused += 1
            continue
        for problem in annotations.problems:
            assert problem.startswith("list.csv:") and problem.split(":")[1].isdigit()
        table = csv.reader(io.StringIO(data.decode(encoding), newline=""), delimiter=separator)
        column = [name.strip().lower() for name in next(table)].index("encodedpixels")
        cells = {f"list.csv:{table.line_num}": row[column].strip() for row in table if len(row) > column}
        for name in annotations.rows:
            if name in annotations.broken:  # its film is quarantined
                continue
            try:
                mask = decode_union(annotations.texts(name), 32, 32)
            except RleError:
                continue
            texts = [text for where in annotations.where(name) if (text := cells[where]) != "-1"]
            assert np.array_equal(mask, plain_loop(texts, 32, 32, first))
            read[i % len(FORMS)] += 1
    assert refused > 50 and min(read) > 60


def test_every_mask_file_is_refused_with_a_reason_or_read_as_it_stands(tmp_path):
    random = np.random.default_rng(2020)
    mask = grey(40, 48) > 130
    film = tmp_path / "film.dcm"
    film.write_bytes(film_bytes(grey(40, 48), StudyInstanceUID="1.2", SeriesInstanceUID="1.3"))
    segmentation = seg_bytes(film, mask, SegJob("film", "", "", 40, 48, b"", "label", "answer", ("ab" * 32,), 0))
    picture = write_png(tmp_path / "mask.png", mask).read_bytes()
    refused, read = 0, [0, 0]
    for i in range(MASKS):
        seg = i % 3 == 0
        data = damaged(random, segmentation if seg else picture)
        path = tmp_path / "damaged"
        path.write_bytes(data)
        try:
            found, _ = read_mask(
                MaskFile("damaged", str(path), "", "1.2.3.4" if seg else ""), "1.2.3.4", mask.shape, 10**6
            )
        except FilmError as error:
            assert str(error).startswith("mask damaged: ") and len(str(error)) < 200 and "SECRET" not in str(error)
            refused += 1
            continue
        expected = pydicom.dcmread(io.BytesIO(data), force=True).pixel_array != 0 if seg else mask
        assert np.array_equal(found, expected)
        read[seg] += 1
    assert refused > 200 and min(read) > 5

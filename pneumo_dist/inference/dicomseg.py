"""One mask as a DICOM Segmentation that points at its source film. The only output that carries patient attributes.

They are copied from the source because the standard wants the object in the same patient and study; nothing else
of the header is read, and nothing of it is ever logged. Equal inputs give equal bytes: no clock, no random UID.
"""

from __future__ import annotations

import hashlib
import re
import warnings
from dataclasses import dataclass
from datetime import UTC, datetime
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pneumo_dist import __version__

# What the Patient, General Study and image reference modules need; those of type 2 may be empty but must be there.
IDENTITY = ("SOPClassUID", "SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID", "Rows", "Columns")
TYPE_2 = (
    "PatientName",
    "PatientID",
    "PatientBirthDate",
    "PatientSex",
    "StudyDate",
    "StudyTime",
    "StudyID",
    "AccessionNumber",
    "ReferringPhysicianName",
)
TYPE_3 = (
    "SpecificCharacterSet", "StudyDescription", "PatientAge", "PatientSize", "PatientWeight", "IssuerOfPatientID",
    "Modality", "PatientOrientation", "LossyImageCompression", "LossyImageCompressionRatio",
    "LossyImageCompressionMethod", "FrameOfReferenceUID", "PositionReferenceIndicator",
)  # fmt: skip


class SegError(Exception):
    """No Segmentation can be made for this film; the message holds no header text."""


@dataclass(frozen=True)
class SegJob:
    """One Segmentation to write."""

    film: str  # the film's id: two files with one SOP instance UID must not give one Segmentation UID
    source: str  # the film's file
    target: str  # the file to write
    rows: int
    columns: int
    packed: bytes  # np.packbits of the mask
    label: str  # of the inference, for the series description
    answer: str  # hash of what determines the answers: models, triplet, flips
    models: tuple[str, ...]  # sha256 of the model files
    created: int  # epoch seconds: the content date


def write_seg(job: SegJob) -> tuple[int, str]:
    """Write one Segmentation and return (bytes, sha256) of the file.

    Raises:
        SegError: the film is no DICOM file, or its header lacks what a reference to it needs.
    """
    mask = np.unpackbits(np.frombuffer(job.packed, np.uint8), count=job.rows * job.columns).reshape(
        job.rows, job.columns
    )
    data = seg_bytes(Path(job.source), mask.astype(bool), job)
    Path(job.target).write_bytes(data)
    return len(data), hashlib.sha256(data).hexdigest()


def try_write_seg(job: SegJob) -> tuple[int, str] | str:
    """Write one Segmentation; whatever prevents it comes back as a reason without header text."""
    try:
        return write_seg(job)
    except SegError as error:
        return str(error)
    except OSError:
        raise  # a full disk is no property of the film
    except Exception as error:  # highdicom quotes values in its messages
        return f"cannot be made ({type(error).__name__})"


def seg_bytes(source: Path, mask: NDArray[np.bool_], job: SegJob) -> bytes:
    """Return the DICOM file of a binary Segmentation with one segment, pixel for pixel on its source film.

    A film without FrameOfReferenceUID (every SIIM-ACR film, most secondary captures) gives a Segmentation without
    one: PS3.3 A.51 wants that module only where the source has it. No position, orientation or spacing is made up;
    the tie to the film is the reference to its SOP instance and the equal matrix. Pixel spacing is not copied
    either: films with a resampled matrix keep the spacing of the original one.

    Raises:
        SegError: as `write_seg`.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they quote patient names
        return _made(_header(source), mask, job)


def _made(header: Any, mask: NDArray[np.bool_], job: SegJob) -> bytes:
    import highdicom as hd
    from highdicom.sr.coding import CodedConcept
    from pydicom.uid import ExplicitVRLittleEndian, generate_uid

    if (header.Rows, header.Columns) != mask.shape:
        raise SegError(
            f"the header says {header.Rows} x {header.Columns}, the film has {mask.shape[0]} x {mask.shape[1]}"
        )
    entropy = ["pneumo_dist", __version__, job.label, job.answer]
    when = datetime.fromtimestamp(job.created, UTC)

    def uid(what: str, source: str) -> str:
        return str(generate_uid(entropy_srcs=[what, str(source), "" if what == "series" else job.film, *entropy]))

    algorithm = hd.AlgorithmIdentificationSequence(
        name="pneumo_dist ResNet34-UNet",
        version=f"{__version__} model {'+'.join(digest[:8] for digest in job.models)}"[:64],
        family=CodedConcept("123109", "DCM", "Artificial Intelligence"),
    )
    segment = hd.seg.SegmentDescription(
        segment_number=1,
        segment_label="Pneumothorax",
        segmented_property_category=CodedConcept("49755003", "SCT", "Morphologically Abnormal Structure"),
        segmented_property_type=CodedConcept("36118008", "SCT", "Pneumothorax"),
        algorithm_type=hd.seg.SegmentAlgorithmTypeValues.AUTOMATIC,
        algorithm_identification=algorithm,
        tracking_uid=uid("tracking", header.SOPInstanceUID),
        tracking_id="pneumothorax",
        anatomic_regions=[CodedConcept("43799004", "SCT", "Thoracic cavity")],
    )
    made = hd.seg.Segmentation(
        source_images=[header],
        pixel_array=mask.astype(np.uint8),
        segmentation_type=hd.seg.SegmentationTypeValues.BINARY,
        segment_descriptions=[segment],
        series_instance_uid=uid("series", header.SeriesInstanceUID),
        series_number=900,
        sop_instance_uid=uid("instance", header.SOPInstanceUID),
        instance_number=1,
        manufacturer="pneumo_dist",
        manufacturer_model_name="pneumo_dist",
        software_versions=__version__,
        device_serial_number="none",
        content_description="Pneumothorax, automatic, not reviewed",
        content_label="PNEUMOTHORAX",
        transfer_syntax_uid=ExplicitVRLittleEndian,
        omit_empty_frames=False,
        series_description=f"Pneumothorax (pneumo_dist {job.label})"[:64],
    )
    _fix_clock_and_uids(made, when, uid("dimensions", header.SOPInstanceUID))
    made.ContentCreatorName = ""
    made.PatientOrientation = header.get("PatientOrientation") or ""  # of type 2C where there is no image plane
    file = BytesIO()
    made.save_as(file)
    return file.getvalue()


def _header(path: Path) -> Any:
    """Read what the Segmentation needs; empty where a type 2 attribute is missing, an error where a type 1 is."""
    import pydicom
    from pydicom.dataset import Dataset

    pydicom.config.settings.reading_validation_mode = pydicom.config.IGNORE
    pydicom.config.settings.writing_validation_mode = pydicom.config.IGNORE
    try:
        read = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=[*IDENTITY, *TYPE_2, *TYPE_3], force=True)
        header = Dataset()
        header.file_meta = getattr(read, "file_meta", None)
        for name in (*IDENTITY, *TYPE_2, *TYPE_3):
            if name in read and (read[name].value not in (None, "") or name in TYPE_2):
                header.add(read[name])
    except Exception as error:  # damaged headers raise anything, and quote what they found
        raise SegError(f"its header cannot be read ({type(error).__name__})") from None
    missing = [name for name in IDENTITY if not header.get(name)]
    if missing:
        raise SegError(
            "not a DICOM file" if len(missing) == len(IDENTITY) else f"its header has no {', '.join(missing)}"
        )
    for name in TYPE_2:
        if name not in header:
            setattr(header, name, "")
    if not re.fullmatch(r"\d{3}[DWMY]", str(header.get("PatientAge", "000Y"))):
        del header.PatientAge  # "58" without a unit, as SIIM-ACR has it, would make our object invalid
    if "Modality" not in header:
        header.Modality = "OT"
    return header


def _fix_clock_and_uids(dataset: Any, when: datetime, dimensions: str) -> None:
    """Replace what highdicom takes from the clock and from the random generator."""
    day, time = when.strftime("%Y%m%d"), when.strftime("%H%M%S")
    for name in ("InstanceCreation", "Content", "Series"):
        if f"{name}Date" in dataset:
            setattr(dataset, f"{name}Date", day)
            setattr(dataset, f"{name}Time", time)
    for item in dataset.get("ContributingEquipmentSequence", []):
        item.ContributionDateTime = day + time
    dataset.DimensionOrganizationSequence[0].DimensionOrganizationUID = dimensions
    for item in dataset.DimensionIndexSequence:
        item.DimensionOrganizationUID = dimensions

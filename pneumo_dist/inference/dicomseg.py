"""Write a mask as a DICOM Segmentation that references its source film: the only output with patient attributes.

The standard requires the object to be in the same patient and study, so these attributes are copied. No other
attribute is read and none is logged. Equal inputs give equal bytes: no clock, no random UID.
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

# Attributes of the Patient, General Study and image reference modules; those of type 2 must exist but may be empty.
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
    """No Segmentation is possible for this film; the message contains no header text."""


@dataclass(frozen=True)
class SegJob:
    """One Segmentation to write."""

    film: str  # id of the film, part of the UIDs: two files may share one SOP instance UID
    source: str  # path of the film
    target: str  # path of the Segmentation
    rows: int
    columns: int
    packed: bytes  # np.packbits of the mask
    label: str  # label of the inference, for the series description
    answer: str  # hash of the settings that determine the result: models, triplet, flips
    models: tuple[str, ...]  # sha256 of the model files
    created: int  # epoch seconds: the content date


def try_write_seg(job: SegJob) -> tuple[int, str] | str:
    """Write one Segmentation and return (bytes, sha256) of the file, or the reason, without header text, for none."""
    mask = np.unpackbits(np.frombuffer(job.packed, np.uint8), count=job.rows * job.columns)
    try:
        data = seg_bytes(Path(job.source), mask.reshape(job.rows, job.columns).astype(bool), job)
    except SegError as error:
        return str(error)
    except OSError:
        raise  # a full disk concerns all films, not this one
    except Exception as error:  # the type only: highdicom quotes header values in its messages
        return f"not possible ({type(error).__name__})"
    Path(job.target).write_bytes(data)
    return len(data), hashlib.sha256(data).hexdigest()


def seg_bytes(source: Path, mask: NDArray[np.bool_], job: SegJob) -> bytes:
    """Return the DICOM file of a binary Segmentation with one segment and the matrix of its source film.

    A film without FrameOfReferenceUID (every SIIM-ACR film, most secondary captures) gives a Segmentation without
    one: PS3.3 A.51 requires that module only if the source has it. Position, orientation and spacing are not invented:
    the Segmentation refers to the film by its SOP instance and has the same matrix. Pixel spacing is not copied
    either, since resampled films may carry the spacing of the original matrix.

    Raises:
        SegError: the film is not a DICOM file, or its header lacks an attribute that a reference needs.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they quote patient names
        return _encode(_header(source), mask, job)


def _encode(header: Any, mask: NDArray[np.bool_], job: SegJob) -> bytes:
    import highdicom as hd
    from pydicom.uid import ExplicitVRLittleEndian, generate_uid

    if (header.Rows, header.Columns) != mask.shape:
        raise SegError(
            f"the header says {header.Rows} x {header.Columns}, the mask has {mask.shape[0]} x {mask.shape[1]}"
        )
    entropy = ["pneumo_dist", __version__, job.label, job.answer]

    def uid(kind: str, source: str) -> str:
        return str(generate_uid(entropy_srcs=[kind, str(source), "" if kind == "series" else job.film, *entropy]))

    segmentation = hd.seg.Segmentation(
        source_images=[header],
        pixel_array=mask.astype(np.uint8),
        segmentation_type=hd.seg.SegmentationTypeValues.BINARY,
        segment_descriptions=[_segment(job, uid("tracking", header.SOPInstanceUID))],
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
    _set_date_and_uids(segmentation, job.created, uid("dimensions", header.SOPInstanceUID))
    segmentation.ContentCreatorName = ""
    segmentation.PatientOrientation = header.get("PatientOrientation") or ""  # type 2C without an image plane
    file = BytesIO()
    segmentation.save_as(file)
    return file.getvalue()


def _segment(job: SegJob, tracking_uid: str) -> Any:
    """Describe the segment: pneumothorax in the thoracic cavity, found by this program and its models."""
    import highdicom as hd
    from highdicom.sr.coding import CodedConcept

    algorithm = hd.AlgorithmIdentificationSequence(
        name="pneumo_dist ResNet34-UNet",
        version=f"{__version__} model {'+'.join(digest[:8] for digest in job.models)}"[:64],
        family=CodedConcept("123109", "DCM", "Artificial Intelligence"),
    )
    return hd.seg.SegmentDescription(
        segment_number=1,
        segment_label="Pneumothorax",
        segmented_property_category=CodedConcept("49755003", "SCT", "Morphologically Abnormal Structure"),
        segmented_property_type=CodedConcept("36118008", "SCT", "Pneumothorax"),
        algorithm_type=hd.seg.SegmentAlgorithmTypeValues.AUTOMATIC,
        algorithm_identification=algorithm,
        tracking_uid=tracking_uid,
        tracking_id="pneumothorax",
        anatomic_regions=[CodedConcept("43799004", "SCT", "Thoracic cavity")],
    )


def _header(path: Path) -> Any:
    """Read the attributes that the Segmentation needs: a missing one of type 2 is empty, of type 1 raises SegError."""
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
    except Exception as error:  # the type only: errors of damaged headers quote values
        raise SegError(f"its header is unreadable ({type(error).__name__})") from None
    missing = [name for name in IDENTITY if not header.get(name)]
    if missing:
        raise SegError(
            "not a DICOM file" if len(missing) == len(IDENTITY) else f"its header has no {', '.join(missing)}"
        )
    for name in TYPE_2:
        if name not in header:
            setattr(header, name, "")
    if not re.fullmatch(r"\d{3}[DWMY]", str(header.get("PatientAge", "000Y"))):
        del header.PatientAge  # "58" without a unit, as in SIIM-ACR, would make the Segmentation invalid
    if "Modality" not in header:
        header.Modality = "OT"
    return header


def _set_date_and_uids(dataset: Any, created: int, dimensions: str) -> None:
    """Replace the values that highdicom takes from the clock and from the random generator."""
    when = datetime.fromtimestamp(created, UTC)
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

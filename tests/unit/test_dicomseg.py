"""DICOM Segmentation: the mask as it is, tied to its film, valid, the same bytes every time."""

import io
import shutil
import subprocess
import warnings

import cv2
import numpy as np
import pytest

from pneumo_dist.inference.dicomseg import SegError, SegJob, seg_bytes, try_write_seg
from tests.films import PATIENT, SECRET, picture, write_dicom

pydicom = pytest.importorskip("pydicom")
highdicom = pytest.importorskip("highdicom")


def mask_of(rows=97, columns=81):
    mask = np.zeros((rows, columns), bool)
    mask[10:50, 20:40] = True
    mask[-1, -1] = True  # the last pixel is the one that gets lost
    return mask


def job(film="film", target="", answer="answer", created=1_700_000_000, mask=None, source=""):
    mask = mask_of() if mask is None else mask
    return SegJob(
        film, str(source), str(target), *mask.shape, np.packbits(mask).tobytes(), "label", answer, ("ab" * 32,), created
    )


@pytest.fixture
def film(tmp_path):
    return write_dicom(tmp_path / "film.dcm", picture(1, 97, 81))  # odd sizes: bits are packed across rows


def test_read_back_with_pydicom_and_highdicom_it_is_the_mask(film, tmp_path):
    target = tmp_path / "seg.dcm"
    size, _ = try_write_seg(job(target=target, source=film))
    assert target.stat().st_size == size
    assert np.array_equal(pydicom.dcmread(target).pixel_array.reshape(97, 81), mask_of())
    seg = highdicom.seg.segread(target)
    source = pydicom.dcmread(film)
    assert np.array_equal(seg.get_pixels_by_source_instance([source.SOPInstanceUID])[0, :, :, 0], mask_of())
    assert (
        seg.ReferencedSeriesSequence[0].ReferencedInstanceSequence[0].ReferencedSOPInstanceUID == source.SOPInstanceUID
    )
    assert (seg.StudyInstanceUID, seg.PatientName, seg.PatientID) == (source.StudyInstanceUID, PATIENT, SECRET)
    assert seg.SeriesInstanceUID != source.SeriesInstanceUID
    assert seg.get_segment_description(1).segmented_property_type.meaning == "Pneumothorax"


def test_a_film_without_frame_of_reference_gets_none_made_up(film):
    seg = pydicom.dcmread(io.BytesIO(seg_bytes(film, mask_of(), job())))
    for name in ("FrameOfReferenceUID", "PixelSpacing"):
        assert name not in seg
    shared = seg.SharedFunctionalGroupsSequence[0]
    assert "PixelMeasuresSequence" not in shared and "PlaneOrientationSequence" not in shared
    assert seg.PatientOrientation in (None, "")


def test_a_frame_of_reference_of_the_film_is_kept(tmp_path):
    film = write_dicom(tmp_path / "film.dcm", picture(1, 97, 81), FrameOfReferenceUID="1.2.3", PixelSpacing=[0.1, 0.1])
    assert pydicom.dcmread(io.BytesIO(seg_bytes(film, mask_of(), job()))).FrameOfReferenceUID == "1.2.3"


def test_equal_answers_give_equal_bytes_and_other_answers_other_uids(film):
    first = seg_bytes(film, mask_of(), job())
    assert seg_bytes(film, mask_of(), job()) == first

    def uid(data):
        return pydicom.dcmread(io.BytesIO(data)).SOPInstanceUID

    assert uid(seg_bytes(film, mask_of(), job(answer="other"))) != uid(first)
    # Copies of a film under two names share its SOP instance UID; their Segmentations must not share theirs.
    assert uid(seg_bytes(film, mask_of(), job(film="twin"))) != uid(first)


def test_the_date_is_the_plans(film):
    seg = pydicom.dcmread(io.BytesIO(seg_bytes(film, mask_of(), job(created=0))))
    assert (seg.ContentDate, seg.ContentTime) == ("19700101", "000000")
    text = str(seg)
    assert "DT: '19700101000000'" in text and not any(f"'{year}" in text for year in range(2024, 2040))


def test_headers_without_optional_parts_still_work(tmp_path):
    film = write_dicom(tmp_path / "film.dcm", picture(1, 97, 81))
    bare = pydicom.dcmread(film)
    for name in (
        "StudyDate",
        "StudyTime",
        "StudyID",
        "AccessionNumber",
        "PatientBirthDate",
        "ReferringPhysicianName",
        "Modality",
    ):
        delattr(bare, name)
    bare.save_as(film)
    assert np.array_equal(
        pydicom.dcmread(io.BytesIO(seg_bytes(film, mask_of(), job()))).pixel_array.reshape(97, 81), mask_of()
    )


def test_what_is_no_dicom_film_gets_a_reason_without_header_text(tmp_path, film):
    cv2.imwrite(str(tmp_path / "film.png"), picture(1, 97, 81))
    with pytest.raises(SegError, match="not a DICOM file"):
        seg_bytes(tmp_path / "film.png", mask_of(), job())
    wrong = mask_of(50, 50)
    assert "the header says 97 x 81" in try_write_seg(job(target=tmp_path / "x", source=film, mask=wrong))
    headless = pydicom.dcmread(film)
    del headless.StudyInstanceUID
    headless.save_as(film)
    assert try_write_seg(job(target=tmp_path / "x", source=film)) == "its header has no StudyInstanceUID"


def test_nothing_about_the_patient_is_warned_or_logged(film, caplog, capfd):
    bad = pydicom.dcmread(film)
    bad.PatientName = SECRET  # one component: highdicom would quote it in a warning
    bad.save_as(film)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        seg_bytes(film, mask_of(), job())
    said = caplog.text + "".join(capfd.readouterr()) + "".join(str(item.message) for item in seen)
    assert SECRET not in said


@pytest.mark.skipif(shutil.which("dciodvfy") is None, reason="dciodvfy (Debian package dicom3tools) is not installed")
@pytest.mark.parametrize("attributes", [{}, {"FrameOfReferenceUID": "1.2.3", "PositionReferenceIndicator": ""}])
def test_dciodvfy_finds_no_error(tmp_path, attributes):
    film = write_dicom(tmp_path / "film.dcm", picture(1, 97, 81), **attributes)
    target = tmp_path / "seg.dcm"
    target.write_bytes(seg_bytes(film, mask_of(), job()))
    done = subprocess.run(["dciodvfy", "-new", str(target)], capture_output=True, text=True, check=False)
    said = done.stdout + done.stderr
    assert "Segmentation" in said and "Error" not in said, said

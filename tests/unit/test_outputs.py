"""Files and tables: strict submissions, scores of labelled films, rows with every digit, pictures one can read."""

import csv
import hashlib

import cv2
import numpy as np
import pydicom
import pytest

from pneumo_dist.config import ConfigError
from pneumo_dist.data.films.rle import encode_rle
from pneumo_dist.inference import outputs
from pneumo_dist.inference.film_plan import PlannedFilm
from pneumo_dist.inference.outputs import FilmWriter, caption, csv_text, empty_row
from pneumo_dist.inference.reading import ReadFilm, fit
from pneumo_dist.reports import pictures
from pneumo_dist.scoring.records import Triplet
from pneumo_dist.scoring.submission_csv import score_submission, validation_of, write_submission
from tests.films import picture, write_dicom

GOOD = "3 2 5 1"


def submission(path, rows, head="ImageId,EncodedPixels"):
    path.write_text("\n".join([head, *(f"{name},{text}" for name, text in rows)]) + "\n")
    return path


@pytest.fixture
def folder(tmp_path):
    films = tmp_path / "films"
    write_dicom(films / "a.dcm", picture(1, 40, 30))
    cv2.imwrite(str(films / "b.png"), picture(2, 20, 50))
    (films / "broken.dcm").write_bytes(b"")
    return films


def test_a_valid_submission_has_no_problems(folder, tmp_path):
    rows = [("a", encode_rle(picture(1, 40, 30) > 128)), ("b", "-1"), ("broken", "-1")]
    assert validation_of(submission(tmp_path / "s.csv", rows), folder).problems == []


@pytest.mark.parametrize(
    ("rows", "wanted"),
    [
        ([("a", GOOD), ("b", "-1")], None),  # an unreadable film needs no row
        ([("b", "-1")], "2 films have no row (first: a)"),
        ([("a", GOOD), ("a", GOOD), ("b", "-1"), ("broken", "-1")], "a has a second row"),
        ([("a", GOOD), ("b", "-1"), ("broken", "-1"), ("c", "-1")], "c is not one of the films"),
        ([("a", "1199 1"), ("b", "-1"), ("broken", "-1")], None),  # the last pixel of 40 x 30
        ([("a", "1199 2"), ("b", "-1"), ("broken", "-1")], "past the 40 x 30 film"),
        ([("a", "-1"), ("b", "1000 1"), ("broken", "-1")], "past the 20 x 50 film"),
        ([("a", "3 2 -5 1"), ("b", "-1"), ("broken", "-1")], "is not a whole number"),
        ([("a", "3 2 5"), ("b", "-1"), ("broken", "-1")], "odd number of values"),
        ([("a", "3 0"), ("b", "-1"), ("broken", "-1")], "length 0"),
        ([("a", "3 2 0 4"), ("b", "-1"), ("broken", "-1")], "shortest form"),  # two runs that touch
        ([("a", " 3 2"), ("b", "-1"), ("broken", "-1")], "shortest form"),
        ([("a", ""), ("b", "-1"), ("broken", "-1")], "empty cell"),
        ([("a", " -1"), ("b", "-1"), ("broken", "-1")], "shortest form"),
        ([("a", "-1"), ("b", "-1"), ("broken", GOOD)], "broken cannot be read, so its row must be -1"),
        ([("a", "-1,x"), ("b", "-1"), ("broken", "-1")], "3 cells"),
    ],
)
def test_what_is_wrong_with_a_submission_is_named(folder, tmp_path, rows, wanted):
    problems = validation_of(submission(tmp_path / "s.csv", rows), folder).problems
    assert (problems == []) if wanted is None else any(wanted in problem for problem in problems), problems


def test_the_content_of_a_film_decides_not_its_name(folder, tmp_path):
    (folder / "a.dcm").rename(folder / "a.png")
    (folder / "b.png").rename(folder / "b.dcm")
    film = write_dicom(tmp_path / "deflated.dcm", picture(3, 40, 30))
    data = pydicom.dcmread(film)
    data.file_meta.TransferSyntaxUID = pydicom.uid.DeflatedExplicitVRLittleEndian
    data.save_as(folder / "c.dcm")
    rows = [("a", "1199 1"), ("b", "999 1"), ("c", "1199 1")]
    assert validation_of(submission(tmp_path / "s.csv", rows), folder).problems == []


def test_an_object_without_an_image_is_no_film_without_a_row(folder, tmp_path):
    """Also behind the first readable film: the search for unreadable ones ends there."""
    write_dicom(folder / "report.dcm", picture(5), SOPClassUID="1.2.840.10008.5.1.4.1.1.88.11")
    data = pydicom.dcmread(folder / "report.dcm")
    data.file_meta.MediaStorageSOPClassUID = data.SOPClassUID
    data.save_as(folder / "report.dcm")
    result = validation_of(submission(tmp_path / "s.csv", [("b", "-1")]), folder)
    assert (result.problems, result.films) == (["2 films have no row (first: a)"], 3)


def test_the_header_is_checked_and_a_missing_file_is_one_line(folder, tmp_path):
    path = submission(tmp_path / "s.csv", [], head="ImageId, EncodedPixels")
    assert "the header is" in validation_of(path, folder).problems[0]
    (tmp_path / "empty.csv").write_text("")
    assert validation_of(tmp_path / "empty.csv", folder).problems == ["the file is empty"]
    with pytest.raises(ConfigError, match="cannot read the submission"):
        validation_of(tmp_path / "gone.csv", folder)


def test_against_a_sample_submission_films_are_1024(tmp_path):
    sample = submission(tmp_path / "sample.csv", [("x", " 1 2"), ("y", "-1")], head="ImageId, EncodedPixels")
    good = submission(tmp_path / "good.csv", [("x", f"{1024 * 1024 - 1} 1"), ("y", "-1")])
    assert validation_of(good, sample).problems == []
    bad = submission(tmp_path / "bad.csv", [("x", f"{1024 * 1024} 1"), ("y", "-1")])
    assert "1024 x 1024" in validation_of(bad, sample).problems[0]
    with pytest.raises(ConfigError, match="ImageId"):
        validation_of(good, submission(tmp_path / "other.csv", [], head="a,b"))
    with pytest.raises(ConfigError, match="gone: cannot read the folder of films or list of ids"):
        validation_of(good, tmp_path / "gone")


def test_scores_of_a_submission_are_those_of_its_masks(tmp_path):
    rng = np.random.default_rng(0)
    masks = {f"f{i}": np.zeros((1024, 1024), bool) for i in range(6)}
    truth = {name: mask.copy() for name, mask in masks.items()}
    for i, name in enumerate(masks):
        if i % 2:
            truth[name][100 : 300 + i, 50:200] = True
        if i != 3:
            masks[name][100 : 250 + i, 50 + i : 200] = rng.random() > 0.3
    write_submission(tmp_path / "submission.csv", [(name, encode_rle(mask)) for name, mask in masks.items()])
    # One annotated film has two overlapping rows: their union counts.
    rows = [(name, encode_rle(mask)) for name, mask in truth.items()]
    rows += [("f1", encode_rle(truth["f1"] & (np.arange(1024) < 120))), ("stranger", "-1")]
    labels = submission(tmp_path / "labels.csv", rows, head="ImageId, EncodedPixels")
    result = score_submission(tmp_path / "submission.csv", labels, bootstrap=20)

    def film_dice(name):
        both = (masks[name] & truth[name]).sum()
        total = masks[name].sum() + truth[name].sum()
        return 1.0 if total == 0 else 2 * both / total

    assert result["dice"] == pytest.approx(np.mean([film_dice(name) for name in masks]), abs=1e-12)
    assert result["films"] == 6 and result["positive"] == 3 and result["truth_without_answer"] == 1
    assert result["intervals_by"] == "film" and "masks" in result["auc_from"]
    assert {
        "dice_positive",
        "iou",
        "sensitivity",
        "specificity",
        "auc",
        "dice_all_empty",
        "by_mask_size",
    } <= result.keys()
    with pytest.raises(ConfigError, match="no film in common"):
        score_submission(tmp_path / "submission.csv", submission(tmp_path / "none.csv", [("z", "-1")]))


def test_sizes_and_ranking_come_from_predictions_csv_beside_the_submission(tmp_path):
    mask = np.zeros((40, 30), bool)
    mask[5:9, 3:8] = True
    write_submission(tmp_path / "submission.csv", [("a", encode_rle(mask)), ("b", "-1"), ("bad", "-1")])
    (tmp_path / "predictions.csv").write_text("film,top_score,rows,columns\na,0.9,40,30\nb,0.95,40,30\nbad,,,\n")
    labels = submission(tmp_path / "labels.csv", [("a", encode_rle(mask)), ("b", "-1"), ("bad", "-1")])
    result = score_submission(tmp_path / "submission.csv", labels, bootstrap=0)
    assert result["dice"] == 1.0
    assert result["films"] == 2 and result["unreadable"] == 1  # the film without a top score is not scored
    assert result["auc"] == 0.0  # a ranks below b
    patients = submission(tmp_path / "patients.csv", [("a", "p"), ("b", "p")], head="ImageId,PatientKey")
    assert score_submission(tmp_path / "submission.csv", labels, patients, bootstrap=5)["patients"] == 1


def test_the_truth_may_name_films_by_path_and_count_positions(tmp_path):
    mask = np.zeros((1024, 1024), bool)
    mask[5:9, 3:8] = True
    write_submission(tmp_path / "submission.csv", [("a", encode_rle(mask)), ("b", "-1")])
    runs = " ".join(f"{column * 1024 + 6} 4" for column in range(3, 8))
    labels = submission(tmp_path / "labels.csv", [("train/a.dcm", runs), ("train/b.dcm", "-1")])
    with pytest.raises(ConfigError, match="4 of 4 offsets ascend as absolute positions do"):
        score_submission(tmp_path / "submission.csv", labels)
    result = score_submission(tmp_path / "submission.csv", labels, bootstrap=0, rle="absolute")
    assert result["films"] == 2 and result["dice_positive"] == 1
    labels = submission(
        tmp_path / "labels.csv", [("a.png", "9 9 1 2"), ("b", "5 2 9 2 13 2"), ("b", "900 5 6 5 6 5 6 5")]
    )
    with pytest.raises(ConfigError, match=r"b: labels.csv:3: unlike in other rows"):
        score_submission(tmp_path / "submission.csv", labels)


def test_the_truth_may_name_films_by_their_uid_but_not_one_film_twice(tmp_path):
    write_submission(tmp_path / "submission.csv", [("IM000001", "5 9"), ("IM000002", "-1")])
    (tmp_path / "predictions.csv").write_text(
        "film,top_score,rows,columns,sop_uid\nIM000001,0.9,40,30,1.2.3.4.5\nIM000002,0.1,40,30,\n"
    )
    labels = submission(tmp_path / "labels.csv", [("1.2.3.4.5", "5 9"), ("IM000002", "-1")])
    patients = submission(tmp_path / "patients.csv", [("1.2.3.4.5.dcm", "p")], head="ImageId,PatientKey")
    result = score_submission(tmp_path / "submission.csv", labels, patients, bootstrap=0)
    assert result["films"] == 2 and result["dice"] == 1 and result["unreadable"] == 0
    labels = submission(tmp_path / "labels.csv", [("p/IM000001", "5 9"), ("q/IM000001", "-1")])
    with pytest.raises(ConfigError, match="p/IM000001 and q/IM000001 both have the name of film IM000001"):
        score_submission(tmp_path / "submission.csv", labels)


def test_rows_keep_every_digit_and_quote_what_must_be_quoted():
    top = float(np.float32(0.1) + np.float32(2**-20))
    text = csv_text(["film", "top_score", "reason"], [{"film": 'a,"b', "top_score": top, "reason": None}])
    (row,) = csv.DictReader(text.splitlines())
    assert row["film"] == 'a,"b' and np.float32(row["top_score"]) == np.float32(top) and row["reason"] == ""


def test_a_film_writer_hashes_what_it_wrote(tmp_path):
    read = ReadFilm("", 96, 80, {}, picture(1), sop_uid="1.2.3")
    film = PlannedFilm("x/ü", "x/ü.dcm", 1, "x_name")
    prob = np.full((96, 80), 0.2, np.float32)
    prob[10:50, 20:40] = 0.9
    writer = FilmWriter(tmp_path, ("csv", "masks", "overlays", "probs"), Triplet(0.5, 0, 0.5))
    row = writer.write(film, read, prob, None)
    assert row["decision"] == "positive" and row["area_px"] == 800 and row["share"] == 800 / 7680
    assert row["sop_uid"] == "1.2.3" and "sop_uid" in outputs.PREDICTION_COLUMNS
    assert set(row["files"]) == {
        f"{f}/x_name.{e}" for f, e in [("thumbs", "jpg"), ("masks", "png"), ("overlays", "png"), ("probs", "png")]
    }
    for name, (size, digest) in row["files"].items():
        data = (tmp_path / name).read_bytes()
        assert len(data) == size and hashlib.sha256(data).hexdigest() == digest
    writer = FilmWriter(tmp_path, ("csv",), Triplet(0.95, 0, 0.5))
    empty = writer.write(film, read, prob, None)
    assert empty["decision"] == "negative" and empty["rle"] == "-1" and empty["top_score"] == pytest.approx(0.9)
    scored = writer.write(film, read, prob, 0.97)  # of an image-level head
    assert scored["decision"] == "positive" and scored["top_score"] == 0.97
    assert empty_row(film, "because")["reason"] == "because"


@pytest.mark.parametrize("shape", [(96, 80), (1024, 1024), (60, 900), (1400, 700)])
def test_an_overlay_shows_film_contour_and_caption(shape):
    grey = np.full(shape, 90, np.uint8)
    mask = np.zeros((2 * shape[0], 2 * shape[1]), bool)  # larger than the picture, as films are
    mask[shape[0] // 2 : shape[0], shape[1] // 2 : shape[1]] = True
    drawn = pictures.overlay(grey, mask, ["positive, score 0.97; mask area 1.2 % of the image", "film"])
    bar = drawn.shape[0] - shape[0]
    assert drawn.shape[1:] == (shape[1], 3) and bar > 0
    orange = np.abs(drawn.astype(int) - pictures.PREDICTION).max(2) < 40
    assert orange[bar:].any()  # the contour
    inside = drawn[bar + int(shape[0] * 0.37), int(shape[1] * 0.37)]
    assert inside.tolist() == [90, 90, 90]  # the film itself is not covered
    plain = pictures.overlay(grey, np.zeros(shape, bool), ["negative, score 0.12"])
    assert (plain[-shape[0] :] == 90).all()


@pytest.mark.parametrize(
    ("decision", "share", "verdict"),
    [
        ("positive", 0.000_099, "positive, score 0.77; mask area under 0.01 % of the image"),
        ("positive", 0.000_5, "positive, score 0.77; mask area 0.05 % of the image"),
        ("positive", 0.0123, "positive, score 0.77; mask area 1.2 % of the image"),
        ("negative", 0.0, "negative, score 0.77"),
    ],
)
def test_the_caption_states_decision_score_and_area(decision, share, verdict):
    row = {"film": "a", "decision": decision, "top_score": 0.772, "share": share}
    assert caption(row) == [verdict, "a"]


def test_small_findings_stay_visible_and_pictures_keep_their_shape():
    mask = np.zeros((1024, 1024), bool)
    mask[500:503, 500:503] = True
    assert pictures.fit_mask(mask, 128, 128).any()
    assert fit(picture(1, 1000, 500), 256).shape == (256, 128)
    assert fit(picture(1, 96, 80), 256).shape == (96, 80)
    assert pictures.restore(np.zeros((512, 512), np.uint8), 1000, 500).shape == (512, 256)
    assert pictures.restore(np.zeros((64, 64), np.uint8), 500, 1000).shape == (192, 384)

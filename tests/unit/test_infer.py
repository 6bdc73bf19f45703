"""Batch inference: every film once, whatever the number of tasks, the order of files, or what died on the way."""

import json
import os
import shutil
import signal
from dataclasses import asdict, replace
from pathlib import Path

import cv2
import numpy as np
import pydicom
import pytest
import torch
from pydicom.uid import JPEGLosslessSV1

from pneumo_dist import done
from pneumo_dist.config import ConfigError
from pneumo_dist.data.films import codecs, grey
from pneumo_dist.data.films.rle import decode_rle
from pneumo_dist.inference import film_plan, infer, parts, reading
from pneumo_dist.inference.film_plan import check_films, file_name, read_film_plan, write_film_plan
from pneumo_dist.model.modelfile import load_model
from pneumo_dist.prediction.forward import predict
from pneumo_dist.runtime import processes
from pneumo_dist.runtime.failure import Failure
from pneumo_dist.runtime.files import sha256_file
from pneumo_dist.runtime.stopping import Stopped
from pneumo_dist.scoring.records import Triplet, apply_triplet
from pneumo_dist.scoring.submission_csv import read_rows, score_submission, validation_of
from tests.film_files import streamed_bytes
from tests.films import PATIENT, SECRET, picture, task, write_dicom, write_model
from tests.streams import lossless_jpeg

EVERYTHING = "infer.outputs=csv,masks,overlays,probs,dicomseg"
RULE = {"top_score": 0.85, "min_area": 200, "mask_threshold": 0.5}
READABLE = {"a", "b", "c", "d", "sub/twin.dcm", "other/twin.dcm", "grey", "photo", "bare"}
DAMAGED = {"cut", "empty", "text"}


@pytest.fixture(scope="module")
def films(tmp_path_factory):
    """A folder as archives are: nested, mixed, partly damaged, of several sizes and formats."""
    folder = tmp_path_factory.mktemp("films")
    for i, name in enumerate(["a", "b", "c", "d"]):
        write_dicom(folder / f"{name}.dcm", picture(i, 96 + 32 * i, 80))
    write_dicom(folder / "sub" / "twin.dcm", picture(5))
    write_dicom(folder / "other" / "twin.dcm", picture(6))
    write_dicom(folder / "bare", picture(7))  # no extension, DICM at byte 128
    cv2.imwrite(str(folder / "grey.png"), picture(8))
    cv2.imwrite(str(folder / "photo.jpg"), picture(9, 120, 200))
    (folder / "cut.dcm").write_bytes((folder / "a.dcm").read_bytes()[:900])
    (folder / "empty.dicom").write_bytes(b"")
    (folder / "text.png").write_text("no picture")
    (folder / "notes.txt").write_text("not a film")
    return folder


@pytest.fixture(scope="module")
def eight(tmp_path_factory):
    """Eight films, five of them unreadable in different ways; beside them a report object and an archive."""
    folder = tmp_path_factory.mktemp("eight")
    for i, name in enumerate(["a", "b", "c", "cut"]):
        write_dicom(folder / f"{name}.dcm", picture(i))
    (folder / "cut.dcm").write_bytes((folder / "a.dcm").read_bytes()[:-3000])  # the header is whole
    write_dicom(folder / "colour.dcm", picture(5), PhotometricInterpretation="RGB")
    write_dicom(folder / "frames.dcm", picture(5), NumberOfFrames=7)
    (folder / "empty.dcm").write_bytes(b"")
    (folder / "text.png").write_text("no picture")
    write_dicom(folder / "report.dcm", picture(5))
    report = pydicom.dcmread(folder / "report.dcm")
    report.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.88.11"
    report.save_as(folder / "report.dcm")
    (folder / "old.dcm.gz").write_bytes(b"\x1f\x8b\x08\0")
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model") / "model.pt", triplet=RULE)


def run(run_dir: Path, films: Path, model: Path, *overrides: str, tasks: int = 1, merge: bool = True) -> Path:
    """Run a whole inference and return its folder."""
    words = [f"infer.dir={films}", f"infer.models={model}", "infer.label=it", "infer.part_size=4", *overrides]
    write_film_plan(task(run_dir, "infer", words).run)
    for index in range(tasks):
        infer.infer_parts(task(run_dir, "infer", words, part=(index, tasks)))
    if merge:
        infer.merge(task(run_dir, "merge", words))
    return run_dir / "infer" / "it"


def answers(folder: Path) -> dict[str, bytes]:
    """Every output of an inference by name, without the parts; DICOM SEG included, since its date is the plan's."""
    paths = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    return {name: path.read_bytes() for name, path in paths.items() if not name.startswith("parts/")}


@pytest.fixture(scope="module")
def reference(films, model, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SOURCE_DATE_EPOCH", "1700000000")
        return run(tmp_path_factory.mktemp("reference"), films, model, EVERYTHING)


@pytest.fixture(autouse=True)
def fixed_date(monkeypatch):
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")


def rows_of(folder: Path) -> dict[str, dict[str, str]]:
    head, *rows = read_rows(folder / "predictions.csv")
    return {row[0]: dict(zip(head, row, strict=True)) for row in rows}


def test_every_readable_film_is_answered_and_every_damaged_one_has_a_reason(reference, films):
    rows = rows_of(reference)
    assert {name for name, row in rows.items() if row["status"] == "ok"} == READABLE
    assert rows["a"]["sop_uid"] == pydicom.dcmread(films / "a.dcm").SOPInstanceUID and not rows["photo"]["sop_uid"]
    damaged = {name: row for name, row in rows.items() if row["status"] == "unreadable"}
    assert damaged.keys() == DAMAGED and all(row["reason"] and not row["top_score"] for row in damaged.values())
    submission = dict(read_rows(reference / "submission.csv")[1:])
    assert submission.keys() == READABLE
    assert validation_of(reference / "submission.csv", films).problems == []
    assert {row["decision"] for row in rows.values()} == {"positive", "negative", ""}  # the test sees both
    assert json.loads((reference / "inference.json").read_text())["ignored_files"] == 1


UNREADABLE = {"cut", "colour", "frames", "empty", "text"}


@pytest.fixture(scope="module")
def answered(eight, model, tmp_path_factory):
    return run(tmp_path_factory.mktemp("answered"), eight, model)


def test_an_unreadable_film_is_not_negative_and_an_object_without_image_is_no_film(eight, answered, model, tmp_path):
    out = Path(shutil.copytree(answered, tmp_path / "infer" / "it"))
    rows = rows_of(out)
    assert {name for name, row in rows.items() if row["status"] == "unreadable"} == UNREADABLE and len(rows) == 8
    assert read_rows(out / "ignored.csv") == [
        ["path", "reason"],
        ["old.dcm.gz", "compressed file or archive: unpack it"],
        ["report.dcm", "not an image (Basic Text SR Storage)"],
    ]
    submission = out / "submission.csv"
    assert [row[0] for row in read_rows(submission)[1:]] == ["a", "b", "c"]
    notes = json.loads((out / "inference.json").read_text())["notes"]
    assert notes[0].startswith("no answer for 5 of 8 films") and "they have no row in submission.csv" in notes[0]
    assert all(note in (out / "report.html").read_text() for note in notes)
    truth = tmp_path / "truth.csv"
    truth.write_text("ImageId,EncodedPixels\na,-1\nb,-1\nc,-1\ncut,0 9\nempty,-1\nother,-1\n")
    scores = score_submission(submission, truth, bootstrap=0)
    counts = {
        "films": 3,
        "unreadable": 2,
        "unreadable_positive": 1,
        "truth_without_answer": 1,
        "films_without_truth": 0,
    }
    assert {name: scores[name] for name in counts} == counts

    part = out / "parts" / "part-00000" / "part.json"
    before = part.stat().st_mtime_ns
    run(tmp_path, eight, model, "infer.unreadable=negative")
    completed = dict(read_rows(submission)[1:])
    assert len(completed) == 8 and all(completed[name] == "-1" for name in UNREADABLE)
    assert "which is not a finding" in json.loads((out / "inference.json").read_text())["notes"][0]
    assert score_submission(submission, truth, bootstrap=0) == scores | {"films_without_truth": 3}  # of the others
    assert part.stat().st_mtime_ns == before and rows_of(out) == rows  # only the tables changed
    with_rows = validation_of(submission, eight)
    assert (with_rows.problems, with_rows.films, with_rows.with_row) == ([], 8, UNREADABLE)


@pytest.mark.parametrize("beside", [True, False])
def test_validate_accepts_a_film_without_a_row_only_if_it_is_unreadable(eight, answered, tmp_path, beside):
    """Without predictions.csv beside the submission, the films without a row are read."""
    submission = shutil.copy(answered / "submission.csv", tmp_path)
    if beside:
        shutil.copy(answered / "predictions.csv", tmp_path)
    result = validation_of(submission, eight)
    assert (result.problems, result.films, result.without_row) == ([], 8, UNREADABLE)
    rows = Path(submission).read_text().splitlines()
    Path(submission).write_text("\n".join(rows[:-1]) + "\n")
    assert any("films have no row" in problem for problem in validation_of(submission, eight).problems)
    ids = tmp_path / "sample_submission.csv"
    ids.write_text("ImageId,EncodedPixels\na,-1\nb,-1\ncut,-1\n")
    problems = validation_of(submission, ids).problems  # the competition wants a row for each
    assert problems[0] == "1 films have no row (first: cut)"
    assert any("infer.unreadable=negative" in problem for problem in problems) == beside


@pytest.mark.parametrize("policy", ["skip", "negative"])
def test_no_readable_film_is_a_failure_with_the_reasons_written(eight, model, tmp_path, policy):
    folder = tmp_path / "films"
    shutil.copytree(eight, folder)
    for name in "abc":
        (folder / f"{name}.dcm").unlink()
    with pytest.raises(Failure, match=r"none of 5 films is readable \(first: colour: ") as caught:
        run(tmp_path, folder, model, f"infer.unreadable={policy}")
    out = tmp_path / "infer" / "it"
    assert str(out) in str(caught.value) and "\n" not in str(caught.value)
    assert rows_of(out).keys() == UNREADABLE
    assert len(read_rows(out / "submission.csv")) == (6 if policy == "negative" else 1)
    for path in folder.iterdir():
        if path.stem != "report":
            path.unlink()
    with pytest.raises(Failure, match=r"report: not an image \(Basic Text SR Storage\)"):
        run(tmp_path, folder, model)


def test_links_out_of_the_folder_are_followed_on_request(eight, films, model, tmp_path):
    folder = tmp_path / "films"
    shutil.copytree(eight, folder)
    (folder / "linked").symlink_to(films / "sub")
    out = run(tmp_path, folder, model)
    assert "infer.follow_links=true" in dict(read_rows(out / "ignored.csv"))["linked"]
    run(tmp_path, folder, model, "infer.follow_links=true")
    assert "twin" in rows_of(out) and validation_of(out / "submission.csv", folder).problems == []


def test_every_file_is_listed_with_its_hash(reference):
    listed = dict(reversed(line.split("  ", 1)) for line in (reference / "files.sha256").read_text().splitlines())
    folders = ("masks", "overlays", "probs", "seg", "thumbs")
    written = {p.relative_to(reference).as_posix() for name in folders for p in (reference / name).iterdir()}
    assert listed.keys() == written
    assert all(sha256_file(reference / name) == digest for name, digest in listed.items())


def test_masks_areas_and_probabilities_are_at_film_size_by_the_stored_rule(reference, films, model):
    loaded, rows = load_model(model), rows_of(reference)
    submission = dict(read_rows(reference / "submission.csv")[1:])
    for film in read_film_plan(reference).films:
        if film.id in DAMAGED:
            continue
        wanted, row = predict(loaded, films / film.path)[0], rows[film.id]
        assert (int(row["rows"]), int(row["columns"])) == wanted.mask.shape
        assert np.array_equal(decode_rle(submission[film.id], *wanted.mask.shape), wanted.mask)
        png = cv2.imread(str(reference / "masks" / f"{film.name}.png"), cv2.IMREAD_UNCHANGED)
        assert np.array_equal(png, wanted.mask * np.uint8(255))
        assert int(row["area_px"]) == wanted.area_px
        assert float(row["share"]) == pytest.approx(wanted.mask.mean(), rel=1e-6)
        assert np.float32(row["top_score"]) == np.float32(wanted.top_score)  # every digit is kept
        probs = cv2.imread(str(reference / "probs" / f"{film.name}.png"), cv2.IMREAD_UNCHANGED)
        assert np.abs(probs / 255 - wanted.probability).max() <= 0.5 / 255 + 1e-6


@pytest.mark.parametrize("tasks", [2, 7])
def test_the_number_of_tasks_changes_no_byte(reference, films, model, tmp_path, tasks):
    assert answers(run(tmp_path, films, model, EVERYTHING, tasks=tasks)) == answers(reference)


@pytest.mark.parametrize(
    "overrides", [["infer.batch_size=1"], ["infer.batch_size=3", "infer.part_size=5", "train.amp=off"]]
)
def test_batch_and_part_size_change_no_answer(reference, films, model, tmp_path, overrides):
    outputs, expected = answers(run(tmp_path, films, model, EVERYTHING, *overrides)), answers(reference)
    outputs.pop("plan.json"), expected.pop("plan.json")  # it contains the part size
    assert outputs == expected and torch.backends.cudnn.allow_tf32 == ("train.amp=off" not in overrides)


def test_the_order_of_files_and_their_place_change_no_answer(reference, films, model, tmp_path):
    copied = tmp_path / "copied"
    for path in sorted(films.rglob("*"), reverse=True):
        if path.is_file():
            target = copied / path.relative_to(films)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
    assert answers(run(tmp_path / "run", copied, model, EVERYTHING)) == answers(reference)


def test_finished_parts_are_kept_and_what_died_is_done_again(reference, films, model, tmp_path):
    out = run(tmp_path, films, model, EVERYTHING, tasks=2, merge=False)
    kept = out / "parts" / "part-00000" / "part.json"
    before = kept.stat().st_mtime_ns
    shutil.rmtree(out / "parts" / "part-00001")  # never finished
    stale = out / "parts" / ".part-00001.dead-node.77"
    stale.mkdir()
    (stale / "half.png").write_bytes(b"half")
    empty = next((out / "parts" / "part-00002" / "masks").iterdir())
    empty.write_bytes(b"")  # a node lost power
    assert answers(run(tmp_path, films, model, EVERYTHING, tasks=3)) == answers(reference)
    assert kept.stat().st_mtime_ns == before and not stale.exists()


def test_a_stop_keeps_finished_batches_and_the_same_command_goes_on(reference, films, model, tmp_path):
    words = [EVERYTHING, "infer.part_size=12", "infer.batch_size=2"]
    one = task(tmp_path, "infer", [f"infer.dir={films}", f"infer.models={model}", "infer.label=it", *words])
    folder = tmp_path / "infer" / "it" / "parts"
    original, finished = parts.append_batch, []

    def append_and_stop(working, rows):
        original(working, rows)
        finished.append(rows)
        one.stop.note(signal.SIGTERM)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pneumo_dist.inference.stream.append_batch", append_and_stop)
        with pytest.raises(Stopped):
            infer.infer_parts(one)
        assert 1 <= len(finished) < 6 and not list(folder.glob("part-*"))
        (working,) = folder.glob(".part-00000.*")
        with (working / parts.JOURNAL).open("a") as journal:
            journal.write('[{"film": "to')  # a node lost power
        assert rows_of(run(tmp_path, films, model, *words)) == rows_of(reference)
    assert len(finished) == 6  # no batch twice
    assert not list(folder.glob("*/batches.jsonl"))


@pytest.mark.parametrize(
    "tail", [b'[{"film": "to', b"[\xff", b"\0\0\0\0\n", b"5\n", b"[]\n", b'{"a": 1}\n', b"[{}]\n", b'[{"files": 3}]\n']
)
def test_a_journal_ends_where_it_is_damaged(tmp_path, tail):
    working, batch = parts.begin_part(tmp_path, 0, "signature")[0], [{"film": "a", "files": {}}]
    parts.append_batch(working, batch)
    with (working / parts.JOURNAL).open("ab") as journal:
        journal.write(tail)
    assert parts.begin_part(tmp_path, 0, "signature")[1] == [batch]


def test_a_film_that_kills_its_decoder_costs_one_row(reference, films, model, tmp_path, monkeypatch):
    read = reading.read_film

    def deadly(path, max_pixels):
        if path.name == "c.dcm":
            os.kill(os.getpid(), signal.SIGKILL)
        return read(path, max_pixels)

    monkeypatch.setattr(reading, "read_film", deadly)  # the readers are forked from here
    rows, wanted = rows_of(run(tmp_path, films, model, EVERYTHING)), rows_of(reference)
    assert rows["c"]["status"] == "unreadable" and rows["c"]["reason"] == "the decoder crashed"
    assert all(rows[name] == wanted[name] for name in wanted if name != "c")


def test_a_film_on_which_the_decoder_hangs_costs_one_row(films, model, tmp_path, monkeypatch):
    read = reading.read_film

    def slow(path, max_pixels):
        if path.name == "b.dcm":
            signal.pause()
        return read(path, max_pixels)

    monkeypatch.setattr(reading, "read_film", slow)
    monkeypatch.setattr(processes, "TIMEOUT_S", 2.0)
    rows = rows_of(run(tmp_path, films, model))
    assert rows["b"]["reason"] == "not decoded within 2 s"
    assert {name for name, row in rows.items() if row["status"] == "ok"} == READABLE - {"b"}


def test_no_patient_name_or_id_in_anything_but_the_dicom_seg(reference, caplog):
    words = [SECRET.encode(), PATIENT.encode(), PATIENT.split("^")[0].encode()]
    for name, data in answers(reference).items():
        assert name.startswith("seg/") or not any(word in data for word in words), name
    for path in (reference / "parts").rglob("*.json"):
        assert not any(word in path.read_bytes() for word in words)
    assert not any(word.decode() in caplog.text for word in words)


def test_ids_are_stems_and_paths_where_stems_repeat_and_files_get_safe_names(reference):
    plan = read_film_plan(reference)
    assert [film.id for film in plan.films] == sorted(READABLE | DAMAGED)
    names = {film.id: film.name for film in plan.films}
    assert names["a"] == "a" and names["sub/twin.dcm"].startswith("sub_twin.dcm-")
    assert (
        file_name("a b") != file_name("a_b") and "/" not in file_name("../x") and not file_name("../x").startswith(".")
    )
    assert len(file_name("x" * 300)) <= 120


def test_the_ensemble_of_two_models_of_two_sizes_is_their_mean(films, model, tmp_path):
    second = write_model(tmp_path / "second.pt", seed=4, size=64, triplet={**RULE, "min_area": 100})
    out = run(tmp_path / "run", films, model, f"infer.models={model},{second}", "infer.outputs=csv,probs")
    one, two = (predict(path, films / "d.dcm")[0].probability for path in (model, second))
    probs = cv2.imread(str(out / "probs" / "d.png"), cv2.IMREAD_UNCHANGED)
    assert np.abs(probs / 255 - (one + two) / 2).max() <= 0.5 / 255 + 1e-6
    settings = json.loads((out / "inference.json").read_text())
    assert settings["triplet"]["min_area"] == 150 and settings["triplet_from"] == "median over the model files"
    assert len(settings["models"]) == 2 and settings["sizes"] == [32, 64]


def test_a_runs_folds_use_the_pooled_triplet(films, tmp_path):
    for fold, area in ((0, 100), (1, 300)):
        write_model(tmp_path / f"fold{fold}" / "model.pt", seed=fold, triplet={**RULE, "min_area": area})
    (tmp_path / "evaluate").mkdir()
    (tmp_path / "evaluate" / "thresholds.json").write_text(json.dumps({"triplet": {**RULE, "min_area": 777}}))
    words = [f"infer.dir={films}", "infer.label=it", "infer.part_size=50"]
    infer.infer_parts(task(tmp_path, "infer", words))
    infer.merge(task(tmp_path, "merge", words))
    settings = json.loads((tmp_path / "infer" / "it" / "inference.json").read_text())
    assert settings["triplet"]["min_area"] == 777 and settings["triplet_from"] == "pooled out-of-fold evaluation"


def test_another_tta_than_the_stored_one_warns(films, model, tmp_path, caplog):
    run(tmp_path, films, model, "infer.tta=none")
    assert "infer.tta=none is not what the models' thresholds were tuned with (hflip)" in caplog.text


def test_a_given_triplet_decides_in_place_of_the_stored_one_and_warns(films, model, tmp_path, caplog):
    out = run(tmp_path, films, model, "infer.triplet=0.0,0,0.05", "infer.outputs=csv,masks")
    assert "infer.triplet replaces what the models store" in caplog.text
    rule = Triplet(0.0, 0, 0.05)
    wide = predict(model, films / "d.dcm")[0].probability
    mask = cv2.imread(str(out / "masks" / "d.png"), cv2.IMREAD_UNCHANGED) > 0
    assert np.array_equal(mask, apply_triplet(wide, rule)) and mask.any()
    settings = json.loads((out / "inference.json").read_text())
    assert settings["triplet"] == asdict(rule) and settings["triplet_from"] == "infer.triplet"
    for wrong in ("0.5,100", "2,0,0.5", "0.5,1.5,0.5", "0.5,-1,0.5"):
        with pytest.raises(ConfigError, match="infer.triplet"):
            task(tmp_path, "infer", [f"infer.triplet={wrong}"])


@pytest.mark.parametrize("damage", ["gap", "twice", "foreign", "missing part", "other model"])
def test_merge_refuses(films, model, tmp_path, damage):
    own = tmp_path / "model.pt"
    shutil.copyfile(model, own)
    out = run(tmp_path, films, own, merge=False)
    path = out / "parts" / "part-00001" / "part.json"
    part = json.loads(path.read_text())
    wanted = {
        "gap": "films have no row",
        "twice": "have two rows",
        "foreign": "not in the plan",
        "missing part": "1 of 3 parts are missing (1)",
        "other model": "made with other models",
    }[damage]
    if damage == "gap":
        part["rows"].pop()
    elif damage == "twice":
        part["rows"].append(part["rows"][0])
    elif damage == "foreign":
        part["rows"].append({**part["rows"][0], "film": "stranger"})
    elif damage == "missing part":
        path.unlink()
    else:
        write_model(own, seed=9, triplet=RULE)
    if damage in ("gap", "twice", "foreign"):
        path.write_text(json.dumps(part))
    with pytest.raises(ConfigError) as error:
        infer.merge(task(tmp_path, "merge", [f"infer.dir={films}", f"infer.models={own}", "infer.label=it"]))
    assert wanted in str(error.value) and "\n" not in str(error.value)


def test_a_new_model_or_output_redoes_the_parts_and_leaves_no_old_file(films, model, tmp_path):
    out = run(tmp_path, films, model, "infer.outputs=csv,masks,overlays")
    run(tmp_path, films, model, "infer.outputs=csv,masks")
    assert (out / "masks").exists() and not (out / "overlays").exists()
    before = answers(out)
    other = write_model(tmp_path / "other.pt", seed=8, triplet=RULE)
    assert answers(run(tmp_path, films, other, "infer.outputs=csv,masks"))["submission.csv"] != before["submission.csv"]


def test_a_plan_in_place_is_kept_with_its_date_and_a_grown_folder_makes_a_new_one(films, tmp_path, monkeypatch):
    folder = tmp_path / "grown"
    shutil.copytree(films, folder)
    words = [f"infer.dir={folder}", "infer.label=it"]
    one = task(tmp_path, "infer", words)
    first = write_film_plan(one.run, nodes=4)
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1800000000")
    assert first.parts == 4 and write_film_plan(one.run, nodes=2) == first == read_film_plan(one.out)
    write_dicom(folder / "new.dcm", picture(3))
    grown = write_film_plan(one.run)
    assert grown.created == 1800000000 and grown.part_size == 3  # whole parts are kept
    monkeypatch.setattr(film_plan, "MANY", 1)
    assert film_plan.make_film_plan(one.run, existing=first).parts == 1  # 5 parts of 3 would be too many
    with pytest.raises(ConfigError, match="infer.part_size"):
        infer.infer_parts(task(tmp_path, "infer", [*words, "infer.part_size=5"]))


def test_films_that_came_later_redo_only_the_parts_they_are_in(films, model, tmp_path):
    folder = tmp_path / "grown"
    shutil.copytree(films, folder)
    out = run(tmp_path, folder, model)
    first = out / "parts" / "part-00000" / "part.json"
    before, count = first.stat().st_mtime_ns, len(rows_of(out))
    write_dicom(folder / "zz.dcm", picture(3))
    words = [f"infer.dir={folder}", f"infer.models={model}", "infer.label=it", "infer.part_size=4"]
    late = task(tmp_path, "merge", words, inputs={"films": "the listing has another hash now"})
    with pytest.raises(ConfigError, match="have changed since they were planned"):
        infer.merge(late)
    assert len(rows_of(run(tmp_path, folder, model))) == count + 1
    assert first.stat().st_mtime_ns == before
    (folder / "zz.dcm").unlink()
    assert len(rows_of(run(tmp_path, folder, model))) == count
    assert len(list((out / "parts").iterdir())) == 3


def test_the_same_command_reads_what_had_no_decoder_once_one_is_installed(model, tmp_path, monkeypatch):
    folder, pixels = tmp_path / "films", picture(3)
    write_dicom(folder / "plain.dcm", picture(4))
    (folder / "lossless.dcm").write_bytes(streamed_bytes(pixels, lossless_jpeg(pixels, 8), JPEGLosslessSV1))

    def absent(_):
        raise ImportError

    words = [f"infer.dir={folder}", f"infer.models={model}", "infer.label=it", "infer.part_size=4"]
    merged = task(tmp_path, "merge", words)
    with monkeypatch.context() as patch:
        patch.setitem(codecs.DECODERS, codecs.LOSSLESS, (("python-gdcm", absent),))
        patch.setattr(codecs, "installed", lambda: ["simplejpeg"])
        rows = rows_of(run(tmp_path, folder, model))
        assert rows["lossless"]["reason"] == "no decoder for lossless JPEG: install python-gdcm"
        inputs = done.inputs_of(merged.run, "merge", None)
        done.write_done(replace(merged, settings=done.settings_of(merged.config, "merge"), inputs=inputs), {})
        assert inputs["codecs"] == "simplejpeg" and done.differences(merged.run, "merge", None) == []
    assert done.differences(merged.run, "merge", None) is None
    out = run(tmp_path, folder, model)
    assert {row["status"] for row in rows_of(out).values()} == {"ok"}
    part = out / "parts" / "part-00000" / "part.json"
    before = part.read_bytes()
    monkeypatch.setattr(grey, "VERSION", "another")
    assert done.differences(merged.run, "merge", None) == ["codecs", "grey_mapping"]
    run(tmp_path, folder, model)
    assert part.read_bytes() != before


def test_check_source_says_what_is_missing(films, model, tmp_path):
    def check(*words):
        return check_films(task(tmp_path, "infer", list(words)).run)

    assert check(f"infer.dir={films}") == "12 films in 1 parts, 1 other files ignored"
    (tmp_path / "nothing").mkdir()
    for words, wanted in [
        ((f"infer.dir={tmp_path / 'gone'}",), "is not a folder"),
        ((f"infer.dir={tmp_path / 'nothing'}",), "contains no films"),
        ((), "give infer.dir=DIR"),
        ((f"infer.dir={films}", f"infer.models={tmp_path / 'gone.pt'}"), "gone.pt does not exist"),
    ]:
        with pytest.raises(ConfigError) as error:
            check(*words)
        assert wanted in str(error.value)


def test_planning_and_merging_import_no_torch():
    import subprocess
    import sys

    program = "import sys, pneumo_dist.inference.infer; print([m for m in ('torch', 'cv2') if m in sys.modules])"
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"

"""The preprocessing job end to end: audit, quarantine, restart, changed sources, verification."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from pneumo_dist import config as configuration
from pneumo_dist.config import ConfigError
from pneumo_dist.data.cases import read_cases
from pneumo_dist.data.films import grey as mapping
from pneumo_dist.data.films.dicom import read_film
from pneumo_dist.data.films.rle import decode_rle
from pneumo_dist.data.preprocess import decoding, preprocess
from pneumo_dist.data.preprocess.finalize import finalize
from pneumo_dist.data.preprocess.manifest import clear, verify
from pneumo_dist.data.preprocess.source import check_source, read_source
from pneumo_dist.data.shards import ShardReader, masks_to_sizes, to_size
from pneumo_dist.done import inputs_of
from pneumo_dist.run import Run
from pneumo_dist.runtime import processes
from pneumo_dist.runtime.stopping import Stopped
from pneumo_dist.runtime.task import Task
from tests.film_files import dataset, film_bytes, grey, overrides, small_set, written

REAL = Path(os.environ.get("PNEUMO_REAL_DATA", Path(__file__).resolve().parents[3] / "shared" / "data"))
needs_real_films = pytest.mark.skipif(not REAL.is_dir(), reason=f"no real films in {REAL} (PNEUMO_REAL_DATA)")
SMALL = ["data.shards=3", "data.folds=2", "data.workers=2", "stage1.size=32", "stage2.size=64"]


def task(run_dir: Path, settings: dict[str, str], *more: str, part: tuple[int, int] = (0, 1)) -> Task:
    config = configuration.load(None, [*overrides(settings), *SMALL, *more])
    return Task(run=Run(run_dir, config), stage="preprocess", part=part)


def preprocessed(run_dir: Path, settings: dict[str, str], *more: str, parts: int = 1) -> dict[str, Path]:
    for i in range(parts):
        preprocess.write_shards(task(run_dir, settings, *more, part=(i, parts)))
    return finalize(task(run_dir, settings, *more))


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def films(tmp_path_factory):
    """A set of 12 films, one of them not annotated; tests that change it copy it."""
    folder = tmp_path_factory.mktemp("films")
    return folder, small_set(folder)


@pytest.fixture(scope="module")
def done(films, tmp_path_factory):
    """The shards of an undisturbed run over `films`."""
    run_dir = tmp_path_factory.mktemp("run")
    outputs = preprocessed(run_dir, films[1])
    return run_dir / "shards", outputs


def copied(films, tmp_path: Path) -> tuple[Path, dict[str, str]]:
    folder = Path(shutil.copytree(films[0], tmp_path / "films"))
    return folder, {key: value.replace(str(films[0]), str(folder)) for key, value in films[1].items()}


def dicoms(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.dcm"), key=lambda path: path.stem)


def test_shards_hold_every_annotated_film_and_its_mask_in_all_sizes(films, done):
    folder, _ = done
    cases = read_cases(folder)
    assert len(cases) == 11 and [case.id for case in cases] == sorted(case.id for case in cases)
    paths = {path.stem: path for path in dicoms(films[0])}
    for size in (32, 64):
        reader = ShardReader(folder, size)
        for case in cases:
            film = read_film(paths[case.id])
            assert np.array_equal(reader.image(case.shard, case.row), to_size(film.pixels, size))
            mask = decode_rle(case.rle, case.rows, case.columns)
            assert np.array_equal(reader.mask(case.shard, case.row), masks_to_sizes(mask, [size])[size])
            assert case.label == int(mask.any())
    assert {case.shard for case in cases} == {0, 1, 2}


def test_outputs_name_the_cases_the_audit_and_one_manifest_per_size(done):
    folder, outputs = done
    assert {name: path.name for name, path in outputs.items()} == {
        "cases": "cases.csv",
        "audit": "audit.json",
        "manifest": "manifest.json",
        "manifest-32": "manifest-32.json",
        "manifest-64": "manifest-64.json",
    }
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["sizes"] == [32, 64] and manifest["shards"] == 3
    part = manifest["parts"][0]
    assert len(part["ids"]) == len(part["source_sha256"]) == len(part["rows"]) == part["films"]
    assert part["decoders"] and all(len(value) == 64 for value in part["files"].values())
    assert (folder / "pictures" / "augmented.png").stat().st_size > 10_000


def test_the_directory_is_the_same_for_any_number_of_elements_workers_and_places(films, done, tmp_path):
    _folder, settings = copied(films, tmp_path)
    preprocessed(tmp_path / "run", settings, "data.workers=1", parts=5)
    assert content(tmp_path / "run" / "shards") == content(done[0])


def test_shards_of_another_grey_mapping_are_refused_with_the_two_ways_to_go_on(done, films, monkeypatch):
    run = task(done[0].parent, films[1]).run
    before = inputs_of(run, "preprocess", None)
    monkeypatch.setattr(mapping, "VERSION", "another")
    after = inputs_of(run, "preprocess", None)
    assert {key for key in after if after[key] != before.get(key)} == {"grey_mapping"}
    with pytest.raises(ConfigError, match="grey mapping has changed since .* --redo, or set data.shard_dir=DIR"):
        preprocessed(done[0].parent, films[1])


def test_no_patient_no_time_and_no_absolute_path_is_in_the_directory(films, done):
    keys = {line.split(",")[1] for line in Path(films[1]["data.patient_map"]).read_text().split()[1:]}
    for name, data in content(done[0]).items():
        if name.endswith((".json", ".csv", ".txt")):
            for forbidden in (*keys, "PHANTOM-", str(films[0]), os.uname().nodename):
                assert forbidden.encode() not in data, (name, forbidden)


def test_a_repeat_writes_no_shard_again(films, tmp_path):
    preprocessed(tmp_path, films[1])
    stamps = {p: p.stat().st_mtime_ns for p in (tmp_path / "shards").glob("*-of-*")}
    preprocessed(tmp_path, films[1], parts=2)
    assert stamps == {p: p.stat().st_mtime_ns for p in (tmp_path / "shards").glob("*-of-*")}


def test_a_new_size_adds_files_and_a_manifest_and_rewrites_none(films, tmp_path):
    before = preprocessed(tmp_path, films[1], "stages=1,swa")
    assert set(before) == {"cases", "audit", "manifest", "manifest-32"}
    old = content(tmp_path / "shards")
    stamps = {p: p.stat().st_mtime_ns for p in (tmp_path / "shards").glob("*-of-*")}
    preprocessed(tmp_path, films[1])
    new = content(tmp_path / "shards")
    assert all(p.stat().st_mtime_ns == stamp for p, stamp in stamps.items())
    assert {name for name in old if new[name] != old[name]} == {"manifest.json"}
    assert "manifest-64.json" in new and not verify(tmp_path / "shards")


def test_a_new_size_may_come_from_a_version_with_other_wordings(films, tmp_path):
    folder, settings = copied(films, tmp_path)
    dicoms(folder)[1].write_bytes(b"")
    preprocessed(tmp_path, settings, "stages=1,swa", "data.max_bad=0.5")
    (path,) = [p for p in (tmp_path / "shards").glob("films-*") if json.loads(p.read_text())["bad"]]
    listing = json.loads(path.read_text())
    listing["bad"][0]["reason"], listing["films"][0]["decoder"] = "nothing in it", "another"
    listing["films"][0]["warnings"] = ["odd"]
    path.write_text(json.dumps(listing))
    preprocessed(tmp_path, settings, "data.max_bad=0.5")
    assert not verify(tmp_path / "shards")
    listing["films"][0]["sha256"] = "another file"
    path.write_text(json.dumps(listing))
    for size in (tmp_path / "shards").glob("size-64-*"):
        size.unlink()
    with pytest.raises(ConfigError, match="films of shard . have changed"):
        preprocessed(tmp_path, settings, "data.max_bad=0.5")


def test_another_number_of_folds_needs_the_closing_job_only(films, tmp_path):
    preprocessed(tmp_path, films[1])
    stamps = {p: p.stat().st_mtime_ns for p in (tmp_path / "shards").glob("*-of-*")}
    finalize(task(tmp_path, films[1], "data.folds=4"))
    assert {case.fold for case in read_cases(tmp_path / "shards")} == {0, 1, 2, 3}
    assert stamps == {p: p.stat().st_mtime_ns for p in (tmp_path / "shards").glob("*-of-*")}


def test_half_written_shards_and_leftovers_are_redone(films, done, tmp_path):
    out = Path(shutil.copytree(done[0], tmp_path / "shards"))
    for name in ("cases.csv", "audit.json", "audit.txt", "manifest.json", "size-64-00001-of-00003.json"):
        (out / name).unlink()
    (out / "images-64-00001-of-00003.npy").write_bytes(b"half")
    (out / ".images-64-00001-of-00003.0123abcd.tmp.npy").write_bytes(b"left by a killed writer")
    (out / ".cases.0123abcd.tmp.csv").write_bytes(b"left by a killed writer")
    preprocessed(tmp_path, films[1])
    assert content(out) == content(done[0])


def test_more_shards_than_films_leave_none_empty(films, tmp_path):
    preprocessed(tmp_path, films[1], "data.shards=64")
    cases = read_cases(tmp_path / "shards")
    assert sorted(case.shard for case in cases) == list(range(11))


@pytest.fixture()
def dirty(films, tmp_path):
    """A set with everything that is wrong in real ones."""
    folder, settings = copied(films, tmp_path)
    paths = dicoms(folder)
    annotated = Path(settings["data.rle_csv"]).read_text()
    ids = [path.stem for path in paths if path.stem in annotated]
    negative = [name for name in ids if f"{name}, -1" in annotated]
    by_id = {path.stem: path for path in paths}
    by_id[ids[0]].write_bytes(by_id[ids[0]].read_bytes()[:700])  # truncated
    by_id[ids[1]].write_bytes(film_bytes(grey(64, 64), NumberOfFrames=3))  # multi-frame
    twin = next(name for name in negative if name not in ids[:5])
    (folder / "dicom-images-train" / "twin.dcm").write_bytes(by_id[twin].read_bytes())
    (folder / "dicom-images-train" / "notes.txt").write_text("no film")
    rows = [
        "orphan, -1",  # no such film
        "twin, 5 5",  # the same pixels with another mask
        f"{ids[3]}, 1 2 3",  # odd number of values
        f"{ids[4]}, 4000 500",  # past the end
    ]
    path = Path(settings["data.rle_csv"])
    path.write_text(annotated + "\n".join(rows) + "\n")
    return folder, settings, ids, twin, annotated.count("\n")


def test_every_defect_is_in_the_audit_and_stops_nothing_within_max_bad(dirty, tmp_path):
    _folder, settings, ids, twin, lines = dirty
    preprocessed(tmp_path, settings, "data.max_bad=0.4")
    audit = json.loads((tmp_path / "shards" / "audit.json").read_text())
    reasons = {film["id"]: film["reason"] for film in audit["unreadable"]}
    assert set(reasons) == {ids[0], ids[1], ids[3], ids[4]}
    assert "multi-frame image (3 frames)" in reasons[ids[1]]
    assert f"train-rle.csv:{lines + 3}: odd number of values" in reasons[ids[3]]
    assert f"train-rle.csv:{lines + 4}: the runs end" in reasons[ids[4]] and "past the 64 x 64 film" in reasons[ids[4]]
    assert audit["orphans"] == [f"train-rle.csv:{lines + 1}: orphan"]
    assert audit["duplicates"] == [{"ids": [twin, "twin"], "masks_agree": False}]
    assert audit["films"]["found"] == 13 and audit["films"]["in_shards"] == 8 and audit["films"]["other_files"] == 1
    assert [list(file) for file in audit["ignored"]] == [["path", "reason"]]
    assert len(audit["unannotated"]["ids"]) == 1 and audit["annotations"]["several_rows"] >= 1
    assert audit["folds"]["level"] == "patient"
    cases = {case.id: case for case in read_cases(tmp_path / "shards")}
    assert cases["twin"].group == cases[twin].group and cases["twin"].fold == cases[twin].fold
    text = (tmp_path / "shards" / "audit.txt").read_text()
    for part in (
        "rows per image",
        "masks DIFFER",
        "Rows without a film: 1",
        "Unusable films: 4",
        "Ignored files: 1",
        "patient-level",
    ):
        assert part in text
    assert not verify(tmp_path / "shards")


def test_more_bad_films_than_max_bad_fail_and_name_the_first(dirty, tmp_path):
    _folder, settings, ids, *_ = dirty
    with pytest.raises(ConfigError, match=r"films are unusable, more than data.max_bad=0.01 allows \(0\)") as caught:
        preprocessed(tmp_path, settings)
    assert f"{ids[0]}.dcm" in str(caught.value)


@pytest.mark.parametrize(("policy", "films_in"), [("drop", 11), ("negative", 12)])
def test_unannotated_films_are_dropped_or_negative(films, tmp_path, policy, films_in):
    preprocessed(tmp_path, films[1], f"data.unannotated={policy}")
    cases = read_cases(tmp_path / "shards")
    assert len(cases) == films_in
    audit = json.loads((tmp_path / "shards" / "audit.json").read_text())
    assert audit["unannotated"]["policy"] == policy and len(audit["unannotated"]["ids"]) == 1
    assert audit["films"]["found"] == 12


def test_unannotated_films_are_an_error_if_asked_for(films, tmp_path):
    with pytest.raises(ConfigError, match="1 films have no row in .* data.unannotated=drop or negative"):
        check_source(task(tmp_path, films[1], "data.unannotated=error").run)


def test_without_a_patient_map_folds_are_said_to_be_image_level(films, tmp_path, caplog):
    settings = {key: value for key, value in films[1].items() if key != "data.patient_map"}
    preprocessed(tmp_path, settings)
    audit = json.loads((tmp_path / "shards" / "audit.json").read_text())
    assert audit["folds"]["level"] == "image" and not audit["patients"]["map"]
    assert "IMAGE-LEVEL" in (tmp_path / "shards" / "audit.txt").read_text() and "IMAGE-LEVEL" in caplog.text


def test_held_out_films_take_their_patients_with_them(films, tmp_path):
    rows = [line.split(",") for line in Path(films[1]["data.patient_map"]).read_text().split()[1:]]
    keys = [key for _, key in rows]
    key = next(key for key in keys if keys.count(key) >= 2)
    members = [name for name, other in rows if other == key]
    listed = tmp_path / "holdout.txt"
    listed.write_text(members[0] + "\nunknown\n")
    preprocessed(tmp_path, films[1], f"data.holdout_ids={listed}")
    cases = read_cases(tmp_path / "shards")
    assert {case.id for case in cases if case.fold == -1} == set(members) & {case.id for case in cases}
    holdout = json.loads((tmp_path / "shards" / "audit.json").read_text())["holdout"]
    assert holdout["listed"] == 2 and holdout["unknown"] == 1 and holdout["added_with_their_patients"] >= 1


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ("film", "the file of film .* has changed"),
        ("annotation", "films or annotations of shard 0 have changed|annotation or path of film"),
        ("new film", "changed"),
        ("gone film", "changed"),
    ],
)
def test_a_changed_source_is_noticed(films, tmp_path, change, reason):
    folder, settings = copied(films, tmp_path)
    preprocessed(tmp_path, settings)
    first = dicoms(folder)[0]
    rle = Path(settings["data.rle_csv"])
    if change == "film":
        data = bytearray(first.read_bytes())
        data[-30] ^= 1  # one bit, the size stays
        first.write_bytes(data)
    elif change == "annotation":
        rle.write_text(rle.read_text().replace(f"{first.stem}, -1", f"{first.stem}, 5 5") + f"{first.stem}, 3 3\n")
    elif change == "new film":
        (folder / "dicom-images-train" / "0.dcm").write_bytes(first.read_bytes())
        rle.write_text(rle.read_text() + "0, -1\n")
    else:
        first.unlink()
    for again in (preprocess.write_shards, finalize):
        if change == "film" and again is preprocess.write_shards:
            continue  # finished shards are not read again; the closing job hashes every source
        with pytest.raises(ConfigError, match=reason):
            again(task(tmp_path, settings))


def test_finalize_names_the_missing_shards(films, tmp_path):
    preprocess.write_shards(task(tmp_path, films[1], part=(1, 3)))
    with pytest.raises(ConfigError, match=r"2 of 3 shards are missing \(0, 2\): repeat --stage preprocess"):
        finalize(task(tmp_path, films[1]))


@pytest.mark.parametrize("problem", ["twice", "foreign", "missing"])
def test_finalize_refuses_shards_with_other_films_than_the_source(films, done, tmp_path, problem):
    out = Path(shutil.copytree(done[0], tmp_path / "shards"))
    path = out / "films-00001-of-00003.json"
    listing = json.loads(path.read_text())
    if problem == "twice":
        listing["films"][1] = listing["films"][0]
    elif problem == "foreign":
        listing["films"][0]["id"] = "somebody else's"
    else:
        del listing["films"][0]
    path.write_text(json.dumps(listing))
    with pytest.raises(ConfigError, match=rf"films are {problem} in the shards"):
        finalize(task(tmp_path, films[1]))


def test_finalize_refuses_a_cut_shard_and_shards_of_another_division(films, done, tmp_path):
    out = Path(shutil.copytree(done[0], tmp_path / "shards"))
    stray = out / "images-64-00000-of-00007.npy"
    stray.write_bytes(b"")
    with pytest.raises(ConfigError, match="belongs to another division into shards"):
        finalize(task(tmp_path, films[1]))
    stray.unlink()
    os.truncate(out / "images-64-00002-of-00003.npy", 1000)
    with pytest.raises(ConfigError, match="missing or truncated"):
        finalize(task(tmp_path, films[1]))


def test_verify_finds_a_flipped_bit_a_missing_and_a_foreign_file(done, tmp_path):
    out = Path(shutil.copytree(done[0], tmp_path / "shards"))
    assert verify(out) == []
    target = out / "images-64-00002-of-00003.npy"
    data = bytearray(target.read_bytes())
    data[-1] ^= 1
    target.write_bytes(data)
    (out / "masks-32-00000-of-00003.npy").unlink()
    (out / "images-32-00000-of-00007.npy").write_bytes(b"")
    problems = verify(out)
    assert len(problems) == 3
    for name, problem in zip(("masks-32", "images-64", "00007"), problems, strict=False):
        assert any(name in line for line in problems), problem
    with pytest.raises(ConfigError, match="no finished shards"):
        verify(tmp_path)


def test_a_crashing_and_a_hanging_decoder_cost_one_film_each(films, tmp_path, monkeypatch):
    folder, settings = copied(films, tmp_path)
    crash, hang = (path for path in dicoms(folder)[2:4])
    parse = decoding.parse_film
    marks = {crash.read_bytes(): "crash", hang.read_bytes(): "hang"}

    def treacherous(data, *rest):
        if marks.get(data) == "crash":
            os.kill(os.getpid(), signal.SIGKILL)
        if marks.get(data) == "hang":
            time.sleep(60)
        return parse(data, *rest)

    monkeypatch.setattr(decoding, "parse_film", treacherous)
    monkeypatch.setattr(processes, "TIMEOUT_S", 0.7)
    preprocessed(tmp_path, settings, "data.max_bad=0.5")
    audit = json.loads((tmp_path / "shards" / "audit.json").read_text())
    reasons = {film["id"]: film["reason"] for film in audit["unreadable"]}
    assert reasons[crash.stem] == "the decoder crashed" and "not decoded within" in reasons[hang.stem]
    assert len(reasons) == 2 and audit["films"]["in_shards"] == 9


def test_a_stop_between_films_leaves_finished_shards_and_nothing_half(films, done, tmp_path):
    stopped = task(tmp_path, films[1])
    check, calls = stopped.stop.check, []

    def after_six():
        calls.append(1)
        if len(calls) == 7:
            stopped.stop.note(10)
        check()

    stopped.stop.check = after_six
    with pytest.raises(Stopped):
        preprocess.write_shards(stopped)
    left = set(content(tmp_path / "shards"))
    assert "size-64-00000-of-00003.json" in left and not any("00002-of" in n or ".tmp" in n for n in left)
    preprocessed(tmp_path, films[1])
    assert content(tmp_path / "shards") == content(done[0])


def test_a_full_disk_is_one_line_and_leaves_no_half_shard(films, tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (12_000, before[1]))
    try:
        with pytest.raises(ConfigError, match="cannot write the shards .* free disk space or set data.shard_dir"):
            preprocess.write_shards(task(tmp_path, films[1], "data.shards=1"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert content(tmp_path / "shards") == {}


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"data.dicom_dir": "/nowhere"}, "data.dicom_dir=/nowhere: no such folder"),
        ({"data.rle_csv": "/nowhere.csv"}, "data.rle_csv=/nowhere.csv: no such file"),
        ({"data.dicom_dir": "EMPTY"}, "no film in it"),
        ({"data.rle_csv": "OTHER"}, "no row belongs to any of the 12 films"),
        ({"data.patient_map": "OTHER"}, "not with ImageId,PatientKey"),
        ({"data.holdout_ids": "/nowhere.txt"}, "cannot read the list of ids"),
    ],
)
def test_submit_learns_beforehand_what_cannot_work(films, tmp_path, settings, reason):
    (tmp_path / "empty").mkdir()
    other = tmp_path / "other.csv"
    other.write_text("ImageId,EncodedPixels\nsomething,-1\n")
    names = {"EMPTY": str(tmp_path / "empty"), "OTHER": str(other)}
    changed = films[1] | {key: names.get(value, value) for key, value in settings.items()}
    check_source(task(tmp_path, films[1]).run)
    with pytest.raises(ConfigError, match=reason):
        check_source(task(tmp_path, changed).run)


def test_too_little_space_is_known_beforehand(films, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 10, 1000))
    with pytest.raises(ConfigError, match="GB free, but the shards need"):
        check_source(task(tmp_path, films[1]).run)


def test_clear_removes_our_files_and_no_others(done, tmp_path):
    out = Path(shutil.copytree(done[0], tmp_path / "shards"))
    (out / "mine.npy").write_bytes(b"")
    clear(out)
    assert set(content(out)) == {"mine.npy"}


@needs_real_films
def test_the_real_sample_has_its_known_counts_and_patient_level_folds(tmp_path):
    sample = REAL / "siim-sample"
    settings = {
        "data.dicom_dir": str(sample / "dicom-images-train"),
        "data.rle_csv": str(sample / "train-rle.csv"),
        "data.patient_map": str(sample / "patients.csv"),
    }
    preprocessed(tmp_path, settings, "data.workers=0")
    audit = json.loads((tmp_path / "shards" / "audit.json").read_text())
    films = audit["films"]
    assert (films["found"], films["in_shards"], films["positive"], films["unreadable"]) == (240, 235, 90, 0)
    assert len(audit["unannotated"]["ids"]) == 5 and films["sizes"] == {"1024 x 1024": 235}
    assert films["named_unlike_their_sop_uid"] == 0
    assert audit["folds"]["level"] == "patient" and audit["patients"]["films_without_patient"] == 0


def with_report(films, to: Path) -> dict[str, str]:
    """Copy the set and add a report, a DICOM object without an image, under the name of a film."""
    shutil.copytree(films[0], to)
    no_pixels = dict.fromkeys(("PixelData", "Rows", "Columns", "BitsAllocated"))
    report = dataset(np.zeros((8, 8), np.uint8), SOPClassUID="1.2.840.10008.5.1.4.1.1.88.11", **no_pixels)
    (to / "dicom-images-train" / "report.dcm").write_bytes(written(report, preamble=False))
    return {key: value.replace(str(films[0]), str(to)) for key, value in films[1].items()}


@pytest.mark.parametrize("policy", ["drop", "negative"])
def test_an_object_without_an_image_is_ignored_and_no_unusable_film(films, tmp_path, policy):
    settings = with_report(films, tmp_path / "films")
    preprocessed(tmp_path, settings, f"data.unannotated={policy}", "data.max_bad=0")
    audit = json.loads((tmp_path / "shards" / "audit.json").read_text())
    assert audit["ignored"] == [{"path": "report.dcm", "reason": "not an image (Basic Text SR Storage)"}]
    counts = {"found": 12, "other_files": 1, "in_shards": 11 + (policy == "negative"), "unreadable": 0}
    assert {name: audit["films"][name] for name in counts} == counts
    assert len(audit["unannotated"]["ids"]) == 1 and audit["unreadable"] == []
    assert not verify(tmp_path / "shards")


def test_an_object_without_an_image_needs_no_annotation(films, tmp_path):
    settings = with_report(films, tmp_path / "films")
    run = task(tmp_path, settings, "data.unannotated=error").run
    with pytest.raises(ConfigError, match=r"1 films have no row") as caught:
        read_source(run)
    assert "report" not in str(caught.value)
    with open(settings["data.rle_csv"], "a") as file:
        file.write("report,-1\n")  # the list takes it for a film
    with pytest.raises(ConfigError, match=r"1 of 12 films are unusable.*report.dcm: not an image"):
        preprocessed(tmp_path, settings, "data.max_bad=0")

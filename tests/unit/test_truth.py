"""What was asked is what ran: the records of a run agree, whatever is asked in which order. The stages are pretended."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path
from unittest import mock

import pytest

from launch.backends.prepare import ledger_entry, prepare
from launch.planning.arguments import parse
from launch.planning.plan import Plan, make_plan, missing_line
from launch.planning.site import choose_site
from launch.state.ledger import Ledger
from launch.submit import main
from pneumo_dist import config as configuration
from pneumo_dist import done, stages
from pneumo_dist.chain import OWN, closing
from pneumo_dist.config import Config, ConfigError
from pneumo_dist.inference.film_plan import write_film_plan
from pneumo_dist.run import Run
from pneumo_dist.runtime.files import sha256_text

RECIPE = "stages: ['1', '2']\ndata: {shards: 2}\nstage1: {size: 32}\nstage2: {size: 64}\n"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep what was parsed, and copy no code: hundreds of commands take a second."""
    load, parsed = configuration.load, {}

    def once(path: Path | None = None, overrides: list[str] | None = None, below: object = None) -> Config:
        key = (path and Path(path).read_text(), tuple(overrides or ()), str(below))
        if key not in parsed:
            parsed[key] = load(path, overrides, below)
        return parsed[key]

    monkeypatch.setattr(configuration, "load", once)
    monkeypatch.setattr("launch.state.codecopy.copy", lambda *_: Path("code"))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Films, csv, patient map and hold-out list, and the recipe."""
    folder = tmp_path / "data"
    (folder / "films").mkdir(parents=True)
    (folder / "films" / "a.png").write_bytes(b"x")
    for name, text in {
        "rle.csv": "ImageId,EncodedPixels\na,-1\n", "map.csv": "ImageId,PatientKey\na,1\n", "held.txt": "a\n",
        "recipe.yaml": RECIPE,
    }.items():  # fmt: skip
        (folder / name).write_text(text)
    return folder


def films(data: Path) -> list[str]:
    return [f"data.dicom_dir={data}/films", f"data.rle_csv={data}/rle.csv"]


def plan_of(root: Path, *words: str) -> Plan:
    return make_plan(parse([*words, f"run_root={root}"]))


def finish(run: Run, stage: str, fold: int | None) -> None:
    """Pretend that a job has run with the configuration of its submission: the outputs depend on all that it read."""
    stage = closing(stage)
    settings, inputs = done.settings_of(run.config, stage), done.inputs_of(run, stage, fold)
    digest = {"sha256": sha256_text(json.dumps([settings, inputs], sort_keys=True))}
    names = (
        ["cases", *(f"manifest-{size}" for size in run.config.sizes)] if stage == "finalize" else ["best", "records"]
    )
    run.dir_of(stage, fold).mkdir(parents=True, exist_ok=True)
    record = {"settings": settings, "inputs": inputs, "outputs": dict.fromkeys(names, digest)}
    run.done_file(stage, fold).write_text(json.dumps(record))


def carry_out(plan: Plan) -> bool:
    """Refuse the plan, or prepare and finish its jobs, as submit.py does; then every record must agree."""
    refused = bool(plan.conflicts or plan.missing)
    if not refused:
        prepare(plan)
        for node in plan.todo:
            if node.stage != "preprocess":
                finish(Run.of_job(plan.run.folder, node.key), node.stage, node.fold)
    if plan.run.config_file.exists():
        run = Run.load(plan.run.folder)
        for stage, fold in (("finalize", None), ("1", 0), ("2", 0)):
            # Results of an earlier division into folds keep their settings, and are refused by whoever reads them.
            differ = set(done.differences(run, stage, fold) or ()) & {*configuration.keys(), *done.SOURCES}
            assert differ <= set(OWN), "config.yaml and DONE.json disagree"
            record = done.read_done(run, stage, fold)
            job = "finalize" if stage == "finalize" else f"stage{stage}-fold{fold}"
            assert record is None or record["settings"] == done.settings_of(Run.of_job(run.folder, job).config, stage)
    return not refused


@pytest.mark.parametrize("setting", ["stage1.lr=0.5", "data.fold_seed=3"])
def test_records_agree_in_every_order_of_preprocess_map_stage_1_and_settings(
    data: Path, tmp_path: Path, setting: str
) -> None:
    words = {"map": f"data.patient_map={data}/map.csv", "setting": setting}
    # What is given with a command or before it is asked of that command, what is given last of the last stage again.
    for order in itertools.permutations(["preprocess", "map", "1", "setting"]):
        root = tmp_path / "runs"
        shutil.rmtree(root, ignore_errors=True)
        given: list[str] = [*films(data), "--config", f"{data}/recipe.yaml"]
        last = "1"
        asked: set[str] = set()
        for step in [*order, "again"]:
            if step in words:
                given.append(words[step])
                continue
            last = last if step == "again" else step
            plan = plan_of(root, "--stage", last, "--run", "a", *given)
            typed = {word for word in words.values() if word in given}
            if carry_out(plan):
                asked |= typed
                given = []
            else:
                for word in (words[name] for name in words if words[name] in given and plan.conflicts):
                    key, value = word.split("=")
                    if any(key in line for line in plan.conflicts):
                        assert any(f"now {value}" in line and f"{key}=" in line for line in plan.conflicts), order
                assert all("--redo" in line and "--run OTHER" in line for line in plan.conflicts), order
                given = [] if last == "1" and plan.conflicts else given
        # Without words nothing is left to do, and no setting is refused that nobody typed.
        for stage in ("preprocess", "1"):
            plan = plan_of(root, "--stage", stage, "--run", "a")
            assert not plan.conflicts and (not plan.todo or plan.missing or stage == "1"), order
        record = done.read_done(Run.load(root / "a"), "finalize", None)
        assert record is not None
        assert ("patient_map" in record["inputs"]) == (words["map"] in asked), order
        assert f"patient_map: {data}" in (root / "a" / "config.yaml").read_text() or words["map"] not in asked, order


@pytest.fixture
def root(data: Path, tmp_path: Path) -> Path:
    """A run whose shards and stage 1 are done."""
    for stage in ("preprocess", "1"):
        words = ["--config", f"{data}/recipe.yaml", *films(data)] if stage == "preprocess" else []
        assert carry_out(plan_of(tmp_path, "--stage", stage, "--run", "a", *words))
    return tmp_path


def conflicts(root: Path, *words: str) -> str:
    return "\n".join(plan_of(root, "--run", "a", *words).conflicts)


def test_later_stages_refuse_what_the_shards_were_not_made_with(data: Path, root: Path) -> None:
    said = conflicts(root, "--stage", "2", f"data.holdout_ids={data}/held.txt")
    assert f"data.holdout_ids=null, now {data}/held.txt" in said and "--stage preprocess --redo" in said
    assert "data.folds=5, now 3" in conflicts(root, "--stage", "2", "data.folds=3")
    (data / "rle.csv").write_text("ImageId,EncodedPixels\na,1 2\n")
    assert f"the content of data.rle_csv={data}/rle.csv has changed" in conflicts(root, "--stage", "2")
    (data / "rle.csv").unlink()  # shards do not need it any more
    shutil.rmtree(data / "films")
    assert not conflicts(root, "--stage", "2")
    assert "data.rle_csv=/none.csv: cannot be read" in conflicts(root, "--stage", "2", "data.rle_csv=/none.csv")
    elsewhere = conflicts(root, "--stage", "infer", f"infer.models={data}/map.csv", f"data.patient_map={data}/map.csv")
    assert "data.patient_map=null, now" in elsewhere  # config.yaml would say that it was used
    plan = plan_of(root, "--stage", "1", "--run", "a", "--redo", "stage1.size=96")
    assert "lacks the image size 96" in missing_line(plan, *plan.missing[0])
    assert "stage1.size=96 stage2.size=64" in missing_line(plan, *plan.missing[0])


def test_a_stage_refuses_weights_of_an_earlier_division_into_folds(data: Path, root: Path) -> None:
    """Films of the new validation fold were in the training of stage 1: its score would be a leak."""
    assert carry_out(plan_of(root, "--stage", "preprocess", "--run", "a", "--redo", f"data.patient_map={data}/map.csv"))
    said = conflicts(root, "--stage", "2")
    assert "fold0/stage1 is done with other settings (finalize/cases has changed" in said and "--stage 1 --redo" in said


def test_a_run_has_one_recipe_for_all_folds_and_later_stages(root: Path) -> None:
    assert "stage1.lr=0.001, now 0.5" in conflicts(root, "--stage", "1", "--folds", "1", "stage1.lr=0.5")
    assert carry_out(plan_of(root, "--stage", "2", "--run", "a", "stage2.lr=0.5"))
    assert "stage2.lr=0.5, now 0.1" in conflicts(root, "--stage", "1", "stage2.lr=0.1")
    assert (root / "a" / "config.history" / "0001.yaml").exists() and not conflicts(root, "--stage", "2")


def test_how_a_stage_computes_may_differ_and_is_kept_unless_typed(root: Path) -> None:
    assert carry_out(plan_of(root, "--stage", "2", "--run", "a", "train.amp=off"))
    kept = plan_of(root, "--stage", "1", "--run", "a")
    assert not kept.todo and not kept.conflicts and any("(train.amp=auto, now off)" in note for note in kept.notes)
    assert "train.amp=auto, now off" in conflicts(root, "--stage", "1", "train.amp=off")


def test_an_unfinished_training_keeps_its_settings(root: Path) -> None:
    prepare(plan_of(root, "--stage", "2", "--run", "a"))
    (root / "a" / "fold0" / "stage2" / "checkpoints").mkdir(parents=True)
    said = conflicts(root, "--stage", "2", "stage2.lr=0.5")
    assert (
        "stage 2 was submitted with other settings (stage2.lr=0.001, now 0.5): keep them (type stage2.lr=0.001)" in said
    )
    assert not conflicts(root, "--stage", "2") and not conflicts(root, "--stage", "2", "stage2.lr=0.5", "--redo")


def test_a_job_refuses_what_its_upstream_was_not_made_with(data: Path, root: Path) -> None:
    prepare(plan_of(root, "--stage", "2", "--run", "a"))
    job = root / "a" / "jobs" / "stage2-fold0.yaml"
    job.write_text(job.read_text().replace("patient_map: null", f"patient_map: {data}/map.csv"))
    with pytest.raises(ConfigError, match=r"data\.patient_map=null, now .*map\.csv"):
        stages.run_stage("2", root / "a", 0)


def test_a_refused_submission_leaves_every_record_as_it_was(
    data: Path, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def files() -> dict[str, str]:
        return {str(path): path.read_text() for path in sorted((root / "a").rglob("*")) if path.is_file()}

    words = ["--stage", "all", "--run", "a", f"infer.models={data}/map.csv"]
    prepare(plan_of(root, *words))
    plan, before = plan_of(root, *words, "--redo", "stage1.lr=0.5"), files()
    assert any(name.endswith("plan.json") for name in before)
    _, changes = prepare(plan)
    assert files() != before
    changes.undo()
    assert files() == before
    rename, rest = Path.rename, iter([True, False])

    def second_fails(path: Path, target: Path) -> Path:
        if next(rest, True):
            return rename(path, target)
        raise OSError("no")

    for name, act in {
        "launch.state.codecopy.copy": OSError("disk"), "launch.backends.prepare.write_film_plan": ConfigError("films"),
        "launch.backends.prepare.configuration.to_yaml": KeyboardInterrupt(), "pathlib.Path.rename": second_fails,
    }.items():  # fmt: skip
        with monkeypatch.context() as patch, pytest.raises(BaseException, match="disk|films|^$|no"):
            patch.setattr(name, act if callable(act) else mock.Mock(side_effect=act))
            prepare(plan)
        assert files() == before, name


def test_a_finished_stage_keeps_settings_under_the_lock_or_says_why_not(
    root: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    words = ["--stage", "1", "--run", "a", f"run_root={root}", "stage2.lr=0.3"]
    with monkeypatch.context() as patch:
        patch.setattr("launch.backends.prepare.lock", mock.Mock(side_effect=PermissionError(13, "Permission denied")))
        assert main(words) == 0
    assert "config.yaml keeps the settings of the command before: [Errno 13]" in capfd.readouterr().out
    assert Run.load(root / "a").config.stage2.lr == 0.001
    assert main(words) == 0 and Run.load(root / "a").config.stage2.lr == 0.3


def test_new_shards_are_not_pooled_with_folds_on_the_old_ones(data: Path, root: Path) -> None:
    other = plan_of(root, "--stage", "1", "--run", "a").run.done_file("evaluate", 2)
    other.parent.mkdir(parents=True)
    other.write_text('{"settings": {}, "inputs": {}, "outputs": {}}')
    words = ["--stage", "all", "--redo", f"data.patient_map={data}/map.csv", "--folds"]
    assert "fold 2 of this run, which would be pooled too" in conflicts(root, *words, "0,1")
    assert "--folds 0,1,2 --redo" in conflicts(root, *words, "0,1")
    assert not conflicts(root, *words, "0-2") and not conflicts(root, *words[:3], "--folds", "0,1")


def test_the_films_of_a_run_stay_with_another_recipe_and_a_label_with_its_folder(data: Path, root: Path) -> None:
    plan = plan_of(root, "--stage", "1", "--run", "a", "--config", f"{data}/recipe.yaml")
    assert plan.run.config.data.dicom_dir == f"{data}/films" and not plan.conflicts
    words = ["--stage", "infer", "--run", "a", f"infer.models={data}/map.csv"]
    prepare(plan_of(root, *words, f"infer.dir={data}/films", "infer.label=first", "infer.triplet=0.7,10,0.3"))
    again = plan_of(root, *words[:4])
    assert again.run.infer_dir.name == "first" and any("infer.triplet=0.7,10.0,0.3" in note for note in again.notes)
    assert plan_of(root, *words[:4], f"infer.dir={data}").run.infer_dir.name == "data"


def test_nodes_gpus_and_profile_are_those_that_were_typed_last(
    root: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    profile = tmp_path / "mine.yaml"
    profile.write_text("gpus_per_node: 4\n")

    def site(stage: str, *words: object) -> tuple[int, int, str]:
        plan = plan_of(root, "--cluster", "local", "--run", "a", "--redo", "--stage", stage, *map(str, words))
        chosen = choose_site(plan.request, plan.run)
        Ledger(plan.run).append(ledger_entry(plan, chosen, plan.targets[0], Path("code")))
        return chosen.nodes, chosen.gpus_per_node, chosen.line.partition("last submission: ")[2]

    assert site("1", "--profile", profile) == (1, 4, "")
    profile.write_text("gpus_per_node: 2\n")
    assert site("1") == (1, 2, f"--profile {profile})")  # edited
    assert site("1", "--nodes", 3, "--gpus-per-node", 0)[:2] == (3, 0) and site("preprocess", "--nodes", 7)[0] == 7
    assert site("2") == (3, 0, f"--profile {profile} --nodes 3 --gpus-per-node 0)")
    assert site("1", "--nodes", 2) == (2, 0, f"--profile {profile} --gpus-per-node 0)")
    assert site("1", "--profile", profile) == (2, 2, "--nodes 2)")
    assert site("infer", f"infer.models={profile}")[:2] == (1, 0)  # no inference yet
    assert site("preprocess")[0] == 7
    profile.unlink()
    capfd.readouterr()
    assert site("1") == (2, 0, "--nodes 2)")
    assert f"note: the profile of the last submission is gone: {profile}" in capfd.readouterr().err
    assert site("1", "--profile", "workstation")[0] == 1  # another site


def test_notes_before_an_inference(data: Path, root: Path, capfd: pytest.CaptureFixture[str]) -> None:
    words = ["--stage", "infer", "--run", "a", f"infer.models={data}/map.csv", f"run_root={root}", "--cluster", "local"]
    words += ["--dry-run", "--nodes", "2"]
    (root / "new").mkdir()
    (root / "new" / "a.png").write_bytes(b"x")
    assert main([*words, f"infer.dir={root}/new", "infer.outputs=csv,dicomseg", f"infer.models={root}/a"]) == 0
    out, said = capfd.readouterr()
    assert "[1/2] infer: 2 processes; writes" in out and "sbatch" not in out.lower()
    assert "1 of the 2 tasks of infer have nothing to do: its 1 films are 1 part" in said
    assert "1 of the 1 films in infer.dir have name and size of a training film" in said
    assert "no film in" in said and "leave dicomseg out" in said
    for name in "bc":
        (root / "new" / f"{name}.png").write_bytes(b"x")
    words = [*words[:-1], "3", f"infer.dir={root}/new"]
    write_film_plan(plan_of(root, *words).run)
    assert main(words) == 0
    said = capfd.readouterr().err
    assert (
        "2 of the 3 tasks of infer have nothing to do: its 3 films are 1 part of up to 3: give infer.part_size=1"
        in said
    )
    assert main([*words, "--redo"]) == 0 and "nothing to do" not in capfd.readouterr().err

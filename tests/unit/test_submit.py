"""submit.py: arguments, recipe and run, the plan, the dry run, refusals."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from launch.backends import prepare
from launch.planning.arguments import Request, parse
from launch.planning.parser import UsageError
from launch.planning.plan import Plan, make_plan, missing_line
from launch.planning.recipe import resolve
from launch.state.codecopy import code_hash, copy
from launch.state.ledger import Entry, Ledger
from launch.state.locks import lock
from launch.submit import main
from pneumo_dist import done
from pneumo_dist.config import ConfigError
from pneumo_dist.data.films import grey
from pneumo_dist.run import RunFolder
from tests.unit.squeue import squeue

ROOT = Path(__file__).resolve().parents[2]


def submit(*words: object, cwd: Path = ROOT, **environ: str) -> subprocess.CompletedProcess[str]:
    """Run submit.py as a person does."""
    command = [sys.executable, str(ROOT / "launch" / "submit.py"), *map(str, words)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, env={**os.environ, **environ}, check=False)


def submit_in_process(capfd: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    """Do the same in this process, which is faster: exit status, output, errors."""
    status = main(list(words))
    return status, *capfd.readouterr()


def make(*words: object) -> Plan:
    return make_plan(parse([str(word) for word in words]))


def finished(plan: Plan, stage: str, fold: int | None = None) -> None:
    """Pretend that a stage is done."""
    folder = plan.run.dir_of(stage, fold)
    folder.mkdir(parents=True, exist_ok=True)
    inputs = {"grey_mapping": grey.VERSION} if stage == "finalize" else {}  # of films that are not there
    record = {"settings": done.settings_of(plan.run.config, stage), "inputs": inputs, "outputs": {}}
    record["outputs"] = {f"manifest-{size}": {"sha256": "x"} for size in plan.run.config.sizes}
    with contextlib.suppress(ConfigError):
        record["inputs"] = done.inputs_of(plan.run, stage, fold)
    (folder / "DONE.json").write_text(json.dumps(record))


# ---- arguments


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", "--stage"),
        ("--stage 3", "'3'"),
        ("--stage 1 --nodes 0", "--nodes 0"),
        ("--stage 1 --nodes two", "two"),
        ("--stage 1 --gpus-per-node -1", "--gpus-per-node"),
        ("--stage 1 --nods 2", "--nods"),
        ("--stage 1 fast", "'fast'"),
        ("--stage 1 --folds 0,x", "0,x"),
        ("--stage 1 --folds 4-0", "4-0"),
        ("--stage 1 --folds 1,1", "twice"),
        ("--stage 1 --run ../x", "--run"),
        ("--stage 1 --after soon", "--after"),
        ("--stage 1 --after 12 --cluster local", "--after"),
        ("--stage 1 --verify", "--verify"),
        ("--stage preprocess --verify --redo", "--verify"),
    ],
)
def test_a_wrong_argument_is_one_line_naming_it(arguments: str, message: str) -> None:
    with pytest.raises(UsageError) as error:
        parse(arguments.split())
    assert message in str(error.value) and "\n" not in str(error.value)


def test_settings_may_stand_anywhere() -> None:
    request = parse(["infer.dir=/x", "--stage", "infer", "infer.outputs=csv,masks", "--nodes", "3"])
    assert request == Request(stage="infer", nodes=3, overrides=("infer.dir=/x", "infer.outputs=csv,masks"))


def test_several_jobs_to_wait_for() -> None:
    assert parse(["--stage", "1", "--after", "12,13_4"]).after == "12:13_4"


def test_a_range_of_folds_and_the_name_of_a_recipe(tmp_path: Path) -> None:
    plan = make("--stage", "1", "--folds", "0-2,4", "--config", "kaggle", f"run_root={tmp_path}")
    assert plan.folds == (0, 1, 2, 4) and plan.run.name == "kaggle" and plan.run.config.stage1.size == 512


# ---- recipe and run


def test_nothing_named_means_synthetic_films_and_all_that_is_missing(tmp_path: Path) -> None:
    plan = make("--stage", "1", f"run_root={tmp_path}")
    assert plan.run.name == "quickstart" and resolve(plan.request).embedded
    assert [node.key for node in plan.todo] == ["phantom", "preprocess", "finalize", "stage1-fold0"]
    assert "no data configured: synthetic phantom films" in plan.notes


@pytest.mark.parametrize(
    ("words", "run"),
    [("data.dicom_dir=/x", "paper"), ("--run mine", "mine"), ("--config configs/exp2.yaml", "exp2")],
)
def test_as_soon_as_something_is_named_a_missing_upstream_is_not_run(tmp_path: Path, words: str, run: str) -> None:
    plan = make("--stage", "1", *words.split(), f"run_root={tmp_path}")
    assert plan.run.name == run and [node.key for node in plan.todo] == ["stage1-fold0"]
    (line,) = {missing_line(plan, *missing) for missing in plan.missing}
    assert f"stage 1 needs preprocess, which is not done: run --stage preprocess --run {run}" in line


def test_a_run_goes_on_from_its_own_configuration(tmp_path: Path) -> None:
    first = make("--stage", "1", "--run", "a", f"run_root={tmp_path}", "stage1.epochs=3", "phantom.films=9")
    prepare.prepare(first)
    again = make("--stage", "2", "--run", "a", f"run_root={tmp_path}", "stage2.epochs=4")
    assert (again.run.config.stage1.epochs, again.run.config.stage2.epochs) == (3, 4)
    prepare.prepare(again)
    assert make("--stage", "2", "--run", "a", f"run_root={tmp_path}").run.config.stage2.epochs == 4
    other = make("--stage", "1", "--run", "a", "--config", "configs/exp2.yaml", f"run_root={tmp_path}")
    assert other.run.config.stage1.epochs == 35


def test_paths_are_made_absolute_where_the_command_was_typed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    plan = make("--stage", "infer", "--run", "a", "run_root=here", "infer.dir=films", "infer.models=m.pt,~/n.pt")
    config = plan.run.config
    assert plan.run.folder == tmp_path / "here" / "a" and config.infer.dir == str(tmp_path / "films")
    assert config.infer.models == [str(tmp_path / "m.pt"), str(Path("~/n.pt").expanduser())]


def test_runs_lie_beside_launch_whatever_the_current_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert resolve(parse(["--stage", "1"])).run.folder == ROOT / "runs" / "quickstart"


def test_a_stage_that_the_recipe_does_not_have() -> None:
    with pytest.raises(ConfigError, match="this recipe has no stage 2"):
        make("--stage", "2", "--config", "configs/exp2.yaml")


def test_a_fold_outside_the_folds() -> None:
    with pytest.raises(ConfigError, match="--folds 7"):
        make("--stage", "1", "--folds", "0,7")


# ---- what is done


def test_what_is_done_is_left_alone_and_other_settings_are_refused(tmp_path: Path) -> None:
    root = f"run_root={tmp_path}"
    plan = make("--stage", "preprocess", "--config", "configs/quickstart.yaml", root)
    films = plan.run.folder / "phantom" / "dicom-images-train"
    films.mkdir(parents=True)
    for path in (films / "a.png", films.parent / "train-rle.csv", films.parent / "patients.csv"):
        path.write_text("x")
    for stage in ("phantom", "finalize"):
        finished(plan, stage)
    finished(make("--stage", "1", "--config", "configs/quickstart.yaml", root), "1", 0)
    assert make("--stage", "1", root).todo == ()
    refused = make("--stage", "1", root, "stage1.lr=0.5")
    assert len(refused.conflicts) == 1 and "--redo" in refused.conflicts[0]
    assert "(stage1.lr=0.002, now 0.5): keep its settings (type stage1.lr=0.002)" in refused.conflicts[0]
    assert [n.key for n in make("--stage", "1", root, "stage1.lr=0.5", "--redo").todo] == ["stage1-fold0"]
    assert "stage1.lr=0.002, now 0.5" in make("--stage", "2", root, "stage1.lr=0.5").conflicts[0]
    assert not make("--stage", "2", root).conflicts


def test_what_is_derived_follows_what_it_reads(tmp_path: Path) -> None:
    words = ("--stage", "all", "--config", "configs/quickstart.yaml", f"run_root={tmp_path}")
    plan = make(*words)
    films = plan.run.folder / "phantom" / "dicom-images-train"
    films.mkdir(parents=True)
    for path in (films / "a.png", films.parent / "train-rle.csv", films.parent / "patients.csv"):
        path.write_text("x")
    for stage in ("phantom", "finalize", "merge"):
        finished(plan, stage)
    for stage in ("1", "2", "swa", "evaluate"):
        finished(plan, stage, 0)
    again = [node.key for node in make(*words, "--folds", "0,1").todo]
    assert again == ["stage1-fold1", "stage2-fold1", "swa-fold1", "evaluate-fold1", "pool", "infer", "merge"]
    (plan.run.folder / "fold0" / "stage1" / "DONE.json").unlink()
    stale = make(*words)
    assert any("which has to run again: repeat both with --redo" in line for line in stale.conflicts)


def test_another_form_of_the_tables_merges_again_without_redo(tmp_path: Path) -> None:
    films, model = tmp_path / "films", tmp_path / "model.pt"
    films.mkdir()
    model.write_bytes(b"")
    words = ("--stage", "infer", "--run", "a", f"run_root={tmp_path}", f"infer.dir={films}", f"infer.models={model}")
    finished(make(*words), "merge")
    record = make(*words).run.done_file("merge", None)
    record.write_text(record.read_text().replace('"settings": {', '"settings": {"infer.part_size": 256, '))  # earlier
    assert not make(*words).todo and not make(*words, "infer.part_size=9").todo
    again = make(*words, "infer.unreadable=negative")
    assert [node.key for node in again.todo] == ["infer", "merge"] and not again.conflicts
    assert "infer.tta" in make(*words, "infer.unreadable=negative", "infer.tta=none").conflicts[0]


def test_redo_puts_the_old_result_aside(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = make("--stage", "1", "--run", "a", f"run_root={tmp_path}", "phantom.films=9")
    finished(plan, "1", 0)
    prepare.prepare(make("--stage", "1", "--run", "a", f"run_root={tmp_path}", "--redo"))
    assert not (tmp_path / "a" / "fold0" / "stage1").exists()
    (aside,) = (tmp_path / "a" / "fold0").glob("stage1.old-*")
    assert (aside / "DONE.json").exists() and str(aside) in capsys.readouterr().out


def test_redo_does_not_touch_shards_that_other_runs_may_read(tmp_path: Path) -> None:
    words = ("--stage", "preprocess", "--run", "a", f"run_root={tmp_path}", f"data.shard_dir={tmp_path}/s", "--redo")
    (tmp_path / "s").mkdir()
    with pytest.raises(ConfigError, match="other runs may use the shards"):
        prepare.prepare(make(*words, "data.dicom_dir=/x"))
    assert (tmp_path / "s").is_dir()


def test_infer_takes_every_fold_that_has_a_model(tmp_path: Path) -> None:
    plan = make("--stage", "infer", "--run", "a", f"run_root={tmp_path}", "infer.dir=/films", "phantom.films=9")
    for fold in (0, 3):
        finished(plan, "evaluate", fold)
    again = make("--stage", "infer", "--run", "a", f"run_root={tmp_path}", "infer.dir=/films")
    assert again.folds == (0, 3)
    (missing,) = again.missing
    assert "infer needs the folds' pooled evaluation" in missing_line(again, *missing)
    assert "run --stage evaluate --folds 0,3" in missing_line(again, *missing)
    finished(plan, "pool")
    assert not make("--stage", "infer", "--run", "a", f"run_root={tmp_path}", "infer.dir=/films").missing


# ---- one writer


def test_a_live_process_on_the_same_stage_is_named(tmp_path: Path) -> None:
    plan = make("--stage", "1", "--run", "a", f"run_root={tmp_path}")
    held = lock(plan.run.lock("stage1-fold0"))
    with pytest.raises(ConfigError, match=f"process {os.getpid()} .* already runs stage 1"):
        prepare.refuse_live(plan, Ledger(plan.run), True)
    held.release()
    prepare.refuse_live(plan, Ledger(plan.run), True)


def test_a_live_slurm_job_is_known_by_number_and_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    plan = make("--stage", "1", "--run", "a", f"run_root={tmp_path}")
    ledger = Ledger(plan.run)
    same = {"key": "stage1-fold0", "stage": "1", "fold": 0, "cluster": "slurm"}
    ledger.append(Entry(**same, job_id="12", name="stage1-fold0.a"))
    tool = tmp_path / "squeue"
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    tool.write_text(f"#!/bin/sh\necho '{squeue('12|stage1-fold0.a|PENDING|Priority|')}'\n")
    tool.chmod(0o755)
    with pytest.raises(ConfigError, match="stage 1 of this run is already queued or running as SLURM job 12:"):
        prepare.refuse_live(plan, ledger, True)
    tool.write_text(f"#!/bin/sh\necho '{squeue('12|some other job|RUNNING|None|n1')}'\n")
    prepare.refuse_live(plan, ledger, True)
    tool.write_text("#!/bin/sh\necho 'slurm_load_jobs error: Unable to contact slurm controller' >&2; exit 1\n")
    with pytest.raises(ConfigError, match="does not report"):
        prepare.refuse_live(plan, ledger, True)
    prepare.refuse_live(plan, ledger, False)  # a run taken to a machine without SLURM
    assert "taken as ended" in capfd.readouterr().out


def test_a_torn_line_of_the_ledger_is_left_out(tmp_path: Path) -> None:
    ledger = Ledger(RunFolder(tmp_path))
    ledger.append(Entry(key="swa-fold0", stage="swa", fold=0, cluster="local"))
    with ledger.path.open("a") as out:
        out.write('{"key": "infer", "sta')
    assert [entry.key for entry in ledger.entries()] == ["swa-fold0"] and ledger.entries()[0].time


# ---- copy of the code


def test_the_copy_holds_the_code_and_is_named_by_it(tmp_path: Path) -> None:
    code = copy(ROOT, RunFolder(tmp_path))
    assert code == copy(ROOT, RunFolder(tmp_path)) and code.name == code_hash(ROOT) == code_hash(code)
    assert (code / "launch" / "jobs.py").read_bytes() == (ROOT / "launch" / "jobs.py").read_bytes()
    assert not list(code.rglob("__pycache__")) and len(list((tmp_path / "code").iterdir())) == 1


# ---- as typed


def test_help_needs_no_package_and_shows_the_command_to_start_with() -> None:
    done = subprocess.run(
        [sys.executable, "-S", ROOT / "launch" / "submit.py", "--help"], capture_output=True, text=True, check=False
    )  # -S: no site-packages, so nothing but the standard library can be imported
    assert done.returncode == 0, done.stderr
    shown = submit("--help")
    assert shown.returncode == 0 and "python launch/submit.py --stage 1 --nodes 2" in shown.stdout


def test_dry_run_prints_the_chain_and_writes_nothing(tmp_path: Path) -> None:
    shown = submit(
        "--stage", "all", "--nodes", 2, "--dry-run", f"run_root={tmp_path}/r", cwd=tmp_path, PATH="/usr/bin:/bin"
    )
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.count("#!/bin/bash") == 9 and "afterok:<id of stage 1>" in shown.stdout
    assert shown.stdout.count("#SBATCH --array=0-1%2") == 2 and not (tmp_path / "r").exists()


def test_dry_run_warns_of_what_is_missing_and_exits_0(tmp_path: Path) -> None:
    shown = submit(
        "--stage", "2", "--dry-run", "--nodes", 3, "--run", "a", f"run_root={tmp_path}/r", "stage2.batch_size=2"
    )  # fmt: skip
    assert shown.returncode == 0 and "warning: stage 2 needs stage 1" in shown.stderr
    assert "stage2.batch_size=2 is too small for 3 ranks" in shown.stderr and "afterok:<id of stage 1>" in shown.stdout
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--stage 3", "'3'"),
        ("--stage 1 --nodes 0", "--nodes 0"),
        ("--stage 1 trian.seed=1", "did you mean train.seed?"),
        ("--stage 1 stage1.epochs=many", "stage1.epochs=many"),
        ("--stage 1 lr=0.1", "did you mean stage1.lr or stage2.lr"),
        ("--stage 1 --config none.yaml", "none.yaml"),
        ("--stage 1 infer.label=${oc.env:HOME}", "infer.label: ${...} is not replaced here"),
        ("--stage 1 --config {secret}", "secret.yaml: data.stage_dir: ${...} is not replaced here"),
        ("--stage 1 --config kagle", "configs/ has: exp1, exp2"),
        ("--stage 2 --run chst", "did you mean --run chest?"),
        ("--stage 1 --profile nowhere", "--profile nowhere"),
        ("--stage 2 --run a", "stage 2 needs preprocess"),
        ("--stage preprocess --run a", "no films: give data.dicom_dir"),
        ("--stage preprocess data.dicom_dir=/x", "no annotations: give data.rle_csv"),
        ("--stage preprocess data.dicom_dir=/none data.rle_csv=/none.csv", "data.dicom_dir=/none"),
        ("--stage preprocess data.dicom_dir={empty} data.rle_csv={csv}", "no film in it"),
        ("--stage preprocess data.dicom_dir={films} data.rle_csv={no_csv}", "no.csv"),
        ("--stage preprocess data.dicom_dir={films} data.masks=/none", "data.masks=/none: no such folder"),
        ("--stage preprocess data.dicom_dir={films} data.masks={empty}", "no mask of the 1 films (first: a.png) among"),
        ("--stage preprocess data.masks={empty} phantom.films=8", "phantom.films and data.masks are both set"),
        ("--stage 1 data.patient_map={empty} phantom.films=8", "phantom.films and data.patient_map are both set"),
        ("--stage 1 data.rle_csv={empty} phantom.films=8", "phantom.films and data.rle_csv are both set"),
        ("--stage preprocess data.rle=relative", "data.rle='relative' is unknown: choose one of siim, absolute"),
        ("--stage infer --run a infer.dir={empty} infer.models={csv}", "no film"),
        ("--stage infer --run a infer.dir={films} infer.models=/none.pt", "/none.pt"),
        ("--stage 1 --nodes 9 stage1.batch_size=8", "use at most 8 ranks"),
        ("--stage 1 train.cuda_graph=true", "train.cuda_graph=true needs one rank with a GPU: give --nodes 1"),
        ("--stage 1 --after 12", "--after"),
        ("--stage 1 --cluster slurm", "--cluster slurm: no sbatch on PATH"),
        ("--stage preprocess --verify --run a", "no shards to verify"),
    ],
)
def test_what_can_be_known_beforehand_is_one_line_and_exit_2(
    tmp_path: Path, words: str, said: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "films").mkdir()
    (tmp_path / "films" / "a.png").write_bytes(b"x")
    (tmp_path / "ok.csv").write_text("ImageId,EncodedPixels\na,-1\n")
    (tmp_path / "no.csv").write_text("this is\nno list\n")
    (tmp_path / "secret.yaml").write_text("data: {stage_dir: '${oc.env:HOME}'}")
    files = {"{empty}": "empty", "{films}": "films", "{csv}": "ok.csv", "{no_csv}": "no.csv", "{secret}": "secret.yaml"}
    filled = words
    for place, name in files.items():
        filled = filled.replace(place, str(tmp_path / name))
    # No SLURM on this PATH, whatever the machine has.
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("env", "git", "true"):
        (tools / name).symlink_to(f"/usr/bin/{name}")
    monkeypatch.setenv("PATH", str(tools))
    monkeypatch.chdir(ROOT)
    (tmp_path / "r" / "chest").mkdir(parents=True)
    (tmp_path / "r" / "chest" / "config.yaml").write_text("")
    status, out, errors = submit_in_process(capfd, *filled.split(), f"run_root={tmp_path}/r")
    assert status == 2, out + errors
    lines = errors.strip().splitlines()
    assert len(lines) == 1 and said in lines[0] and lines[0].startswith("error: ")
    assert not [path for path in (tmp_path / "r").rglob("*") if path.is_file() and path.parent.name != "chest"]


def test_a_run_root_that_is_a_file(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "r").write_text("")
    status, _, errors = submit_in_process(capfd, "--stage", "1", "--cluster", "local", f"run_root={tmp_path}/r")
    assert status == 2 and "is a file" in errors and "run_root" in errors


def test_other_packages_and_settings_of_python_in_the_shell_do_not_act(tmp_path: Path) -> None:
    (tmp_path / "omegaconf.py").write_text("raise RuntimeError('another omegaconf')")
    shell = {"PYTHONPATH": str(tmp_path), "PYTHONHOME": sys.base_prefix, "PYTHONOPTIMIZE": "2", "PYTHONINSPECT": "1"}
    shown = submit("--stage", "1", "--dry-run", "--run", "a", f"run_root={tmp_path}/r", **shell, LC_ALL="C")
    assert shown.returncode == 0, shown.stderr
    assert "note: of this shell, PYTHONHOME, PYTHONINSPECT, PYTHONOPTIMIZE, PYTHONPATH will not reach" in shown.stdout


def test_a_python_without_the_packages_says_how_to_get_them(tmp_path: Path) -> None:
    """Any Python may be typed: without .venv beside launch/ the set-up command is printed."""
    clone = tmp_path / "clone"
    shutil.copytree(ROOT / "launch", clone / "launch", ignore=shutil.ignore_patterns("__pycache__"))
    bare = [sys.executable, "-I", "-S", str(clone / "launch" / "submit.py"), "--stage", "1"]
    shown = subprocess.run(bare, capture_output=True, text=True, check=False)
    assert shown.returncode == 2 and "bash launch/setup_env.sh" in shown.stderr and len(shown.stderr.splitlines()) == 1
    # With one, it takes over.
    (clone / ".venv" / "bin").mkdir(parents=True)
    (clone / ".venv" / "bin" / "python").write_text('#!/bin/sh\necho "taken over: $@"\n')
    (clone / ".venv" / "bin" / "python").chmod(0o755)
    shown = subprocess.run(bare, capture_output=True, text=True, check=False, cwd="/")
    assert shown.returncode == 0 and "taken over:" in shown.stdout and "--stage 1" in shown.stdout

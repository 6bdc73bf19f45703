"""A chain submitted to SLURM, with fake SLURM commands: dependencies, refusals, jobs that are already live."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from unittest import mock

import pytest

from launch.backends import follow, prepare, slurm_chain
from launch.backends.slurm_job import Job
from launch.monitor.display import Display
from launch.planning.recipe import ROOT
from launch.state import codecopy, environment
from launch.state import slurm_client as slurm
from launch.state.ledger import Entry, Ledger
from launch.submit import main
from pneumo_dist import config as configuration
from pneumo_dist.run import RunFolder
from tests.unit.squeue import squeue
from tests.unit.test_submit import finished, make

SMALL = ["phantom.films=9", "model.pretrained=none"]
TOOLS = {
    "scontrol": "echo 'Slurmctld(primary) at head is UP'; echo 'MaxArraySize            = 1001'",
    "sinfo": "echo 'batch*|3|8|32000|(null)|2:00:00'",
    "squeue": "cat {folder}/queue 2>/dev/null; true",
    "scancel": 'echo "$@" >> {folder}/cancelled',
    # Counts up; refuses from the job on whose number stands in `refuse`.
    "sbatch": """
n=$(($(cat {folder}/count 2>/dev/null || echo 0) + 1)); echo $n > {folder}/count
if [ $n -ge $(cat {folder}/refuse 2>/dev/null || echo 999) ]; then
    [ -f {folder}/limit ] && echo 'sbatch: error: AssocMaxSubmitJobLimit' >&2
    echo 'sbatch: error: Batch job submission failed: Invalid qos specification' >&2; exit 1
fi
if [ -f {folder}/then ]; then . {folder}/then; fi
echo "Submitted batch job $n"
""",
}


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """SLURM's commands, first on the PATH."""
    folder = tmp_path / "tools"
    folder.mkdir()
    for name, text in TOOLS.items():
        (folder / name).write_text(f"#!/bin/sh\nenv > {folder}/{name}.env\n" + text.format(folder=folder) + "\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    return folder


def submit(root: Path, *words: str) -> int:
    return main([*words, "--run", "a", f"run_root={root}", *SMALL])


def script(run_dir: Path, job: int) -> str:
    return (run_dir / "jobs" / f"{job}_submission.sh").read_text()


def test_every_job_waits_for_the_one_it_reads_from(
    tools: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert submit(tmp_path, "--stage", "all", "--nodes", "2", "--folds", "0,1") == 0
    shown = capfd.readouterr().out
    run_dir = tmp_path / "a"
    order = [entry.key for entry in Ledger(RunFolder(run_dir)).entries()]
    assert order == [
        "phantom", "preprocess", "finalize", "stage1-fold0", "stage1-fold1", "stage2-fold0", "stage2-fold1",
        "swa-fold0", "swa-fold1", "evaluate-fold0", "evaluate-fold1", "pool", "infer", "merge",
    ]  # fmt: skip
    waits = {key: script(run_dir, i + 1) for i, key in enumerate(order)}
    assert "--dependency" not in waits["phantom"]
    assert "--dependency=afterok:3\n" in waits["stage1-fold1"] and "--dependency=afterok:5\n" in waits["stage2-fold1"]
    assert "--dependency=afterok:10:11\n" in waits["pool"] and "--dependency=afterok:12\n" in waits["infer"]
    assert "--array=0-1%2" in waits["preprocess"] and "--nodes=2" in waits["swa-fold0"]
    assert "stage1-fold0         job 4" in shown and "runs.py status" in shown
    assert {entry.code for entry in Ledger(RunFolder(run_dir)).entries()} == {
        path.name for path in (run_dir / "code").iterdir()
    }


def test_the_pickles_are_jobs_of_the_run(tools: Path, tmp_path: Path) -> None:
    assert submit(tmp_path, "--stage", "preprocess", "--nodes", "2") == 0
    jobs = [
        pickle.loads((tmp_path / "a" / "jobs" / f"2_{element}_submitted.pkl").read_bytes()).function
        for element in (0, 1)
    ]
    assert jobs == [Job("preprocess", None, (element, 2), str(tmp_path / "a")) for element in (0, 1)]


def test_a_refused_job_takes_the_earlier_ones_back(
    tools: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tools / "refuse").write_text("3")
    assert submit(tmp_path, "--stage", "all", "--nodes", "2") == 2
    said = capfd.readouterr().err.strip().splitlines()
    assert len(said) == 1 and "finalize" in said[0] and "Invalid qos" in said[0] and "cancelled" in said[0]
    assert (tools / "cancelled").read_text() == "1 2\n"


def test_a_path_that_slurm_would_change_is_refused_and_shown_by_a_dry_run(
    tools: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert [submit(tmp_path / "100%j", "--stage", "preprocess", *words) for words in ([], ["--dry-run"])] == [2, 0]
    refused = capfd.readouterr().err
    assert "error: " in refused and "warning: " in refused and refused.count("a path with % or \\: choose") == 2


def test_a_refused_redo_leaves_the_old_result_where_it_was(
    tools: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = make("--stage", "1", "--run", "a", f"run_root={tmp_path}", *SMALL)
    for stage, fold in (("finalize", None), ("1", 0)):
        finished(plan, stage, fold)
    (tools / "refuse").write_text("1")
    assert submit(tmp_path, "--stage", "1", "--redo") == 2
    with monkeypatch.context() as patch:
        patch.setattr(slurm_chain, "submit", mock.Mock(side_effect=KeyboardInterrupt))
        assert submit(tmp_path, "--stage", "1", "--redo") == 130
    assert (tmp_path / "a" / "fold0" / "stage1" / "DONE.json").exists()
    assert [path.name for path in (tmp_path / "a" / "fold0").iterdir()] == ["stage1"]


def test_a_stage_waits_for_a_live_one_of_its_run(
    tools: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    finished(make("--stage", "1", "--run", "a", f"run_root={tmp_path}", *SMALL), "finalize")
    assert submit(tmp_path, "--stage", "2") == 2 and "stage 2 needs stage 1" in capfd.readouterr().err
    assert submit(tmp_path, "--stage", "1") == 0
    (tools / "queue").write_text(squeue("1|stage1-fold0.a|RUNNING|None|n1") + "\n")
    assert submit(tmp_path, "--stage", "2", "stage1.lr=0.5") == 2
    assert "stage 1 was submitted with other settings (stage1.lr=0.001, now 0.5)" in capfd.readouterr().err
    assert submit(tmp_path, "--stage", "2") == 0
    assert "--dependency=afterok:1\n" in script(tmp_path / "a", 2)
    assert (
        submit(tmp_path, "--stage", "1") == 2
        and "stage 1 of this run is already queued or running as SLURM job 1:" in capfd.readouterr().err
    )


FILTERS = {f"{tool}_PARTITION": "none" for tool in ("SQUEUE", "SINFO", "SACCT", "SCANCEL")}
LEFT_BEHIND = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "PNEUMO_STORE": "x"}
MEANT = {"SBATCH_PARTITION": "low", "SLURM_MEM_PER_CPU": "9", "NCCL_DEBUG": "INFO", "OMP_NUM_THREADS": "3"}


def test_only_listed_variables_reach_slurms_commands_and_the_jobs(
    tools: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "p.yaml").write_text("setup: [cd $SCRATCH]\nenv: {NCCL_DEBUG: WARN, PYTHONPATH: /ours}")
    foreign = (
        FILTERS
        | LEFT_BEHIND
        | MEANT
        | {"SCRATCH": "/s", "TOKEN": "secret", "LD_LIBRARY_PATH": "/foreign", "SLURM_CLUSTERS": "b"}
    )
    for name, value in (foreign | {"SLURM_CONF": "/etc/ours.conf", "PYTHONNOUSERSITE": "1"}).items():
        monkeypatch.setenv(name, value)
    listed = {name.lower() if "PROXY" in name else name for name in environment.PASSED + environment.LOCAL}
    readme = (ROOT / "README.md").read_text()
    assert all(f"`{name}`" in readme for name in listed if not name.startswith("BASH_FUNC"))
    before = dict(os.environ)
    words = ("--stage", "preprocess", "--nodes", "2", "--profile", str(tmp_path / "p.yaml"))
    assert submit(tmp_path, *words) == 0
    assert dict(os.environ) == before
    slurm.cancel(["1"])
    slurm.queued(["1"])
    for command in TOOLS:
        seen = dict(line.partition("=")[::2] for line in (tools / f"{command}.env").read_text().splitlines())
        assert not seen.keys() & foreign.keys(), command
        assert seen["SLURM_CONF"] == "/etc/ours.conf" and seen["HOME"] == os.environ["HOME"], command
        assert seen["PYTHONNOUSERSITE"] == "1", command
    (note,) = [line for line in capfd.readouterr().out.splitlines() if line.startswith("note: of this shell")]
    named = {"LD_LIBRARY_PATH", "MASTER_ADDR", "OMP_NUM_THREADS", "RANK", "SBATCH_PARTITION", "SCRATCH", "WORLD_SIZE"}
    assert f"of this shell, {', '.join(sorted(named | {'SLURM_MEM_PER_CPU'}))} will not reach the jobs" in note
    assert note.endswith("; SLURM_CLUSTERS is ignored: jobs run on the default cluster of this SLURM only")
    text = script(tmp_path / "a", 1)
    assert text.index("export PYTHONPATH=/ours") < text.index("/code/"), "the copy of the code comes first"
    assert "--export=ALL" in text.split("srun ")[1] and "#SBATCH --propagate=NONE" in text
    # Inside a job, SLURM_* are that job's and no setting of the user.
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    assert submit(tmp_path, *words, "--dry-run") == 0
    assert f"# note: of this shell, {', '.join(sorted(named))} will" in capfd.readouterr().out


ALL = ("--stage", "all", "--folds", "0,1")


def queue(tools: Path, root: Path, *without: str) -> None:
    """Let squeue show what is submitted, except the jobs named in `without`, as waiting."""
    entries = Ledger(RunFolder(root / "a")).entries()
    rows = [f"{e.job_id}|{e.name}|PENDING|None|" for e in entries if e.key not in without]
    (tools / "queue").write_text(squeue(*rows) + "\n")


@pytest.fixture
def jobs_end(tools: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With --wait: all jobs of the run succeed, and SLURM takes more."""

    def follow_to_the_end(*_: object) -> int:
        plan = make(*ALL, "--run", "a", f"run_root={tmp_path}", *SMALL)
        for name, file in (("dicom_dir", "a.png"), ("rle_csv", ""), ("patient_map", "")):
            path = plan.run.source(name) / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        for entry in Ledger(plan.run).entries():
            finished(plan, entry.stage, entry.fold)
        (tools / "queue").unlink(missing_ok=True)
        (tools / "refuse").unlink(missing_ok=True)
        return 0

    monkeypatch.setattr(slurm_chain, "follow", follow_to_the_end)
    monkeypatch.setattr(prepare, "write_film_plan", lambda *_: None)  # there is no film


@pytest.mark.usefixtures("jobs_end")
@pytest.mark.parametrize("wait", [False, True])
def test_a_limit_on_submitted_jobs_lets_the_command_continue(
    wait: bool, tools: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tools / "refuse").write_text("5")
    (tools / "limit").touch()
    assert submit(tmp_path, *ALL, "--after", "70") == 1
    said = capfd.readouterr().out
    assert "(AssocMaxSubmitJobLimit): 4 of 14 are submitted. Repeat the command" in said
    queue(tools, tmp_path)
    if wait:
        (tools / "refuse").write_text("7")
        assert submit(tmp_path, *ALL, "--after", "70", "--wait") == 0
    else:
        assert submit(tmp_path, *ALL) == 2 and "repeat the command when" in capfd.readouterr().err
        (tools / "refuse").unlink()
        assert submit(tmp_path, *ALL, "stage1.epochs=7") == 2 and "already queued" in capfd.readouterr().err
        assert submit(tmp_path, *ALL, "--after", "70") == 0
    every = Ledger(RunFolder(tmp_path / "a")).entries()
    entries = {entry.key: entry for entry in every}
    assert len(every) == len(entries) == 14 and not (tools / "cancelled").exists()
    assert [entry.key for entry in every if "afterok:70" in entry.after] == ["phantom"]
    assert entries["stage2-fold0"].after == ([] if wait else ["afterok:4"])
    assert entries["swa-fold1"].after == [f"afterok:{entries['stage2-fold1'].job_id}"]


@pytest.mark.usefixtures("jobs_end")
def test_jobs_that_pool_count_for_the_same_folds_only(
    tools: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tools / "refuse").write_text("13")
    (tools / "limit").touch()
    assert submit(tmp_path, *ALL) == 1
    queue(tools, tmp_path)
    (tools / "refuse").unlink()
    assert submit(tmp_path, *ALL) == 0
    assert "--dependency=afterok:12\n" in script(tmp_path / "a", 14)
    for fold in range(3):
        finished(make(*ALL, "--run", "a", f"run_root={tmp_path}", *SMALL), "evaluate", fold)
    assert submit(tmp_path, "--stage", "infer", "--folds", "0,1,2") == 2
    assert "infer needs the folds' pooled evaluation" in capfd.readouterr().err
    finished(make(*ALL, "--run", "a", f"run_root={tmp_path}", *SMALL), "pool")
    queue(tools, tmp_path)
    assert submit(tmp_path, "--stage", "infer", "--folds", "0,1,2", "--wait") == 2
    assert "infer of this run is already queued" in capfd.readouterr().err


def test_a_job_that_waits_for_a_failed_one_does_not_count(
    tools: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert submit(tmp_path, "--stage", "all") == 0
    queue(tools, tmp_path, "phantom", "preprocess", "finalize", "stage1-fold0", "infer", "merge")
    assert submit(tmp_path, "--stage", "all") == 2
    assert "stage 2 of this run is already queued or running as SLURM job 5" in capfd.readouterr().err
    assert (tools / "count").read_text() == "9\n"


@pytest.mark.usefixtures("jobs_end")
def test_a_limit_that_other_jobs_fill_is_waited_for(
    tools: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tools / "limit").touch()
    (tools / "refuse").write_text("1")
    assert submit(tmp_path, "--stage", "1", "--after", "70", "--nodes", "2", "--wait") == 2
    assert "have ended\n" in capfd.readouterr().err
    assert submit(tmp_path, "--stage", "infer", "--after", "70", "--nodes", "2") == 2
    assert "or use fewer --nodes: it counts as 2 jobs" in capfd.readouterr().err
    counts = iter((2, 2, None, 1))  # nobody answers once
    monkeypatch.setattr(slurm, "jobs_of_user", lambda: next(counts))
    pauses: list[float] = []
    monkeypatch.setattr(slurm_chain.time, "sleep", pauses.append)
    monkeypatch.setattr(slurm_chain, "renewed", lambda plan: (tools / "refuse").unlink() or plan)
    assert submit(tmp_path, "--stage", "preprocess", "--wait") == 0
    assert pauses.count(slurm_chain.ROOM_POLL_S) == 3
    assert "waiting until one of your 2 jobs has ended" in capfd.readouterr().out


def test_after_stands_for_what_is_missing(tools: Path, tmp_path: Path) -> None:
    assert submit(tmp_path, "--stage", "2", "--after", "70,71") == 0
    assert "--dependency=afterok:70:71\n" in script(tmp_path / "a", 1)


@pytest.mark.parametrize(
    ("words", "profile", "said"),
    [
        (["--nodes", "4"], "", "--nodes 4: partition (default) has 3 nodes"),
        ([], "time_min: 999", "allows 120"),
        ([], "cpus_per_task: 9", "9 CPUs"),
        (["--gpus-per-node", "4"], "cpus_per_task: 3", "12 CPUs for stage 1"),
        ([], "gpus_per_node: 4\ncpus_per_task: 3", "12 CPUs for stage 1"),
        (["--nodes", "2000", "--stage", "preprocess"], "", "arrays of at most 1001 tasks (MaxArraySize)"),
    ],
)
def test_what_would_wait_for_ever_is_refused(
    tools: Path, tmp_path: Path, words: list[str], profile: str, said: str, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "p.yaml").write_text(profile or "{}")
    assert submit(tmp_path, "--stage", "all", "--profile", str(tmp_path / "p.yaml"), *words) == 2
    assert said in capfd.readouterr().err and not (tools / "count").exists()


@pytest.mark.parametrize(
    ("words", "profile"),
    [
        ([], "gpus_per_node: 4\nstages: {infer: {cpus_per_task: 8}}"),  # one task: it is an array
        (["--gpus-per-node", "1"], "gpus_per_node: 4\ncpus_per_task: 8"),
    ],
)
def test_cpus_are_checked_in_the_shape_that_the_script_asks_for(
    tools: Path, tmp_path: Path, words: list[str], profile: str, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "p.yaml").write_text(profile)
    assert submit(tmp_path, "--stage", "all", "--profile", str(tmp_path / "p.yaml"), *words) == 0, capfd.readouterr()
    order = [entry.key for entry in Ledger(RunFolder(tmp_path / "a")).entries()]
    infer = script(tmp_path / "a", 1 + order.index("infer"))
    assert "--cpus-per-task=8\n" in infer and "--ntasks-per-node=1\n" in infer  # the nodes have 8


@pytest.mark.parametrize(
    ("step", "ranks", "said"),
    [
        (3000, 1, ("about 50 more minutes", "requeued about once")),
        (6000, 1, ("about 100 more minutes", "requeued about 3 times")),
        (3000, 2, ()),
    ],
    ids=["half of it is left", "all of it again", "another number of ranks"],
)
def test_a_time_limit_below_what_was_measured_is_reported(
    tools: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], step: int, ranks: int, said: tuple[str, ...]
) -> None:
    """It is no mistake: the job saves, is requeued and goes on."""
    finished(make("--stage", "1", "--run", "a", f"run_root={tmp_path}", *SMALL), "finalize")
    row = {"epoch": 1, "epochs": 100, "step": step, "steps": 6000, "images_per_s": 64.0}
    where = {"cluster": "slurm", "extra": {"profile": str(tmp_path / "p.yaml")}}
    Ledger(RunFolder(tmp_path / "a")).append(
        Entry(key="stage1-fold0", stage="1", fold=0, job_id="7", processes=ranks, **where)
    )
    (tmp_path / "a" / "fold0" / "stage1").mkdir(parents=True)
    (tmp_path / "a" / "fold0" / "stage1" / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    (tmp_path / "p.yaml").write_text("time_min: 30")
    assert submit(tmp_path, "--stage", "1", "--profile", str(tmp_path / "p.yaml")) == 0
    out = capfd.readouterr().out
    assert all(words in out for words in said) and bool(said) == ("more minutes" in out)


def test_missing_imagenet_weights_are_reported_before_the_queue(
    tools: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    words = ["--stage", "all", "--run", "a", f"run_root={tmp_path}", "phantom.films=9"]
    assert main(words) == 0
    assert "run `.venv/bin/python -m pneumo_dist.model.pretrained` here first" in capfd.readouterr().out
    cached = tmp_path / "torch" / "hub" / "checkpoints" / "resnet34-b627a593.pth"
    cached.parent.mkdir(parents=True)
    cached.touch()
    words[3] = "b"
    assert main(words) == 0
    assert "ImageNet" not in capfd.readouterr().out


def test_the_speed_of_an_earlier_run_of_the_same_kind_counts_for_a_new_one(
    tools: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for name, ranks in (("other", 2), ("before", 1)):
        plan = make("--stage", "1", "--run", name, f"run_root={tmp_path}", *SMALL)
        row = {"epoch": 1, "epochs": 4, "step": 0, "steps": 240, "images_per_s": 64.0}
        (plan.run.folder / "fold0" / "stage1").mkdir(parents=True)
        (plan.run.folder / "fold0" / "stage1" / "metrics.jsonl").write_text(json.dumps(row) + "\n")
        (plan.run.folder / "config.yaml").write_text(configuration.to_yaml(plan.run.config))
        where = {"cluster": "slurm", "extra": {"profile": str(tmp_path / "p.yaml")}}
        Ledger(plan.run).append(Entry(key="stage1-fold0", stage="1", fold=0, processes=ranks, **where))
    (tmp_path / "p.yaml").write_text("time_min: 30\nrequeue: false")
    finished(make("--stage", "1", "--run", "a", f"run_root={tmp_path}", *SMALL), "finalize")
    assert submit(tmp_path, "--stage", "1", "--profile", str(tmp_path / "p.yaml"), "stage1.epochs=100") == 0
    said = capfd.readouterr().out
    assert (
        "needs about 100 more minutes at 64.0 images/s measured in run before, but its time limit is 30 minutes" in said
    )
    assert "the same command has to be repeated about 3 times" in said


def test_shards_larger_than_a_node_are_reported(tools: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    plan = make("--stage", "1", "--run", "a", f"run_root={tmp_path}", *SMALL)
    finished(plan, "finalize")
    with (tmp_path / "a" / "shards" / f"images-{plan.run.config.stage1.size}-0.npy").open("wb") as sparse:
        sparse.truncate(40 << 30)
    assert submit(tmp_path, "--stage", "1") == 0
    assert "reads 40.0 GiB of shards (256 px), but the partition's nodes have 31.2 GiB" in capfd.readouterr().out
    (tmp_path / "p.yaml").write_text("mem_gb: 8")
    assert submit(tmp_path, "--stage", "1", "--dry-run", "--profile", str(tmp_path / "p.yaml")) == 0
    assert "reads 40.0 GiB of shards (256 px), but mem_gb is 8 GiB" in capfd.readouterr().err


def test_the_submission_records_commit_and_changes_of_the_code(tools: Path, tmp_path: Path) -> None:
    assert submit(tmp_path, "--stage", "preprocess") == 0
    git = [entry.extra["git"] for entry in Ledger(RunFolder(tmp_path / "a")).entries()]
    state = codecopy.git_state(ROOT)
    assert git == [state] * 3
    assert state is None or (len(str(state["commit"])) == 40 and isinstance(state["changed_files"], int))


def test_what_ctrl_c_says_while_waiting_stays_on_the_terminal(
    tools: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    order: list[str] = []

    class Drawn(Display):
        def progress(self, about: dict[str, tuple[float, str]]) -> None:
            raise KeyboardInterrupt

        def close(self) -> None:
            order.append(capfd.readouterr().err)

    monkeypatch.setattr(follow, "POLL_S", (0.01, 0.01))
    monkeypatch.setattr(follow, "Display", Drawn)
    finished(make("--stage", "1", "--run", "a", f"run_root={tmp_path}", *SMALL), "finalize")
    assert submit(tmp_path, "--stage", "1", "--wait") == 130
    assert "no longer waiting" not in order[0], "the progress is taken away before, and not the words with it"
    assert "no longer waiting" in "".join(order)


def test_wait_ends_with_the_jobs_result(
    tools: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(follow, "POLL_S", (0.01, 0.01))
    monkeypatch.setattr(follow, "SETTLE_S", 0.0)
    plan = make("--stage", "1", "--run", "a", f"run_root={tmp_path}", *SMALL)
    finished(plan, "finalize")
    (tmp_path / "a" / "jobs").mkdir(parents=True)
    (tmp_path / "a" / "jobs" / "1_0_log.out").write_text("ValueError: broken on purpose\n")
    (tools / "queue").write_text(squeue("1|stage1-fold0.a|FAILED|NonZeroExitCode|n1|0|256") + "\n")
    assert submit(tmp_path, "--stage", "1", "--wait") == 1
    said = capfd.readouterr().err
    assert "stage1-fold0 (job 1): FAILED (exit 1:0): ValueError: broken on purpose" in said
    assert "1_0_log.out" in said and "repeat the same command to continue" in said
    finished(plan, "1", 0)
    record = tmp_path / "a" / "fold0" / "stage1" / "DONE.json"
    record.rename(tools / "DONE.json")
    (tools / "then").write_text(f"cp {tools}/DONE.json {record}\n")  # the job does its work
    (tools / "queue").write_text(squeue("2|stage1-fold0.a|COMPLETED|None|n1") + "\n")
    assert submit(tmp_path, "--stage", "1", "--wait") == 0
    assert "done: " in capfd.readouterr().out

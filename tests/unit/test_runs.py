"""runs.py: the table of a run, its logs, and what is said about what failed."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from launch.monitor import status
from launch.monitor.outcome import score_table, why
from launch.monitor.table import trouble
from launch.runs import main
from launch.state import progress
from launch.state.ledger import Entry, Ledger
from launch.state.locks import lock
from pneumo_dist import config as configuration
from pneumo_dist.chain import Node
from pneumo_dist.data.shards import HEADER_BYTES, image_name, size_name
from pneumo_dist.inference.film_plan import write_film_plan
from pneumo_dist.run import Run, RunFolder
from tests.unit.squeue import squeue


class Shown:
    """What a command printed, and its exit status."""

    def __init__(self, capfd: pytest.CaptureFixture[str], *words: object) -> None:
        self.status = main([str(word) for word in words])
        self.out, self.errors = capfd.readouterr()


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "runs" / "chest"
    folder.mkdir(parents=True)
    config = configuration.load(None, ["phantom.films=9", f"run_root={tmp_path}/runs"])
    (folder / "config.yaml").write_text(configuration.to_yaml(config))
    return folder


def add(run_dir: Path, key: str, **more: object) -> None:
    stage, _, fold = key.partition("-fold")
    same = {"key": key, "stage": stage.removeprefix("stage"), "fold": int(fold) if fold else None, "cluster": "slurm"}
    Ledger(RunFolder(run_dir)).append(Entry(**(same | more)))  # type: ignore[arg-type]


def fake(folder: Path, monkeypatch: pytest.MonkeyPatch, queue: list[str], sacct: str = "") -> None:
    for name, text in (("squeue", squeue(*queue)), ("sacct", sacct)):
        (folder / name).write_text(f"#!/bin/sh\ncat <<'END'\n{text}\nEND\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")


def inferred(run_dir: Path, films: Path) -> Path:
    """Plan an inference of seven films in three parts."""
    films.mkdir()
    for i in range(7):
        (films / f"{i}.png").write_bytes(b"x")
    write_film_plan(
        Run(run_dir, configuration.load(run_dir / "config.yaml", [f"infer.dir={films}", "infer.part_size=3"]))
    )
    return films


def row(run_dir: Path, key: str) -> status.Row:
    rows, _ = status.collect(Run.load(run_dir))
    return next(row for row in rows if row.node.key == key)


def test_every_job_of_the_chain_has_a_row(run_dir: Path) -> None:
    rows, note = status.collect(Run.load(run_dir))
    assert [r.node.key for r in rows][:5] == ["phantom", "preprocess", "finalize", "stage1-fold0", "stage2-fold0"]
    assert {r.state for r in rows} == {"-"} and note == ""


def test_states_are_slurms_own_words(run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add(run_dir, "stage1-fold0", job_id="4", name="stage1-fold0.chest", log="4_%r_log.out")
    add(run_dir, "stage2-fold0", job_id="5", name="stage2-fold0.chest")
    fake(
        tmp_path, monkeypatch,
        ["4|stage1-fold0.chest|RUNNING|None|node[1-2]|1", "5|stage2-fold0.chest|PENDING|Dependency|"],
        "4|NODE_FAIL|0:0|node1|stage1-fold0.chest\n4|RUNNING|0:0|node[1-2]|stage1-fold0.chest",
    )  # fmt: skip
    first, second = row(run_dir, "stage1-fold0"), row(run_dir, "stage2-fold0")
    assert (first.state, first.reason, first.nodes, first.attempts) == ("RUNNING", "after NODE_FAIL", "node[1-2]", 2)
    assert (second.state, second.reason) == ("PENDING", "Dependency")


def test_a_partly_done_array_is_counted(run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add(run_dir, "infer", job_id="8", name="infer.chest", elements=3, log="8_%a_%r_log.out")
    lines = ["8_0|infer.chest|COMPLETED|None|n1", "8_1|infer.chest|RUNNING|None|n2", "8_2|infer.chest|PENDING|x|"]
    fake(tmp_path, monkeypatch, lines)
    found = row(run_dir, "infer")
    assert (found.state, found.reason, found.nodes) == ("RUNNING", "1 of 3 done, 1 PENDING", "n1,n2")


def test_an_array_with_a_failed_element_names_that_elements_log(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add(run_dir, "infer", job_id="8", name="infer.chest", elements=3, log="8_%a_%r_log.out")
    rows = ["8_0|infer.chest|COMPLETED|x|n1", "8_1|infer.chest|FAILED|x|n2|0|256", "8_2|infer.chest|COMPLETED|x|n1"]
    fake(tmp_path, monkeypatch, rows)
    for element, text in enumerate(("error: passing trouble\n", "error: the film's folder has gone\n", "fine\n")):
        (run_dir / "jobs" / f"8_{element}_0_log.out").write_text(text)
    found = row(run_dir, "infer")
    assert (found.state, found.reason) == ("FAILED", "2 of 3 done, 1 FAILED, exit 1:0")
    assert found.error == "the film's folder has gone" and found.log and found.log.name == "8_1_0_log.out"


def test_without_accounting_the_log_tells_why_a_job_was_requeued(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add(run_dir, "stage1-fold0", job_id="4", name="stage1-fold0.chest", log="4_%r_log.out")
    fake(tmp_path, monkeypatch, ["4|stage1-fold0.chest|PENDING|BeginTime||1"])
    said = "slurmstepd: error: *** STEP 4.0 ON node1 CANCELLED AT 2026-01-01T00:00:00 DUE TO PREEMPTION ***\n"
    (run_dir / "jobs" / "4_0_log.out").write_text(said)
    found = row(run_dir, "stage1-fold0")
    assert (found.state, found.reason, found.attempts) == ("PENDING", "BeginTime, after PREEMPTED", 2)


def test_a_failed_job_is_shown_with_its_last_error_and_its_log(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    command = ["launch/submit.py", "--stage", "all", "--redo", "--after", "3", "--run", "chest"]
    more = {"name": "stage1-fold0.chest", "log": "4_%r_log.out", "extra": {"command": command}}
    add(run_dir, "stage1-fold0", job_id="4", **more)
    add(run_dir, "stage2-fold0", job_id="5", name="stage2-fold0.chest")
    fake(
        tmp_path, monkeypatch, ["5|stage2-fold0.chest|CANCELLED|DependencyNeverSatisfied|"],
        "4|FAILED|1:0|node[1-2]|stage1-fold0.chest",
    )  # fmt: skip
    (run_dir / "jobs" / "4_0_log.out").write_text(
        "12:00:00 I starts\nRuntimeError: Connection closed by peer [1.2.3.4]\n"
    )
    (run_dir / "jobs" / "4_1_log.out").write_text("Traceback ...\ntorch.OutOfMemoryError: CUDA out of memory.\n")
    found = row(run_dir, "stage1-fold0")
    assert found.failed and found.reason == "exit 1:0"
    shown = Shown(capfd, "status", run_dir).out
    assert "stage1-fold0 (job 4): FAILED (exit 1:0): torch.OutOfMemoryError: CUDA out of memory." in shown
    assert "jobs/4_1_log.out" in shown
    assert "repeat the same command, which continues: python launch/submit.py --stage all --run chest\n" in shown
    assert "cancelled because a job before did not end well: stage2-fold0" in shown


@pytest.mark.parametrize(
    ("reason", "said"),
    [("BadConstraints", "constraint, gres and mem_gb"), ("JobHeldAdmin", "scontrol release"), ("Priority", "")],
)
def test_a_job_that_waits_in_vain_is_said_to(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reason: str, said: str
) -> None:
    add(run_dir, "stage1-fold0", job_id="4", name="stage1-fold0.chest")
    fake(tmp_path, monkeypatch, [f"4|stage1-fold0.chest|PENDING|{reason}|"])
    text = trouble(status.collect(Run.load(run_dir))[0])
    assert said in text and bool(text) == bool(said) and "next:" not in text


def test_slurm_that_does_not_answer_is_said(run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add(run_dir, "stage1-fold0", job_id="4", name="stage1-fold0.chest")
    fake(tmp_path, monkeypatch, [])
    (tmp_path / "squeue").write_text("#!/bin/sh\necho 'Unable to contact slurm controller' >&2; exit 1\n")
    rows, note = status.collect(Run.load(run_dir))
    assert "does not answer" in note and any(r.state == "UNKNOWN" for r in rows)


def test_a_job_that_slurm_has_forgotten_is_told_by_its_files(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a site without accounting."""
    add(run_dir, "stage1-fold0", job_id="4", name="stage1-fold0.chest", log="4_%r_log.out")
    fake(tmp_path, monkeypatch, [])
    (run_dir / "jobs" / "4_0_log.out").write_text("slurmstepd: error: *** JOB 4 CANCELLED DUE TO TIME LIMIT ***\n")
    found = row(run_dir, "stage1-fold0")
    assert found.state == "ENDED" and found.failed and "TIME LIMIT" in found.error


@pytest.mark.parametrize(("parts", "state"), [(3, "COMPLETED"), (2, "ENDED")])
def test_an_array_that_slurm_has_forgotten_ended_well_where_all_its_parts_are_there(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, parts: int, state: str
) -> None:
    films = inferred(run_dir, tmp_path / "films")
    for part in range(parts):
        (run_dir / "infer" / "films" / "parts" / f"part-{part:05d}").mkdir(parents=True)
    add(run_dir, "infer", job_id="8", name="infer.chest", elements=3)
    add(run_dir, "merge", job_id="9", name="merge.chest")
    fake(tmp_path, monkeypatch, ["9|merge.chest|PENDING|Priority|"])
    config = configuration.load(run_dir / "config.yaml", [f"infer.dir={films}", "infer.part_size=3"])
    (run_dir / "jobs" / "infer.yaml").write_text(configuration.to_yaml(config))
    assert row(run_dir, "infer").state == state
    assert bool(trouble(status.collect(Run.load(run_dir))[0])) == (state == "ENDED")


def test_a_job_is_read_with_the_settings_of_its_newest_submission(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Another folder to infer on stands in the job's own configuration only."""
    for name in ("infer", "merge"):
        add(run_dir, name, job_id="8", name=f"{name}.chest")
    fake(tmp_path, monkeypatch, [], "8|FAILED|1:0|n1|infer.chest")
    first = run_dir / "infer" / "dicom-images-train"
    first.mkdir(parents=True)
    (first / "DONE.json").write_text(json.dumps({"settings": {}, "inputs": {}, "outputs": {}}))
    (first / "submission.csv").touch()
    assert row(run_dir, "infer").state == row(run_dir, "merge").state == "done"
    other = configuration.load(run_dir / "config.yaml", [f"infer.dir={tmp_path / 'other'}"])
    for name in ("infer", "merge"):
        (run_dir / "jobs" / f"{name}.yaml").write_text(configuration.to_yaml(other))
    assert row(run_dir, "infer").state == "FAILED"
    (run_dir / "infer" / "other").mkdir()
    (run_dir / "infer" / "other" / "submission.csv").touch()
    out = Shown(capfd, "status", run_dir).out
    assert "infer/other/submission.csv" in out and "dicom-images-train/submission.csv" not in out
    (run_dir / "jobs" / "infer.yaml").write_text("no: setting")
    assert row(run_dir, "infer").state == "done"  # damaged: the run's own


@pytest.mark.parametrize(("queued", "helped"), [("RUNNING|None|n2", False), ("PENDING|JobHeldAdmin|", True)])
def test_what_a_job_has_recovered_from_needs_no_advice(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, queued: str, helped: bool
) -> None:
    add(run_dir, "stage1-fold0", job_id="4", name="stage1-fold0.chest")
    before = "4|NODE_FAIL|0:0|n1|stage1-fold0.chest\n"
    state = queued.partition("|")[0]
    fake(tmp_path, monkeypatch, [f"4|stage1-fold0.chest|{queued}|1"], f"{before}4|{state}|0:0|n2|stage1-fold0.chest")
    rows, _ = status.collect(Run.load(run_dir))
    assert any("after NODE_FAIL" in r.reason for r in rows)
    text = trouble(rows)
    assert "a node died" not in text and ("scontrol release" in text) == helped


@pytest.mark.parametrize(
    ("exit_status", "state"), [(0, "COMPLETED"), (1, "FAILED"), (130, "INTERRUPTED"), (None, "KILLED")]
)
def test_how_a_local_job_ended(run_dir: Path, exit_status: int | None, state: str) -> None:
    add(run_dir, "swa-fold0", cluster="local", log="local-swa-fold0-%r.out")
    if exit_status is not None:
        add(run_dir, "swa-fold0", cluster="local", event="ended", status=exit_status)
    assert row(run_dir, "swa-fold0").state == state


def test_a_local_job_that_runs(run_dir: Path) -> None:
    add(run_dir, "swa-fold0", cluster="local", job_id=str(os.getpid()))
    held = lock(RunFolder(run_dir).lock("swa-fold0"))
    assert row(run_dir, "swa-fold0").state == "RUNNING"
    held.release()


def test_a_killed_local_job_waits_while_a_later_command_is_at_another_one(run_dir: Path) -> None:
    add(run_dir, "swa-fold0", cluster="local", job_id="1")
    held = lock(RunFolder(run_dir).lock("swa-fold0"))
    found = row(run_dir, "swa-fold0")
    assert found.state == "PENDING" and found.reason.startswith(f"its turn comes; process {os.getpid()} on ")
    held.release()
    assert row(run_dir, "swa-fold0").state == "KILLED"


def test_progress_and_time_left(run_dir: Path) -> None:
    (run_dir / "fold0" / "stage1").mkdir(parents=True)
    same = {"epochs": 10, "steps": 1000}
    line = same | {"epoch": 2, "step": 200, "images_per_s": 64.0, "dice": 0.4, "best_dice": 0.5, "best_epoch": 1}
    metrics = run_dir / "fold0" / "stage1" / "metrics.jsonl"
    metrics.write_text(json.dumps(line) + "\n")
    found = row(run_dir, "stage1-fold0")
    assert found.score == "Dice 0.4000, best 0.5000 (epoch 1)"
    assert found.progress and found.progress.text.startswith("epoch 2/10")  # by a plain script: never submitted
    add(run_dir, "stage1-fold0", cluster="local", job_id=str(os.getpid()))
    held = lock(RunFolder(run_dir).lock("stage1-fold0"))
    assert str(row(run_dir, "stage1-fold0").progress) == "epoch 2/10, step 200/1000, 64.0 images/s, 13 min left"
    os.utime(metrics, (1, 1))
    live = same | {"epoch": 3, "step": 250, "images_per_s": 32.0}
    (metrics.parent / "progress.json").write_text(json.dumps(live))
    found = row(run_dir, "stage1-fold0")
    assert str(found.progress) == "epoch 3/10, step 250/1000, 32.0 images/s, 25 min left"
    held.release()


def test_films_of_an_array_are_counted_from_its_files(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = configuration.load(run_dir / "config.yaml")
    begin = time.time() - 100
    add(run_dir, "preprocess", job_id="7", elements=2)
    shards = run_dir / "shards"
    shards.mkdir()
    for shard, at in ((0, 20), (1, 30), (2, 40)):
        for size in config.sizes:
            (shards / image_name(size, shard, 8)).write_bytes(bytes(HEADER_BYTES + 5 * size * size))
            part = shards / size_name(size, shard, 8)
            part.write_text("{}")
            os.utime(part, (begin + at, begin + at))
    node = Node("preprocess", None, ())
    monkeypatch.setattr(time, "time", lambda: begin + 40)
    found = progress.of(Run(run_dir, config), node, begin)
    assert str(found) == "15 of about 40 films (shard 3 of 8), 0.5 films/s, 50 s left"
    assert (
        str(progress.of(Run(run_dir, config), node, begin + 35)) == "15 of about 40 films (shard 3 of 8)"
    )  # of an earlier job


def test_films_of_an_inference_are_counted_by_finished_parts(run_dir: Path) -> None:
    config = configuration.load(run_dir / "config.yaml", [f"infer.dir={run_dir / 'films'}", "infer.part_size=3"])
    node = Node("infer", None, ())
    assert progress.of(Run(run_dir, config), node) is None
    inferred(run_dir, run_dir / "films")
    for part in (0, 2):
        (run_dir / "infer" / "films" / "parts" / f"part-{part:05d}").mkdir(parents=True)
    found = progress.of(Run(run_dir, config), node)
    assert found and found.text.startswith("4 of 7 films (part 2 of 3)") and found.share == 4 / 7


def test_the_line_that_tells_why_is_the_newest_attempts_first_hand_one(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text(
        "--- 2025-01-01 00:00:00 -m x\nerror: an old mistake\n--- 2025-01-01 00:01:00 -m x\n"
        "Traceback (most recent call last):\n  File x\nValueError: the real reason\n"
        "RuntimeError: [x] Connection closed by peer [127.0.0.1]:4\nsrun: error: node2: task 1: Exited with 1\n"
    )
    assert why([log]) == ("ValueError: the real reason", log)
    log.write_text(
        "OSError: [Errno 28] No space left on device\nDuring handling of the above exception, another one occurred:\n"
        "RuntimeError: [enforce fail at inline_container.cc:672] . unexpected pos 28045824 vs 28045720\n"
    )
    assert why([log]) == ("OSError: [Errno 28] No space left on device", log)
    log.write_text("/usr/bin/env: '/opt/python': No such file or directory\nsrun: error: n1: task 0: Exited with 127\n")
    assert why([log]) == ("/usr/bin/env: '/opt/python': No such file or directory", log)
    told = "srun: error: n2: task 1: Killed"
    after = "srun: error: n1: task 0: Exited with 1\nsrun: error: n3: task 2: Terminated\n"
    log.write_text(f"RuntimeError: [x] Connection closed by peer\n{told}\n{after}")
    assert why([log]) == (told, log)
    log.write_text("all is well\n")
    assert why([log, tmp_path / "none"]) is None


def test_logs_prints_a_ranks_newest_log(run_dir: Path, capfd: pytest.CaptureFixture[str]) -> None:
    add(run_dir, "stage1-fold0", job_id="4", log="4_%r_log.out")
    for rank in range(11):
        (run_dir / "jobs" / f"4_{rank}_log.out").write_text(f"rank {rank}\n")
    assert Shown(capfd, "logs", run_dir, "1", "--rank", 10).out == "rank 10\n"
    assert Shown(capfd, "logs", run_dir).out == "rank 0\n"
    wrong = Shown(capfd, "logs", run_dir, "1", "--rank", 11)
    assert wrong.status == 2 and "0 to 10" in wrong.errors
    assert Shown(capfd, "logs", run_dir, "swa").status == 2


def test_following_a_log_waits_for_the_newest_submissions_own(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def interrupted(_: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(time, "sleep", interrupted)  # where it would wait
    for job in ("4", "5"):
        add(run_dir, "stage1-fold0", job_id=job, log=f"{job}_%r_log.out")
        add(run_dir, "stage2-fold0", job_id=f"{job}0", log=f"{job}0_%r_log.out")
    for job in ("4", "40"):
        (run_dir / "jobs" / f"{job}_0_log.out").write_text(f"of job {job}\n")
    assert Shown(capfd, "logs", run_dir, "1").out == "of job 4\n"
    for words in (["1"], []):
        waiting = Shown(capfd, "logs", run_dir, *words, "-f")
        assert waiting.status == 130 and waiting.out == ""
    (run_dir / "jobs" / "5_0_log.out").write_text("of job 5\n")
    for words in (["1"], []):  # stage 2 of the same submission has none yet
        assert Shown(capfd, "logs", run_dir, *words, "-f").out == "of job 5\n"


def test_list_and_wrong_names(run_dir: Path, capfd: pytest.CaptureFixture[str]) -> None:
    shown = Shown(capfd, "list", "--run-root", run_dir.parent)
    assert shown.status == 0 and "chest" in shown.out and "0/9 done" in shown.out
    for words in (("status", "nope"), ("logs", "nope"), ("cancel", "nope"), ("tensorboard", "nope"), ("stats",), ()):
        wrong = Shown(capfd, *words)
        assert wrong.status == 2 and len(wrong.errors.splitlines()) == 1, wrong.errors


def test_scores_stand_beside_those_of_calling_every_film_empty(tmp_path: Path) -> None:
    entry = {"dice": 0.8, "dice_positive": 0.4, "sensitivity": 0.9, "specificity": None, "mask_threshold": 0.5}
    scores = {"films": 20, "patients": 9, "positive": 5, "dice_all_empty": 0.75, "headline": {"fixed": entry}}
    (tmp_path / "scores.json").write_text(json.dumps(scores))
    text = "\n".join(score_table(tmp_path))
    assert "every film empty" in text and "0.7500" in text and "fixed threshold 0.5" in text and "0.8000" in text
    assert score_table(tmp_path / "none") == []

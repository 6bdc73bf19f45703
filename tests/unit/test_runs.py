"""runs.py: the table of a run, its logs, and the messages on failed jobs."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from launch.monitor import status
from launch.monitor.causes import STATES
from launch.monitor.outcome import failure_line
from launch.monitor.scores import score_table
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
    """The output of a command and its exit status."""

    def __init__(self, capfd: pytest.CaptureFixture[str], *arguments: object) -> None:
        self.status = main([str(argument) for argument in arguments])
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


def answer(run_dir: Path) -> status.SlurmAnswer:
    return status.query_slurm([RunFolder(run_dir)])


def all_rows(run_dir: Path) -> list[status.Row]:
    return status.job_rows(Run.load(run_dir), answer(run_dir))


def row(run_dir: Path, key: str) -> status.Row:
    return next(row for row in all_rows(run_dir) if row.node.key == key)


def test_every_job_of_the_chain_has_a_row(run_dir: Path) -> None:
    rows = all_rows(run_dir)
    assert [r.node.key for r in rows][:5] == ["phantom", "preprocess", "finalize", "stage1-fold0", "stage2-fold0"]
    assert {r.state for r in rows} == {"-"} and answer(run_dir).note == ""


def test_states_are_those_of_slurm(run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
    job = row(run_dir, "infer")
    assert (job.state, job.reason, job.nodes) == ("RUNNING", "1 of 3 done, 1 PENDING", "n1,n2")


def test_an_array_with_a_failed_task_names_the_log_of_that_task(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add(run_dir, "infer", job_id="8", name="infer.chest", elements=3, log="8_%a_%r_log.out")
    rows = ["8_0|infer.chest|COMPLETED|x|n1", "8_1|infer.chest|FAILED|x|n2|0|256", "8_2|infer.chest|COMPLETED|x|n1"]
    fake(tmp_path, monkeypatch, rows)
    for element, text in enumerate(("error: passing trouble\n", "error: the film's folder has gone\n", "fine\n")):
        (run_dir / "jobs" / f"8_{element}_0_log.out").write_text(text)
    job = row(run_dir, "infer")
    assert (job.state, job.reason) == ("FAILED", "2 of 3 done, 1 FAILED, exit 1:0")
    assert job.error == "the film's folder has gone" and job.log and job.log.name == "8_1_0_log.out"


def test_without_accounting_the_log_gives_the_reason_of_a_requeue(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add(run_dir, "stage1-fold0", job_id="4", name="stage1-fold0.chest", log="4_%r_log.out")
    fake(tmp_path, monkeypatch, ["4|stage1-fold0.chest|PENDING|BeginTime||1"])
    message = "slurmstepd: error: *** STEP 4.0 ON node1 CANCELLED AT 2026-01-01T00:00:00 DUE TO PREEMPTION ***\n"
    (run_dir / "jobs" / "4_0_log.out").write_text(message)
    job = row(run_dir, "stage1-fold0")
    assert (job.state, job.reason, job.attempts) == ("PENDING", "BeginTime, after PREEMPTED", 2)


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
    job = row(run_dir, "stage1-fold0")
    assert job.failed and job.reason == "exit 1:0"
    shown = Shown(capfd, "status", run_dir).out
    assert "stage1-fold0 (job 4): FAILED (exit 1:0): torch.OutOfMemoryError: CUDA out of memory." in shown
    assert "jobs/4_1_log.out" in shown
    assert "repeat the same command to continue: python launch/submit.py --stage all --run chest\n" in shown
    assert "cancelled because an earlier job did not complete: stage2-fold0" in shown


@pytest.mark.parametrize(
    ("reason", "advice"),
    [("BadConstraints", "constraint, gres and mem_gb"), ("JobHeldAdmin", "scontrol release"), ("Priority", "")],
)
def test_a_job_that_would_wait_forever_gets_advice(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reason: str, advice: str
) -> None:
    add(run_dir, "stage1-fold0", job_id="4", name="stage1-fold0.chest")
    fake(tmp_path, monkeypatch, [f"4|stage1-fold0.chest|PENDING|{reason}|"])
    text = trouble(all_rows(run_dir))
    assert advice in text and bool(text) == bool(advice) and "next:" not in text


def test_a_slurm_that_does_not_answer_is_reported(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add(run_dir, "stage1-fold0", job_id="4", name="stage1-fold0.chest")
    fake(tmp_path, monkeypatch, [])
    (tmp_path / "squeue").write_text("#!/bin/sh\necho 'Unable to contact slurm controller' >&2; exit 1\n")
    assert "does not answer" in answer(run_dir).note
    assert any(r.state == "UNKNOWN" for r in all_rows(run_dir))


def test_a_job_that_slurm_has_forgotten_is_shown_by_its_files(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a site without accounting."""
    add(run_dir, "stage1-fold0", job_id="4", name="stage1-fold0.chest", log="4_%r_log.out")
    fake(tmp_path, monkeypatch, [])
    (run_dir / "jobs" / "4_0_log.out").write_text("slurmstepd: error: *** JOB 4 CANCELLED DUE TO TIME LIMIT ***\n")
    job = row(run_dir, "stage1-fold0")
    assert job.state == "ENDED" and job.failed and "TIME LIMIT" in job.error


@pytest.mark.parametrize(("parts", "state"), [(3, "COMPLETED"), (2, "ENDED")])
def test_an_array_that_slurm_has_forgotten_is_completed_when_all_its_parts_exist(
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
    assert bool(trouble(all_rows(run_dir))) == (state == "ENDED")


def test_a_job_is_read_with_the_settings_of_its_newest_submission(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Only the job's own configuration names another folder to infer on."""
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
def test_a_failure_that_the_job_recovered_from_gets_no_advice(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, queued: str, helped: bool
) -> None:
    add(run_dir, "stage1-fold0", job_id="4", name="stage1-fold0.chest")
    before = "4|NODE_FAIL|0:0|n1|stage1-fold0.chest\n"
    state = queued.partition("|")[0]
    fake(tmp_path, monkeypatch, [f"4|stage1-fold0.chest|{queued}|1"], f"{before}4|{state}|0:0|n2|stage1-fold0.chest")
    rows = all_rows(run_dir)
    assert any("after NODE_FAIL" in r.reason for r in rows)
    text = trouble(rows)
    assert STATES["NODE_FAIL"] not in text and ("scontrol release" in text) == helped


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
    job = row(run_dir, "swa-fold0")
    assert job.state == "PENDING" and job.reason.startswith(f"waits for stage 2; process {os.getpid()} on ")
    held.release()
    assert row(run_dir, "swa-fold0").state == "KILLED"


def test_a_local_job_that_has_not_started_waits_for_the_stage_before_it(run_dir: Path) -> None:
    locks = [lock(RunFolder(run_dir).lock(key)) for key in ("phantom", "stage2-fold0")]
    process = f"process {os.getpid()} on "
    first, waiting = row(run_dir, "phantom"), row(run_dir, "stage2-fold0")
    assert first.state == waiting.state == "PENDING"
    assert first.reason.startswith(f"waits; {process}") and waiting.reason.startswith(f"waits for stage 1; {process}")
    for held in locks:
        held.release()


def test_progress_and_time_left(run_dir: Path) -> None:
    (run_dir / "fold0" / "stage1").mkdir(parents=True)
    same = {"epochs": 10, "steps": 1000}
    scores = {"dice": 0.8, "dice_positive": 0.4, "auc": 0.75, "best": 0.3, "best_epoch": 1, "alarm": ""}
    line = same | {"epoch": 2, "step": 200, "images_per_s": 64.0, **scores}
    metrics = run_dir / "fold0" / "stage1" / "metrics.jsonl"
    metrics.write_text(json.dumps(line) + "\n")
    job = row(run_dir, "stage1-fold0")
    assert job.score == "Dice on positives 0.4000, AUC 0.7500, best epoch 1"
    assert job.progress and job.progress.text.startswith("epoch 2/10")  # by a plain script: never submitted
    collapsed = line | {"dice_positive": 0.0, "auc": None, "alarm": "the network has collapsed"}
    metrics.write_text(json.dumps(collapsed) + "\n")
    assert row(run_dir, "stage1-fold0").score == "Dice on positives 0.0000, best epoch 1; WARNING (see its log)"
    metrics.write_text(json.dumps(line) + "\n")
    add(run_dir, "stage1-fold0", cluster="local", job_id=str(os.getpid()))
    held = lock(RunFolder(run_dir).lock("stage1-fold0"))
    assert str(row(run_dir, "stage1-fold0").progress) == "epoch 2/10, step 200/1000, 64.0 images/s, 13 min left"
    os.utime(metrics, (1, 1))
    live = same | {"epoch": 3, "step": 250, "images_per_s": 32.0}
    (metrics.parent / "progress.json").write_text(json.dumps(live))
    job = row(run_dir, "stage1-fold0")
    assert str(job.progress) == "epoch 3/10, step 250/1000, 32.0 images/s, 25 min left"
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
    measured = progress.of(Run(run_dir, config), node, begin)
    assert str(measured) == "15 of about 40 films (shard 3 of 8), 0.5 films/s, 50 s left"
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
    measured = progress.of(Run(run_dir, config), node)
    assert measured and measured.text.startswith("4 of 7 films (part 2 of 3)")
    assert measured.share == 4 / 7


def test_the_failure_line_is_the_own_error_of_the_newest_attempt(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text(
        "--- 2025-01-01 00:00:00 -m x\nerror: an old mistake\n--- 2025-01-01 00:01:00 -m x\n"
        "Traceback (most recent call last):\n  File x\nValueError: the real reason\n"
        "RuntimeError: [x] Connection closed by peer [127.0.0.1]:4\nsrun: error: node2: task 1: Exited with 1\n"
    )
    assert failure_line([log]) == ("ValueError: the real reason", log)
    log.write_text(
        "OSError: [Errno 28] No space left on device\nDuring handling of the above exception, another one occurred:\n"
        "RuntimeError: [enforce fail at inline_container.cc:672] . unexpected pos 28045824 vs 28045720\n"
    )
    assert failure_line([log]) == ("OSError: [Errno 28] No space left on device", log)
    log.write_text("/usr/bin/env: '/opt/python': No such file or directory\nsrun: error: n1: task 0: Exited with 127\n")
    assert failure_line([log]) == ("/usr/bin/env: '/opt/python': No such file or directory", log)
    killed = "srun: error: n2: task 1: Killed"
    after = "srun: error: n1: task 0: Exited with 1\nsrun: error: n3: task 2: Terminated\n"
    log.write_text(f"RuntimeError: [x] Connection closed by peer\n{killed}\n{after}")
    assert failure_line([log]) == (killed, log)
    log.write_text("all is well\n")
    assert failure_line([log, tmp_path / "none"]) is None


def test_logs_prints_a_ranks_newest_log(run_dir: Path, capfd: pytest.CaptureFixture[str]) -> None:
    add(run_dir, "stage1-fold0", job_id="4", log="4_%r_log.out")
    for rank in range(11):
        (run_dir / "jobs" / f"4_{rank}_log.out").write_text(f"rank {rank}\n")
    assert Shown(capfd, "logs", run_dir, "1", "--rank", 10).out == "rank 10\n"
    assert Shown(capfd, "logs", run_dir).out == "rank 0\n"
    wrong = Shown(capfd, "logs", run_dir, "1", "--rank", 11)
    assert wrong.status == 2 and "0 to 10" in wrong.errors
    assert Shown(capfd, "logs", run_dir, "swa").status == 2


def test_following_a_log_waits_for_that_of_the_newest_submission(
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


def test_scores_are_shown_with_the_all_empty_baseline(tmp_path: Path) -> None:
    entry = {"dice": 0.8, "dice_positive": 0.4, "sensitivity": 0.9, "specificity": None, "mask_threshold": 0.5}
    headline = {"fixed": entry, "cross_fitted": entry}
    scores = {"films": 20, "patients": 9, "positive": 5, "dice_all_empty": 0.75, "headline": headline}
    (tmp_path / "scores.json").write_text(json.dumps(scores))
    _, *lines = score_table(tmp_path)
    assert len({len(line) for line in lines}) == 1, "the columns are aligned"
    text = "\n".join(lines)
    assert "thresholds tuned by cross-fitting " in text
    assert "all empty (baseline)" in text and "0.7500" in text and "fixed threshold 0.5" in text and "0.8000" in text
    assert score_table(tmp_path / "none") == []


def test_score_counts_the_films_that_are_predicted_positive(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    submission, truth = tmp_path / "submission.csv", tmp_path / "truth.csv"
    submission.write_text("ImageId,EncodedPixels\na,0 10\nb,0 20\nc,-1\nd,-1\n")
    truth.write_text("ImageId,EncodedPixels\na,0 10\nb,-1\nc,-1\n")
    shown = Shown(capfd, "score", submission, "--truth", truth)
    assert shown.status == 0 and shown.out.startswith("3 films, 1 with pneumothorax, 2 predicted positive\n")
    assert "not scored: 1 films of the submission without annotation" in shown.out
    assert "unreadable films unknown: no predictions.csv beside the submission\n" in shown.out
    assert "dice              0.6667   95 % interval by film: " in shown.out


def test_films_without_an_answer_are_reported_by_validate_and_score(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    submission, truth, films = tmp_path / "submission.csv", tmp_path / "truth.csv", tmp_path / "films"
    films.mkdir()
    (films / "c.dcm").write_bytes(b"")
    (tmp_path / "predictions.csv").write_text("film,top_score,rows,columns\na,0.9,,\nb,0.1,,\nc,,,\nd,,,\n")
    truth.write_text("ImageId,EncodedPixels\na,0 10\nb,-1\nc,0 7\nd,-1\n")
    submission.write_text("ImageId,EncodedPixels\na,0 10\nb,-1\nd,-1\n")
    shown = Shown(capfd, "score", submission, "--truth", truth)
    assert shown.out.startswith("2 films, 1 with pneumothorax, 1 predicted positive\n")
    line = "not scored: 2 annotated films (1 with pneumothorax) without an answer, because they are unreadable\n"
    assert shown.status == 0 and line in shown.out
    submission.write_text("ImageId,EncodedPixels\n")
    shown = Shown(capfd, "validate", submission, "--against", films)
    line = "no answer for 1 of 1 films: unreadable, no row (first: c)\n"
    assert shown.status == 0 and shown.out == f"{line}{submission}: valid\n"
    submission.write_text("ImageId,EncodedPixels\nc,-1\n")
    shown = Shown(capfd, "validate", submission, "--against", films)
    line = "no answer for 1 of 1 films: unreadable, a row of -1, which is not a finding (first: c)\n"
    assert shown.status == 0 and shown.out == f"{line}{submission}: valid\n"


def test_validate_exits_with_1_for_a_submission_that_is_not_valid(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    submission, films = tmp_path / "submission.csv", tmp_path / "films.csv"
    submission.write_text("ImageId,EncodedPixels\na,-1\n")
    films.write_text("ImageId,EncodedPixels\na,-1\n")
    shown = Shown(capfd, "validate", submission, "--against", films)
    assert shown.status == 0 and shown.out.endswith("submission.csv: valid\n")
    films.write_text("ImageId,EncodedPixels\na,-1\nb,-1\n")
    shown = Shown(capfd, "validate", submission, "--against", films)
    assert shown.status == 1 and shown.out.endswith("submission.csv: 1 problem\n")


def test_cancel_names_the_jobs_and_the_process_on_this_machine(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    add(run_dir, "stage1-fold0", job_id="4", name="stage1-fold0.chest")
    add(run_dir, "stage2-fold0", job_id="5", name="stage2-fold0.chest")
    rows = ["4|stage1-fold0.chest|RUNNING|None|n1", "5|stage2-fold0.chest|PENDING|Dependency|"]
    fake(tmp_path, monkeypatch, rows)
    (tmp_path / "scancel").write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/cancelled\n')
    (tmp_path / "scancel").chmod(0o755)
    shown = Shown(capfd, "cancel", run_dir, "1")
    assert shown.status == 0 and shown.out.startswith("stage1-fold0: job 4 cancelled\n")
    assert (tmp_path / "cancelled").read_text() == "4\n"
    fake(tmp_path, monkeypatch, [])
    assert Shown(capfd, "cancel", run_dir).out == "no job is waiting or running\n"
    held = lock(RunFolder(run_dir).lock("stage2-fold0"))
    assert "stop it with Ctrl-C there" in Shown(capfd, "cancel", run_dir).out
    held.release()

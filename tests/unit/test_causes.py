"""`status` names the cause of a failure, whatever follows from it in the logs, and says what to do about it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from launch.monitor import status
from launch.monitor.causes import advice
from launch.monitor.outcome import failure_line
from launch.monitor.table import trouble
from pneumo_dist.run import RunFolder
from tests.unit.test_runs import add, all_rows, fake, run_dir

__all__ = ["run_dir"]

PORT = (
    "torch.distributed.DistNetworkError: The server socket has failed to listen on any local network address. "
    "port: 29500, useIpv6: false, code: -98, name: EADDRINUSE, message: address already in use"
)
ENDED_BY_SRUN = """\
srun: launch/slurm: _step_signal: Terminating StepId=14.0
slurmstepd-node1: error: *** STEP 14.0 ON node1 CANCELLED AT 2026-11-25T17:08:00 ***
{}
srun: Force Terminated StepId=14.0
"""
GLOO = "RuntimeError: [/pytorch/third_party/gloo/gloo/transport/tcp/"
# (log of each rank, what the line has, what the advice has): SLURM's and gloo's own words.
LOGS = {
    "another rank is killed after a port in use": (
        [f"{PORT}\nsrun: error: node1: task 0: Exited with exit code 1\n"
         + ENDED_BY_SRUN.format("srun: error: node2: task 1: Killed"), ""],
        "EADDRINUSE", "listens on the port",
    ),
    "a rank's own error after which another one is killed": (
        ["srun: error: node2: task 1: Exited with exit code 1\n" + ENDED_BY_SRUN.format("srun: error: node1: task 0: Killed"),
         "ValueError: the cause\n"],
        "ValueError: the cause", "",
    ),
    "a rank that was killed": (
        [f"{GLOO}pair.cc:537] Read error [10.0.0.2]:34498: Connection reset by peer.\n"
         "srun: error: node2: task 1: Killed\n" + ENDED_BY_SRUN.format("srun: error: node1: task 0: Terminated")],
        "task 1: Killed", "mem_gb",
    ),
    "a rank of which srun only says how it ended": (
        ["srun: error: node1: task 0: Exited with exit code 7\n" + ENDED_BY_SRUN.format("srun: error: n2: task 1: Killed")],
        "task 0: Exited with exit code 7", "",
    ),
    "srun refuses": (
        ["srun: fatal: SLURM_MEM_PER_CPU, SLURM_MEM_PER_GPU, and SLURM_MEM_PER_NODE are mutually exclusive.\n"],
        "mutually exclusive", "`env` in the profile",
    ),
    "srun has no step": (
        ["srun: error: Unable to create step for job 5: Memory required by task is not available\n"],
        "Unable to create step", "`srun`",
    ),
    "sbatch refuses in a job": (["sbatch: error: Batch job submission failed: Invalid qos\n"], "Invalid qos", "`sbatch`"),
    "a program that the node lacks": (
        ["slurmstepd-node1: error: execve(): /nope/python: No such file or directory\n"
         "srun: error: node1: task 0: Exited with exit code 2\n"],
        "execve(): /nope/python", "all nodes mount",
    ),
    "env without the program": (
        ["env: '/opt/python': No such file or directory\nsrun: error: n1: task 0: Exited with exit code 127\n"],
        "/opt/python", "all nodes mount",
    ),
    "a set-up line": (
        ["/var/spool/slurmd/job00019/slurm_script: line 9: module: command not found\n"], "module", "`setup`",
    ),
    "a step's log": (
        ["slurmstepd: error: Could not open stdout file /r/jobs/4_1_log.out: No such file or directory\n"
         "slurmstepd: error: IO setup failed: No such file or directory\n"],
        "IO setup failed", "renamed",
    ),
    "cgroup out of memory, 22.05": (
        [f"{GLOO}pair.cc:537] Connection closed by peer\nsrun: error: node1: task 0: Exited with exit code 1\n"
         "slurmstepd: error: Detected 1 oom-kill event(s) in StepId=12.0. Some of your processes may have been killed by "
         "the cgroup out-of-memory handler.\nsrun: error: node2: task 1: Out Of Memory\n"],
        "oom-kill", "mem_gb",
    ),
    "cgroup out of memory, 23.11": (
        ["slurmstepd: error: Detected 1 oom_kill event in StepId=12.batch. Some of the step tasks have been OOM Killed.\n"],
        "OOM Killed", "mem_gb",
    ),
    "suspended, gloo": (
        [f"{GLOO}pair.cc:537] Connection closed by peer [10.0.0.2]:34498\n",
         f"{GLOO}unbound_buffer.cc:78] Timed out waiting 300000ms for recv operation to complete\n"],
        "Timed out waiting", "train.timeout_s",
    ),
    "suspended, an older gloo": (
        [f"{GLOO}pair.cc:598] Application timeout caused pair closure\n"], "pair closure", "suspended",
    ),
    "suspended, NCCL": (
        ["[rank1]:[E1125 12:00:00.1 ProcessGroupNCCL.cpp:632] [Rank 1] Watchdog caught collective operation timeout: "
         "WorkNCCL(SeqNum=4)\nsrun: error: n2: task 1: Aborted\n"],
        "Watchdog", "train.timeout_s",
    ),
    "a host that calls itself a loopback": (
        [f"{GLOO}socket.cc:93] connect: Connection refused, remote=[127.0.1.1]:40311\n"], "127.0.1.1", "/etc/hosts",
    ),
    "shared memory": (["srun: error: n1: task 0: Bus error\n"], "Bus error", "/dev/shm"),
    "an error of another attempt": (
        [f"{PORT}\nsubmitit INFO (2026-11-25 17:28:02,371) - Starting with JobEnvironment(job_id=23)\nKeyError: 'x'\n"],
        "KeyError", "",
    ),
    "harmless lines around a rank's own error": (
        ["/var/spool/slurmd/job00019/slurm_script: line 9: module: command not found\ncat: /opt/x: Permission denied\n"
         "slurmstepd: error: couldn't chdir to `/r': No such file or directory: going to /tmp instead\n"
         "srun: error: Unable to create step for job 5: Job/step already completing or completed\n"
         "12:00:00 I no space left on device: trying the next one\n",
         "12:00:00 [rank 1] W No space left on device: no picture\nKeyError: '/data/room_killer'\n"],
        "KeyError", "",
    ),
    "only harmless lines and a set-up line": (
        ["/x/slurm_script: line 9: module: command not found\n"
         "slurmstepd: error: couldn't chdir to `/r': No such file or directory: going to /tmp instead\n"],
        "module", "`setup`",
    ),
    "ranks that did not come, and why": (
        ["error: rank 0 of 2 on n1: of 2 ranks, rank 1 did not come to n1, port 3; the others are on n1: see the log\n",
         "error: rank 1 of 2 on n2: the job has GPUs (GPUS=1), but torch 2 (CUDA 13.0) sees none, with no driver\n"],
        "sees none", "",
    ),
    "ranks that did not meet": (
        ["error: rank 0 of 2 on n1: of 2 ranks, rank 1 did not come to n1, port 3; the others are on n1: see the log\n"
         "srun: error: n1: task 0: Exited with exit code 1\n",
         "error: rank 1 of 2 on n2: rank 0 was not found at n1 (10.0.0.1), ports 3, ... (Connection reset by peer)\n"],
        "did not come", "",
    ),
    "equal ends of tasks": (
        ["srun: error: n1: task 0: Killed\nsrun: error: n1: task 0: Killed\n"], "task 0: Killed", "mem_gb",
    ),
    "a port that was in use, said in passing": (
        ["12:00:00 W port 29500: address already in use, trying 29501\nKeyError: 'x'\n"], "KeyError", "",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LOGS)
def test_the_first_cause_is_named_with_what_to_do(tmp_path: Path, name: str) -> None:
    texts, line, wanted = LOGS[name]
    logs = [tmp_path / f"{rank}" for rank in range(len(texts))]
    for log, text in zip(logs, texts, strict=True):
        log.write_text(text)
    found = failure_line(logs)
    assert found and line in found[0]
    helped = advice(found[0], "FAILED", "exit 1:0")
    assert wanted in helped and bool(helped) == bool(wanted)


def test_a_status_is_not_looked_for_within_other_words() -> None:
    assert advice("", "PENDING", "waits for stage 1; process 7 on 10.0.0.1:5312") == ""
    assert advice("", "FAILED", "exit 15:53, ") == advice("", "FAILED", "exit 0:53") != ""


@pytest.mark.parametrize(
    ("queued", "said"),
    [
        ("FAILED|JobLaunchFailure|n1|0|4021", ("FAILED (exit 15:53)", "renamed, moved or removed")),
        ("SUSPENDED|None|n1", ("SUSPENDED", "continues by itself")),
    ],
)
def test_what_only_slurm_knows_is_explained(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, queued: str, said: tuple[str, str]
) -> None:
    add(run_dir, "stage1-fold0", job_id="4", name="stage1-fold0.chest", log="4_%r_log.out")
    fake(tmp_path, monkeypatch, [f"4|stage1-fold0.chest|{queued}"])
    text = trouble(all_rows(run_dir))
    assert all(words in text for words in said)


def test_two_hundred_runs_are_one_question_to_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake(tmp_path, monkeypatch, [])
    for name in ("squeue", "sacct"):
        (tmp_path / name).write_text(f'#!/bin/sh\necho "{name} $*" >> {tmp_path}/asked\n')
    runs = [RunFolder(tmp_path / "runs" / str(i)) for i in range(200)]
    for i, run in enumerate(runs):
        run.jobs_dir.mkdir(parents=True)
        entries = [  # the older ones are not asked for
            {"key": "stage1-fold0", "stage": "1", "fold": 0, "cluster": "slurm", "job_id": f"{attempt}{i:05}"}
            for attempt in range(3)
        ]
        run.ledger_file.write_text("".join(f"{json.dumps(entry)}\n" for entry in entries))
    assert status.query_slurm(runs).note == ""
    asked = (tmp_path / "asked").read_text().splitlines()
    assert sorted(line.split()[0] for line in asked) == ["sacct", "squeue"]
    assert all(line.split()[-1].count(",") == 199 for line in asked)

"""Why a job failed, as far as a line of its log or SLURM's reason tells it, and what to do about it. Reads nothing.

The texts are those of SLURM 22.05 to 25.05, gloo, NCCL and the kernel.
"""

from __future__ import annotations

import re

MEMORY = "raise mem_gb in the profile, or lower train.workers or the batch size"
NO_LOG = (
    "SLURM could not open the job's log or its folder on the node: was the run renamed, moved or removed while the job "
    "waited? Otherwise the node does not mount the folder, or its disk is full or read-only"
)
NO_PROGRAM = (
    "the node does not have this file: the repository, .venv and the profile's `python` must lie on a file system that "
    "all nodes mount"
)
REFUSED = "SLURM refused to start the processes: check `sbatch`, `srun` and `env` in the profile"
SUSPENDED = (
    "a node or the file system hung, or the job was suspended (gang scheduling), for longer than train.timeout_s: "
    "raise it in the recipe; repeat the same command to continue from the last checkpoint"
)
# Causes, wherever they are in a chain of exceptions and in the logs of the ranks: later lines explain less.
ROOT_CAUSES = {
    r"No space left|Disk quota exceeded": "free space in the run's folder, or choose another one with run_root=DIR",
    r"Read-only file system": "the file system is read-only: ask the administrator, or choose another run_root=DIR",
    r"CUDA out of memory|CUDA error: out of memory": "lower the batch size, or use more GPUs",
    r"\boom.kill|out.of.memory|\bOOM Killed\b|Cannot allocate memory|can't allocate memory": MEMORY,
    r"EADDRINUSE|address already in use": "another process on that node listens on the port: repeat the same command, "
    "and if it fails again, look for a job of yours that has not ended on that node",
    r"(refused|failed|timed out|unreachable).*\b127\.0\.1\.1\b": "the node's own name leads to 127.0.1.1 in its "
    "/etc/hosts: set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME under env in the profile to the network that joins "
    "the nodes (ip -br link)",
}
# Causes only where no rank has an error of its own.
CAUSES = {
    r"\bexecve\(\)|^(/usr/bin/)?env: .*No such file": NO_PROGRAM,
    r"command not found$": "the node does not have this command: check `setup` and `python` in the profile",
    r"^srun: fatal|^sbatch: (error|fatal)|^srun: error: Unable to (create step|confirm|allocate)": REFUSED,
    r"[Cc]ould not open std(out|err|in) file|couldn't chdir|IO setup failed": NO_LOG,
    r"Application timeout caused pair closure|Timed out waiting \d+ *ms|collective operation timeout": SUSPENDED,
    r"^srun: error: .*: tasks? .*: Killed": f"something killed the process, mostly the kernel for its memory: {MEMORY}",
    r"^srun: error: .*: tasks? .*: Bus error": "the node's shared memory (/dev/shm) is full: lower train.workers",
}
# What to do, by state, or by the reason for which a job would wait forever.
STATES = {
    "TIMEOUT": "the job reached its time limit before it could be requeued: raise time_min in the profile",
    "OUT_OF_MEMORY": MEMORY,
    "NODE_FAIL": "a node failed: list it under exclude in the profile to avoid it",
    "SUSPENDED": "the scheduler has suspended the job: it continues by itself, but the ranks of a training wait for "
    "each other no longer than train.timeout_s",
    "DependencyNeverSatisfied": "a job that this one depends on failed: remove this one with runs.py cancel",
    "JobHeldUser": "the job is held: release it with scontrol release",
    "JobHeldAdmin": (
        "the job is held by an administrator or after a failed start: "
        "release it with scontrol release, or ask the administrator"
    ),
    "launch failed requeued held": "a node could not start the job: try again with scontrol release",
    "BadConstraints": "no node satisfies the request: check constraint, gres and mem_gb in the profile",
    "PartitionTimeLimit": "the job asks for more time than the partition allows: lower time_min in the profile",
    r"exit \d+:53\b": NO_LOG,  # the exit status is 0:53 in accounting, 15:53 in the queue
}
_ROOT_CAUSE = re.compile("|".join(ROOT_CAUSES), re.IGNORECASE)


def is_root_cause(line: str) -> bool:
    """Tell whether a line of a log names the cause of a failure."""
    return bool(_ROOT_CAUSE.search(line))


def advice(line: str, state: str, reason: str) -> str:
    """Return what to do about a job: from its error line, else from its state, else from the reason why it waits."""
    known = (text for cause, text in {**ROOT_CAUSES, **CAUSES}.items() if re.search(cause, line, re.IGNORECASE))
    by_reason = (text for word, text in STATES.items() if re.search(word, reason))
    return next(known, "") or STATES.get(state) or next(by_reason, "")

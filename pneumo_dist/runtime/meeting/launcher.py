"""Who started this process: the local executor, torchrun or srun; its variables give rank, world size and address.

Standard library only. Inside a SLURM job step SLURM's own counts decide; what an earlier torchrun left in the shell
does not. Printed by `python -m pneumo_dist.runtime.meeting.launcher`: an address for torchrun in a SLURM job.
"""

from __future__ import annotations

import os
import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

ASKED_RANKS = "PNEUMO_RANKS"  # set by the job: its ranks as it was submitted
LOCAL_STORE = "PNEUMO_STORE"  # set by the local executor only: the file through which its ranks meet
OF_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
LOOPBACK = "127.0.0.1"
_PORTS = 16


@dataclass(frozen=True, kw_only=True)
class Launch:
    """What the launcher says of this process; without a launcher it is alone."""

    by: str = ""  # "this machine", "torchrun", "SLURM", or "" for none
    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    nodes: int = 1
    address: str = LOOPBACK  # of rank 0, as the other ranks name it
    session: str = ""  # differs between jobs and between attempts of a job

    @property
    def ports(self) -> list[int]:
        """The ports at which rank 0 may listen, in order: the same on every rank, below the ephemeral ones."""
        seed = zlib.crc32(self.session.encode())
        return [10000 + (seed + 1237 * k) % 20000 for k in range(_PORTS)]


def is_local_worker(environ: Mapping[str, str] = os.environ) -> bool:
    """Tell whether the local executor started this process; the executor may itself run inside a SLURM job."""
    return LOCAL_STORE in environ


def launch_of(environ: Mapping[str, str] = os.environ) -> Launch:
    """Return who started this process, and its place among the ranks."""
    if is_local_worker(environ):
        return Launch(by="this machine", session=environ[LOCAL_STORE], **_numbers(environ))
    if _started_by_torchrun(environ):
        nodes = int(environ["GROUP_WORLD_SIZE"])
        return Launch(
            by="torchrun",
            nodes=nodes,
            address=environ["MASTER_ADDR"] if nodes > 1 else LOOPBACK,
            session=_session(environ, "TORCHELASTIC_RUN_ID", "MASTER_PORT"),
            **_numbers(environ),
        )
    if not in_step(environ):
        return Launch()
    nodes = int(environ.get("SLURM_STEP_NUM_NODES", environ.get("SLURM_NNODES", "1")))
    return Launch(
        by="SLURM",
        rank=int(environ["SLURM_PROCID"]),
        world_size=int(environ["SLURM_STEP_NUM_TASKS"]),
        local_rank=int(environ.get("SLURM_LOCALID", "0")),
        nodes=nodes,
        address=first_node(environ["SLURM_STEP_NODELIST"]) if nodes > 1 else LOOPBACK,
        session=_session(environ),
    )


def _session(environ: Mapping[str, str], *more: str) -> str:
    """Return what all ranks of this attempt know, and no other attempt: not how each node names the first one."""
    names = ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT", *more)
    return " ".join(environ.get(name, "") for name in names)


def _numbers(environ: Mapping[str, str]) -> dict[str, Any]:
    return {name: int(environ[name.upper()]) for name in ("rank", "world_size", "local_rank")}


def in_step(environ: Mapping[str, str]) -> bool:
    """Tell whether srun started this process, or one above it."""
    return "SLURM_PROCID" in environ and "SLURM_STEP_NUM_TASKS" in environ


def _started_by_torchrun(environ: Mapping[str, str]) -> bool:
    """Tell whether torchrun's variables are whole, and agree with SLURM's where there is a job step."""
    whole = {*OF_TORCHRUN, "GROUP_WORLD_SIZE", "TORCHELASTIC_RUN_ID"} <= environ.keys()
    return whole and (not in_step(environ) or environ["GROUP_WORLD_SIZE"] == environ["SLURM_STEP_NUM_TASKS"])


def contradiction(launch: Launch, environ: Mapping[str, str] = os.environ) -> str:
    """Return why this process cannot know its place among the ranks, and what to do; "" where it can."""
    submitted = int(environ.get(ASKED_RANKS, "0"))
    if submitted and launch.world_size != submitted:
        return (
            f"the job was submitted for {submitted} ranks, but {launch.by or 'nothing'} started {launch.world_size}: "
            "remove ntasks and nodes from the profile's srun and sbatch options"
        )
    left = ", ".join(f"{name}={environ[name]}" for name in OF_TORCHRUN[:2] if name in environ)
    if "TORCHELASTIC_RUN_ID" in environ and launch.by == "SLURM":
        return (
            f"torchrun's variables ({left}) contradict SLURM's ({launch.world_size} tasks): {_unset(environ)}; or, if "
            "torchrun is to start the ranks, start it in a job step of one task per node (on one node: srun --ntasks=1)"
        )
    if not launch.by and environ.get("WORLD_SIZE", "1") != "1":
        return f"{left} is set, but neither torchrun nor srun started this process: {_unset(environ)}"
    nodes, tasks = environ.get("SLURM_JOB_NUM_NODES", "1"), environ.get("SLURM_NTASKS", "1")
    if not launch.by and (nodes, tasks) != ("1", "1"):
        return f"the job has {nodes} nodes and {tasks} tasks, but srun did not start this process: start it with srun"
    return ""


def _unset(environ: Mapping[str, str]) -> str:
    return f"unset {' '.join(name for name in environ if name in OF_TORCHRUN or name.startswith('TORCHELASTIC'))}"


def left_behind(launch: Launch, environ: Mapping[str, str] = os.environ) -> list[str]:
    """Return the variables of an earlier torchrun that do not count in this job step."""
    return [f"{name}={environ[name]}" for name in OF_TORCHRUN if launch.by == "SLURM" and name in environ]


def first_node(nodes: str) -> str:
    """Return the first node of SLURM's list: rank 0 runs there."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])*", nodes)
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", first[0] if first else "")


if __name__ == "__main__":
    # torchrun listens as long as the job runs: not at a port where the ranks meet.
    print(f"{first_node(os.environ['SLURM_JOB_NODELIST'])}:{30000 + int(os.environ['SLURM_JOB_ID']) % 2000}")

"""The ranks of a job: this process's position, the process group, and the few collectives that stages use.

One class for torchrun, submitit, plain srun and the local executor. torch is imported only when a process group
is set up, so that single-process stages start quickly.
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from pneumo_dist.runtime.failure import Failure

if TYPE_CHECKING:
    import torch

T = TypeVar("T")
log = logging.getLogger(__name__)
LOCAL_STORE = "PNEUMO_STORE"  # set by the local executor only: the file through which its ranks meet


@dataclass(frozen=True)
class Ranks:
    """Position in the job. With `world_size` 1 there is no process group and every collective returns its input."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1

    @property
    def first(self) -> bool:
        """Whether this is rank 0, which writes the shared files."""
        return self.rank == 0

    @property
    def label(self) -> str:
        """Rank and node for messages: "rank 1 of 4 on node2"."""
        return f"rank {self.rank} of {self.world_size} on {host()}"

    @property
    def device(self) -> torch.device:
        """The rank's GPU where there are any, else the CPU. Raises Failure if torch cannot use the GPUs of the job."""
        import torch

        if not torch.cuda.is_available():
            if int(os.environ.get("SLURM_GPUS_ON_NODE") or 0):
                raise Failure(
                    f"{host()} has GPUs for this job, but torch {torch.__version__} cannot use them: install its CUDA "
                    "build (PNEUMO_TORCH=cuda bash launch/setup_env.sh), check nvidia-smi there, or submit with "
                    "--gpus-per-node 0"
                )
            return torch.device("cpu")
        return torch.device("cuda", self.local_rank % torch.cuda.device_count())

    def gather(self, value: Any) -> list[Any] | None:
        """Return every rank's picklable `value`, in rank order, on rank 0; None elsewhere."""
        if self.world_size == 1:
            return [value]
        import torch.distributed as dist

        values: list[Any] | None = [None] * self.world_size if self.first else None
        dist.gather_object(value, values)
        return values

    def broadcast(self, value: Any) -> Any:
        """Return rank 0's picklable `value` on every rank."""
        if self.world_size == 1:
            return value
        import torch.distributed as dist

        box = [value]
        dist.broadcast_object_list(box, src=0, device=_cpu())
        return box[0]

    def maximum(self, values: list[int]) -> list[int]:
        """Return the elementwise maximum of `values` over the ranks, on every rank."""
        if self.world_size == 1:
            return values
        import torch
        import torch.distributed as dist

        reduced = torch.tensor(values, dtype=torch.int64)
        dist.all_reduce(reduced, op=dist.ReduceOp.MAX)
        return [int(v) for v in reduced.tolist()]

    def any(self, flag: bool) -> bool:
        """Return on every rank whether `flag` is true on any of them."""
        return bool(self.maximum([int(flag)])[0])

    def on_first(self, work: Callable[[], T]) -> T | None:
        """Run `work` on rank 0 and return its result there, None elsewhere. An error reaches every rank, so none waits.

        Raises:
            Failure: on the other ranks, when rank 0 failed; rank 0 raises its own error.
        """
        result, failure = None, None
        if self.first:
            try:
                result = work()
            except Exception as error:
                failure = error
        problem = self.broadcast(f"rank 0 failed: {failure}" if failure else "")
        if failure:
            raise failure
        if problem:
            raise Failure(problem)
        return result

    def agree(self, problem: str) -> str:
        """Return on every rank the problems of all ranks, each with its node's name; "" where there is none."""
        problems = self.gather(f"{host()}: {problem}" if problem else "")
        return str(self.broadcast("; ".join(dict.fromkeys(filter(None, problems or [])))))

    def barrier(self) -> None:
        """Wait for all ranks (over the CPU backend, so no GPU is needed)."""
        self.maximum([0])


def _cpu() -> Any:
    import torch

    return torch.device("cpu")


def discover(environ: Mapping[str, str] = os.environ) -> Ranks:
    """Return the position from the variables of torchrun or the local executor, else from those of SLURM."""
    if "RANK" in environ and "WORLD_SIZE" in environ:
        return Ranks(
            rank=int(environ["RANK"]),
            world_size=int(environ["WORLD_SIZE"]),
            local_rank=int(environ.get("LOCAL_RANK", "0")),
            local_world_size=int(environ.get("LOCAL_WORLD_SIZE", "1")),
        )
    if "SLURM_PROCID" in environ and "SLURM_STEP_NUM_TASKS" in environ:
        tasks = int(environ["SLURM_STEP_NUM_TASKS"])
        nodes = int(environ.get("SLURM_STEP_NUM_NODES", environ.get("SLURM_NNODES", "1")))
        return Ranks(
            rank=int(environ["SLURM_PROCID"]),
            world_size=tasks,
            local_rank=int(environ.get("SLURM_LOCALID", "0")),
            local_world_size=max(1, tasks // nodes),
        )
    return Ranks()


def is_local_worker(environ: Mapping[str, str] = os.environ) -> bool:
    """Tell whether the local executor started this process; the executor may itself run inside a SLURM job."""
    return LOCAL_STORE in environ


def rendezvous() -> str:
    """Return the rendezvous as host:port: MASTER_ADDR and MASTER_PORT, else values derived from the SLURM job.

    Printed by `python -m pneumo_dist.runtime.ranks`, for torchrun.
    """
    address, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
    if not address:
        from submitit.slurm.slurm import SlurmJobEnvironment

        address = SlurmJobEnvironment().hostnames[0]
    if not port:
        # Stable over requeues, different for each job, and below the range of ephemeral ports.
        port = str(10000 + int(os.environ["SLURM_JOB_ID"]) % 20000)
    return f"{address}:{port}"


def init(timeout_s: float) -> Ranks:
    """Set up the process group (gloo; with one GPU per rank also NCCL) and return the position.

    Args:
        timeout_s: seconds that a collective may wait for the slowest rank until the first step is done.
    """
    ranks = discover()
    if ranks.world_size == 1:
        return ranks
    import torch
    import torch.distributed as dist

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    backend = "cpu:gloo,cuda:nccl" if gpus >= ranks.local_world_size else "gloo"
    if 0 < gpus < ranks.local_world_size:
        log.warning(
            "%d ranks share %d GPU(s) on %s and communicate over gloo: slow, for tests only",
            ranks.local_world_size,
            gpus,
            host(),
        )
    if gpus:
        torch.cuda.set_device(ranks.device)
    dist.init_process_group(
        backend,
        init_method=f"file://{os.environ[LOCAL_STORE]}" if is_local_worker() else f"tcp://{rendezvous()}",
        rank=ranks.rank,
        world_size=ranks.world_size,
        timeout=timedelta(seconds=timeout_s),
    )
    return ranks


def shorten_timeout(ranks: Ranks, timeout_s: float) -> None:
    """Reduce the collectives' timeout to `timeout_s` seconds after the first step: only the start is slow."""
    if ranks.world_size == 1:
        return
    # PyTorch has no public function for this; torchtitan calls the same one.
    from torch.distributed.distributed_c10d import _set_pg_timeout

    _set_pg_timeout(timedelta(seconds=timeout_s))


def close(ranks: Ranks) -> None:
    """Destroy the process group, if there is one."""
    if ranks.world_size > 1:
        import torch.distributed as dist

        dist.destroy_process_group()


def host() -> str:
    """Return the node's name, for messages."""
    return socket.gethostname()


if __name__ == "__main__":
    print(rendezvous())

"""Who this process is among its peers, and the few collectives that stages use.

One description for torchrun, submitit, plain srun and this machine's own executor. torch is imported only when
a process group is set up, so that single-process stages start quickly.
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
LOCAL_STORE = "PNEUMO_STORE"  # set by this machine's own executor alone: the file through which its ranks meet


@dataclass(frozen=True)
class Ranks:
    """Position in the job. With `world_size` 1 no process group exists and every collective is the identity."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1

    @property
    def first(self) -> bool:
        """Whether this rank writes what all share."""
        return self.rank == 0

    @property
    def label(self) -> str:
        """Rank and node for messages: "rank 1 of 4 on node2"."""
        return f"rank {self.rank} of {self.world_size} on {host()}"

    @property
    def device(self) -> torch.device:
        """The rank's GPU where there are any, else the CPU."""
        import torch

        if not torch.cuda.is_available():
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
        """Do rank 0's file work there; its error reaches every rank, so that none waits for it.

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
        """Return on every rank the problems that ranks have, each with its node's name; empty where none has one."""
        found = self.gather(f"{host()}: {problem}" if problem else "")
        return str(self.broadcast("; ".join(dict.fromkeys(filter(None, found))) if found is not None else ""))

    def barrier(self) -> None:
        """Wait for all ranks (over the CPU backend: no GPU is needed)."""
        self.maximum([0])


def _cpu() -> Any:
    import torch

    return torch.device("cpu")


def discover(environ: Mapping[str, str] = os.environ) -> Ranks:
    """Read the position from torchrun's (or the local executor's) variables, else from SLURM's."""
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
    """Tell whether this process is a worker of this machine's own executor, which may itself run inside a SLURM job."""
    return LOCAL_STORE in environ


def rendezvous() -> str:
    """Return host:port where the ranks meet: MASTER_ADDR and MASTER_PORT, else those of the SLURM job.

    Printed by `python -m pneumo_dist.runtime.ranks`, for torchrun.
    """
    address, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
    if not address:
        from submitit.slurm.slurm import SlurmJobEnvironment

        address = SlurmJobEnvironment().hostnames[0]
    if not port:
        # The same at each requeue, another for each job, and below the range from which connections take theirs.
        port = str(10000 + int(os.environ["SLURM_JOB_ID"]) % 20000)
    return f"{address}:{port}"


def init(timeout_s: float) -> Ranks:
    """Set up the process group (gloo on the CPU, NCCL beside it with a GPU for each rank) and return the position.

    Args:
        timeout_s: seconds a collective may wait for the slowest rank before the first step is done.
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
            "%d ranks share %d GPU(s) of %s over gloo: slow, for trying out only", ranks.local_world_size, gpus, host()
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
    """From now on let a collective wait `timeout_s` seconds only: start-up, the slow part, is over."""
    if ranks.world_size == 1:
        return
    # No public call exists; torchtitan uses the same one.
    from torch.distributed.distributed_c10d import _set_pg_timeout

    _set_pg_timeout(timedelta(seconds=timeout_s))


def close(ranks: Ranks) -> None:
    """Leave the process group in good order."""
    if ranks.world_size > 1:
        import torch.distributed as dist

        dist.destroy_process_group()


def host() -> str:
    """The node's name, for messages."""
    return socket.gethostname()


if __name__ == "__main__":
    print(rendezvous())

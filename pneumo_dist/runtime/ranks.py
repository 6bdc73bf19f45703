"""The ranks of a job: this process's position, its device, and the few collectives that stages use.

One class for torchrun, submitit, plain srun and the local executor. torch is imported only when it is needed, so that
single-process stages start quickly. Nothing that crosses ranks is a pickle.
"""

from __future__ import annotations

import gc
import os
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from pneumo_dist.runtime.failure import Failure
from pneumo_dist.runtime.meeting.launcher import launch_of

if TYPE_CHECKING:
    import torch

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """Position in the job. With `world_size` 1 there is no process group and every collective returns its input."""

    rank: int = 0
    world_size: int = 1
    gpu: int = 0  # index of this rank's GPU among those that it sees; counts on from 0 where there are fewer

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
        """The rank's GPU where there are any, else the CPU.

        Raises:
            Failure: this job has GPUs and torch sees none: training on the CPU unnoticed would take weeks.
        """
        import torch

        from pneumo_dist.runtime.meeting.devices import blindness

        if torch.cuda.is_available():
            return torch.device("cuda", self.gpu % torch.cuda.device_count())
        if problem := blindness():
            raise Failure(problem)
        return torch.device("cpu")

    def gather(self, value: Any) -> list[Any] | None:
        """Return every rank's `value` (see packing.py), in rank order, on rank 0; None elsewhere."""
        if self.world_size == 1:
            return [value]
        import torch
        import torch.distributed as dist

        from pneumo_dist.runtime.meeting.packing import pack, unpack

        data = torch.frombuffer(bytearray(pack(value)), dtype=torch.uint8)
        longest = self.maximum([len(data)])[0]
        padded = torch.zeros(8 + longest, dtype=torch.uint8)  # the length, then the bytes
        padded[:8] = torch.tensor([len(data)]).view(torch.uint8)
        padded[8 : 8 + len(data)] = data
        parts = [torch.empty_like(padded) for _ in range(self.world_size)] if self.first else None
        dist.gather(padded, parts)
        if parts is None:
            return None
        lengths = [int(part[:8].view(torch.int64)) for part in parts]
        return [unpack(part[8 : 8 + n].numpy().tobytes()) for part, n in zip(parts, lengths, strict=True)]

    def broadcast(self, value: Any) -> Any:
        """Return rank 0's `value` (see packing.py) on every rank."""
        if self.world_size == 1:
            return value
        import torch
        import torch.distributed as dist

        from pneumo_dist.runtime.meeting.packing import pack, unpack

        data = bytearray(pack(value) if self.first else b"")
        size = torch.tensor([len(data)])
        dist.broadcast(size, src=0)
        sent = torch.frombuffer(data, dtype=torch.uint8) if self.first else torch.empty(int(size), dtype=torch.uint8)
        dist.broadcast(sent, src=0)
        return value if self.first else unpack(sent.numpy().tobytes())

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

    def set_timeout(self, timeout_s: float) -> None:
        """Let a collective wait `timeout_s` seconds for the slowest rank from now on."""
        if self.world_size == 1:
            return
        # PyTorch has no public function for this; torchtitan calls the same one.
        from torch.distributed.distributed_c10d import _set_pg_timeout

        _set_pg_timeout(timedelta(seconds=timeout_s))

    def close(self) -> None:
        """Destroy the process group, if there is one, and end its threads.

        They free tensors, which needs the interpreter: one that does so while the process exits would abort it.
        """
        if self.world_size > 1:
            import torch.distributed as dist

            dist.destroy_process_group()
            gc.collect()  # what is left of DDP refers to the group


def discover(environ: Mapping[str, str] = os.environ) -> Ranks:
    """Return the position that the launcher has given to this process."""
    launch = launch_of(environ)
    return Ranks(launch.rank, launch.world_size, launch.local_rank)


def host() -> str:
    """Return the node's name, for messages."""
    return socket.gethostname()

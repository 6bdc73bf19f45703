"""Where the ranks agree: once a step, on the CPU, without waiting for one another or for a GPU.

Each rank states its wishes; everybody learns the maximum of all wishes one step later. The exchange runs while
the step computes, so it stalls neither the CPU nor a GPU, and all ranks act at the same step.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass
from typing import Any

import torch
import torch.distributed as dist

from pneumo_dist.runtime.ranks import Ranks


@dataclass(frozen=True, kw_only=True)
class Wishes:
    """What a rank wants, as integers of which the greatest wins."""

    leave: int = 0  # signal that asked to save and leave
    save: int = 0
    failed: int = 0  # a checkpoint could not be written
    bad_loss: int = 0  # this rank's last loss was not finite


class Late:
    """A flag from the device that the host reads one step late: it waits for the step before, not for this one."""

    def __init__(self) -> None:
        self._pending: tuple[torch.Tensor, torch.cuda.Event | None, Any] | None = None

    def exchange(self, flag: torch.Tensor, about: Any) -> tuple[bool, Any]:
        """Leave a step's flag (bool scalar); return the flag before it, at first False, with what it was `about`."""
        before, event, host = self._pending, None, flag
        if flag.is_cuda:
            host = torch.empty(flag.shape, dtype=flag.dtype, pin_memory=True).copy_(flag, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        self._pending = (host, event, about)
        if before is None:
            return False, None
        if before[1] is not None:
            before[1].synchronize()
        return bool(before[0]), before[2]


class Boundary:
    """The exchange of one stage; call `exchange` at every step boundary on every rank."""

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._pending: tuple[Any, torch.Tensor] | None = None

    def exchange(self, wishes: Wishes) -> Wishes:
        """State this rank's wishes and return the agreed ones of the boundary before (with one rank: its own)."""
        if self._ranks.world_size == 1:
            return wishes
        agreed = Wishes()
        if self._pending:
            work, values = self._pending
            work.wait()
            agreed = Wishes(**dict(zip(Wishes.__dataclass_fields__, values.tolist(), strict=True)))
        values = torch.tensor(astuple(wishes), dtype=torch.int64)
        self._pending = (dist.all_reduce(values, op=dist.ReduceOp.MAX, async_op=True), values)
        return agreed

    def settle(self) -> None:
        """Wait for what is under way (before leaving, so that no peer loses its connection in the middle)."""
        if self._pending:
            self._pending[0].wait()
            self._pending = None

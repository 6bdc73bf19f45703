"""What the ranks agree on at a step boundary, without waiting for one another or for a GPU.

Each rank sends its requests; every rank receives the maximum over all ranks one step later. The exchange runs on the
CPU while the step computes, so nothing stalls and all ranks act at the same step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass
from typing import Any

import torch
import torch.distributed as dist

from pneumo_dist.data.cases import Case
from pneumo_dist.runtime.ranks import Ranks


@dataclass(frozen=True, kw_only=True)
class Requests:
    """What a rank asks of all ranks, as integers; the maximum over the ranks is agreed."""

    leave: int = 0  # number of the signal that asks to save and leave; 0: none
    save: int = 0
    failed: int = 0  # a checkpoint could not be written
    bad_loss: int = 0  # the last known loss of this rank is not finite


class Agreement:
    """The exchange of requests in one stage; every rank calls `exchange` at every step boundary."""

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._pending: tuple[Any, torch.Tensor] | None = None

    def exchange(self, requests: Requests) -> Requests:
        """Send this rank's requests; return those agreed at the previous boundary (one rank: its own, at once)."""
        if self._ranks.world_size == 1:
            return requests
        agreed = Requests()
        if self._pending:
            work, values = self._pending
            work.wait()
            agreed = Requests(**dict(zip(Requests.__dataclass_fields__, values.tolist(), strict=True)))
        values = torch.tensor(astuple(requests), dtype=torch.int64)
        self._pending = (dist.all_reduce(values, op=dist.ReduceOp.MAX, async_op=True), values)
        return agreed

    def finish(self) -> None:
        """Wait for the pending exchange: a rank that leaves before would break its peers' connection."""
        if self._pending:
            self._pending[0].wait()
            self._pending = None


class DelayedRead:
    """Read a flag of the device one step late: the host waits for the previous step only, not for the current one."""

    def __init__(self) -> None:
        self._pending: tuple[torch.Tensor, torch.cuda.Event | None, Any] | None = None

    def exchange(self, flag: torch.Tensor, context: Any) -> tuple[bool, Any]:
        """Store a step's flag (bool scalar) and context; return the previous pair, (False, None) at first."""
        previous, event, host = self._pending, None, flag
        if flag.is_cuda:
            host = torch.empty(flag.shape, dtype=flag.dtype, pin_memory=True).copy_(flag, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        self._pending = (host, event, context)
        if previous is None:
            return False, None
        if previous[1] is not None:
            previous[1].synchronize()
        return bool(previous[0]), previous[2]


class NonFiniteLosses:
    """Count consecutive steps whose loss is not finite, and keep the names of this rank's films in them."""

    def __init__(self, limit: int, cases: Sequence[Case]) -> None:
        """Allow fewer than `limit` such steps in a row; cases: the training films."""
        self.last = False  # whether the last known loss of this rank is not finite
        self._limit, self._cases = limit, cases
        self._delayed = DelayedRead()
        self._in_a_row = 0
        self._films: list[str] = []

    def note(self, bad: torch.Tensor, batch: int, indices: torch.Tensor) -> None:
        """Take this rank's flag of a step (bool scalar on the device) with the indices of its films."""
        self.last, step = self._delayed.exchange(bad, (batch, indices))
        if self.last:
            batch, indices = step
            self._films = [f"batch {batch}:", *(self._cases[i].id for i in indices.tolist())]

    def count(self, agreed: bool, position: str) -> None:
        """Take the flag that the ranks agreed on; position: stage, epoch and batch, for the message.

        Raises:
            FloatingPointError: the limit is reached, on all ranks at the same step.
        """
        self._in_a_row = self._in_a_row + 1 if agreed else 0
        if not agreed and not self.last:
            self._films = []
        if self._in_a_row >= self._limit:
            raise FloatingPointError(
                f"{position}: the loss was not finite {self._in_a_row} times in a row: "
                "check the films, lower the learning rate, or set train.amp=bf16 or off; "
                + (f"this rank's films of {' '.join(self._films)}" if self._films else "this rank's losses were finite")
            )

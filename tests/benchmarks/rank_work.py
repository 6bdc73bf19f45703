"""What each rank does for the `ddp` benchmark: called by name in processes of its own (tests/dist/spawn.py)."""

from __future__ import annotations

import gc
import time

import torch
import torch.distributed as dist

from pneumo_dist.runtime.ranks import Ranks
from tests.benchmarks import frame
from tests.benchmarks.contestants import Case, Ours
from tests.benchmarks.variants import BASE, DISTRIBUTED, step_of

Durations = dict[str, list[float]]  # seconds of each step by what was done


def rank_turns(ranks: Ranks, case: Case, steps: int) -> Durations:
    """On each rank: train `steps` steps as training does, as many without exchange, and reduce the gradient alone.

    Every step of the second kind starts at a barrier, so that the ranks' durations can be compared one by one.
    """
    ours = Ours(case, ranks)
    ours(2)
    found = {"step": [ours(steps) / steps]}
    if ranks.world_size == 1:
        return found
    found |= {"alone": [], "exchange": []}
    with ours.settings(), ours.stepper.ddp.no_sync():
        for _ in range(steps + 1):
            ranks.barrier()
            begin = time.perf_counter()
            ours.step()
            found["alone"].append(time.perf_counter() - begin)
    del found["alone"][0]
    gradient = torch.zeros(sum(p.numel() for p in ours.stepper.model.parameters()))
    for _ in range(steps):
        ranks.barrier()
        begin = time.perf_counter()
        dist.all_reduce(gradient)
        found["exchange"].append(time.perf_counter() - begin)
    return found


def rank_options(ranks: Ranks, case: Case, rounds: int, steps: int) -> frame.Values:
    """On each rank: train with one option of DDP after the other, in turns."""

    def turn(name: str) -> float:
        gc.collect()  # the network of the turn before
        variant = BASE if name == "base" else DISTRIBUTED[name]
        run = step_of(variant, case, ranks.world_size)
        run(2)  # DDP lays its buckets out anew after the first backward pass
        ranks.barrier()
        return run(steps) / steps

    return frame.in_turns({name: (lambda name=name: turn(name)) for name in ("base", *DISTRIBUTED)}, rounds)

"""How one process runs its share of a stage: look, take the stage over, work, mark it done; and the plain entry.

    python -m pneumo_dist.stages --stage S --run-dir DIR [--fold K] [--part I/N]

Importing this file imports no torch; what a stage is stands in chain.py, when it is done in done.py.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import sys
import time
from pathlib import Path
from typing import Any

from pneumo_dist import done
from pneumo_dist.chain import STAGES, Node, closing
from pneumo_dist.config import ConfigError
from pneumo_dist.run import Run
from pneumo_dist.runtime import ranks as ranks_module
from pneumo_dist.runtime import stopping
from pneumo_dist.runtime.ending import exit_status
from pneumo_dist.runtime.ranks import Ranks
from pneumo_dist.runtime.runlog import setup as setup_log
from pneumo_dist.runtime.task import Attempt, Task

log = logging.getLogger("pneumo_dist.stages")


def run_stage(
    stage: str,
    run_dir: Path,
    fold: int | None = None,
    part: tuple[int, int] = (0, 1),
    stop: stopping.StopSignal | None = None,
) -> None:
    """Run this process's share of a stage, and mark the stage done when it is.

    Raises:
        ConfigError: something the stage needs is missing or differs.
        stopping.Stopped: a signal asked to leave; the state is saved.
    """
    node = Node(stage, fold, ())
    run = Run.of_job(run_dir, node.key)
    stop = stop or stopping.StopSignal()
    row = STAGES[stage]
    if row.per_fold and fold is None:
        raise ConfigError(f"{row.title} belongs to a fold: give --fold K")
    ranks = ranks_module.init(run.config.train.first_timeout_s) if row.shape == "ranks" else Ranks()
    setup_log(ranks.rank)
    started = time.monotonic()
    # Rank 0 looks and decides for all: file systems may show the others an older state.
    decided = ranks.broadcast(ranks.on_first(lambda: _decide(run, stage, fold)))
    if isinstance(decided, str):
        raise ConfigError(decided)
    if decided is None:
        log.info("%s is done in %s", node.key, run.dir_of(stage, fold))
        ranks_module.close(ranks)
        return
    settings, inputs = decided
    attempt = None
    if row.shape != "array":
        attempt = ranks.broadcast(ranks.on_first(lambda: Attempt.begin(run.attempt_file(node.key))))
    task = Task(
        run=run, stage=stage, fold=fold, part=part, ranks=ranks, stop=stop, attempt=attempt,
        result_hash=done.result_hash(settings, inputs), settings=settings, inputs=inputs,
    )  # fmt: skip
    log.info("%s starts on %s: rank %d of %d", node.key, ranks_module.host(), ranks.rank, ranks.world_size)
    module, function = row.function.split(":")
    try:
        outputs = getattr(importlib.import_module(module), function)(task)
    except stopping.Stopped:
        ranks.barrier()  # all stop together; one that left early would tear a peer's last exchange
        ranks_module.close(ranks)
        raise
    if row.shape != "array":
        ranks.on_first(lambda: done.write_done(task, outputs))
        log.info("%s is done after %.0f s: %s", node.key, time.monotonic() - started, task.out)
    ranks.barrier()
    ranks_module.close(ranks)


def _decide(run: Run, stage: str, fold: int | None) -> tuple[dict[str, Any], dict[str, str]] | str | None:
    """Return what determines the result, None when it is there already, or the line that says why it cannot run."""
    try:
        keys = done.differences(run, closing(stage), fold)
        if keys:
            done.refuse_difference(run, closing(stage), fold, keys)
        if keys == []:
            return None
        return done.settings_of(run.config, stage), done.inputs_of(run, stage, fold)
    except ConfigError as error:
        return str(error)


def _part(text: str) -> tuple[int, int]:
    index, _, count = text.partition("/")
    try:
        part = (int(index), int(count or "1"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not I/N, for example 0/4") from None
    if not 0 <= part[0] < part[1]:
        raise argparse.ArgumentTypeError(f"{text!r}: I must lie between 0 and N-1")
    return part


def main(arguments: list[str] | None = None) -> int:
    """Enter from a plain script: ranks come from srun's or torchrun's environment."""
    stop = stopping.install()
    parser = argparse.ArgumentParser(
        prog="python -m pneumo_dist.stages", description="Run one process of one stage of a run."
    )
    parser.add_argument("--stage", required=True, choices=list(STAGES))
    parser.add_argument("--run-dir", required=True, type=Path)
    parser.add_argument("--fold", type=int)
    parser.add_argument("--part", type=_part, default=(0, 1), metavar="I/N", help="array element I of N")
    options = parser.parse_args(arguments)
    try:
        run_stage(options.stage, options.run_dir, options.fold, options.part, stop)
        return 0
    except Exception as error:
        return exit_status(error, stopping.requeue if stopping.under_slurm() else None)


if __name__ == "__main__":
    sys.exit(main())

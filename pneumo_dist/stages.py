"""Run one process of a stage: check whether it is done, take it over, work, write DONE.json. Also the plain entry:

    python -m pneumo_dist.stages --stage S --run-dir DIR [--fold K] [--part I/N]

This module imports no torch at its top level. chain.py defines the stages, done.py when a stage is done.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import sys
import time
from pathlib import Path
from typing import Any

from pneumo_dist import config as configuration
from pneumo_dist import done
from pneumo_dist.chain import STAGES, Stage, ancestors, closing, job_key
from pneumo_dist.config import ConfigError
from pneumo_dist.run import Run
from pneumo_dist.runtime import stopping
from pneumo_dist.runtime.ending import exit_status
from pneumo_dist.runtime.files import sha256_text
from pneumo_dist.runtime.meeting import group
from pneumo_dist.runtime.ranks import Ranks, discover
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
    """Run this process's share of a stage, and write DONE.json at its end.

    Raises:
        ConfigError: an input of the stage is missing, or the stage is done with other settings.
        stopping.Stopped: a signal requested the exit; the state is saved.
    """
    key = job_key(stage, fold)
    run = Run.of_job(run_dir, key)
    row = STAGES[stage]
    if row.per_fold and fold is None:
        raise ConfigError(f"{row.title} runs per fold: give --fold K")
    setup_log(discover().rank)
    ranks = _meet(run) if row.shape == "ranks" else Ranks()
    # Rank 0 decides for all ranks: a shared file system may show the others an older state.
    decision = ranks.broadcast(ranks.on_first(lambda: _decide(run, stage, fold)))
    if isinstance(decision, str):
        raise ConfigError(decision)
    if decision is None:
        log.info("%s is already done: %s", key, run.dir_of(stage, fold))
        ranks.close()
        return
    settings, inputs = decision
    attempt = None
    if row.shape != "array":  # the tasks of an array write different files
        begun = ranks.on_first(lambda: Attempt.begin(run.attempt_file(key)))
        attempt = Attempt(run.attempt_file(key), ranks.broadcast(begun.token if begun else ""))
    task = Task(
        run=run,
        stage=stage,
        fold=fold,
        part=part,
        ranks=ranks,
        stop=stop or stopping.StopSignal(),
        attempt=attempt,
        result_hash=done.result_hash(settings, inputs),
        settings=settings,
        inputs=inputs,
    )
    log.info("%s starts: %s", key, ranks.label)
    _work(task, row, key)


def _meet(run: Run) -> Ranks:
    train, settings = run.config.train, sha256_text(configuration.to_yaml(run.config))
    return group.init(run.secret_file, settings, train.meet_timeout_s, train.first_timeout_s, train.threads)


def _work(task: Task, row: Stage, key: str) -> None:
    """Call the stage's function, write DONE.json (not for one task of an array), and close the process group."""
    started = time.monotonic()
    module, function = row.function.split(":")
    try:
        outputs = getattr(importlib.import_module(module), function)(task)
        if row.shape != "array":
            task.ranks.on_first(lambda: done.write_done(task, outputs))
            log.info("%s is done after %.0f s: %s", key, time.monotonic() - started, task.out)
    except stopping.Stopped:
        _close(task.ranks)
        raise
    _close(task.ranks)


def _close(ranks: Ranks) -> None:
    ranks.barrier()  # a rank that exits early would break the last collective of the others
    ranks.close()


def _decide(run: Run, stage: str, fold: int | None) -> tuple[dict[str, Any], dict[str, str]] | str | None:
    """Return settings and inputs of the stage, None when it is done, or the error line when it cannot run.

    The error is returned, not raised, so that it reaches the other ranks as a ConfigError.
    """
    try:
        below = {(closing(name), k) for name, k in ancestors(run.config, (stage, fold), run.folds)}
        for name, k in sorted(below - {(closing(stage), fold)}, key=str):
            if changed := done.contradictions(run, name, k, films=False):
                return done.difference_line(run, name, k, changed)
        keys = done.differences(run, closing(stage), fold)
        if keys:
            return done.difference_line(run, closing(stage), fold, keys)
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
        raise argparse.ArgumentTypeError(f"{text!r} is not I/N (for example 0/4)") from None
    if not 0 <= part[0] < part[1]:
        raise argparse.ArgumentTypeError(f"{text!r}: I must be between 0 and N-1")
    return part


def main(arguments: list[str] | None = None) -> int:
    """Run a stage from a plain script; the ranks come from the environment of srun or torchrun."""
    stop = stopping.install()
    parser = argparse.ArgumentParser(
        prog="python -m pneumo_dist.stages", description="Run one process of one stage of a run."
    )
    parser.add_argument("--stage", required=True, choices=list(STAGES))
    parser.add_argument("--run-dir", required=True, type=Path)
    parser.add_argument("--fold", type=int)
    parser.add_argument("--part", type=_part, default=(0, 1), metavar="I/N", help="task I of N of an array")
    options = parser.parse_args(arguments)
    try:
        run_stage(options.stage, options.run_dir, options.fold, options.part, stop)
        return 0
    except Exception as error:
        return exit_status(error, stopping.requeue if stopping.under_slurm() else None)


if __name__ == "__main__":
    sys.exit(main())

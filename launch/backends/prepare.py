"""The changes on disk before any job starts: rename old results, write configurations and the copy of the code.

Starts nothing and submits nothing.
"""

from __future__ import annotations

import errno
import functools
import stat
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launch.planning.plan import DERIVED, Plan
from launch.planning.recipe import ROOT
from launch.planning.site import Site
from launch.state import codecopy
from launch.state import slurm_client as slurm
from launch.state.ledger import Entry, Ledger
from launch.state.locks import Locked, holder, lock
from pneumo_dist import config as configuration
from pneumo_dist.chain import Node
from pneumo_dist.config import ConfigError
from pneumo_dist.inference.film_plan import write_film_plan
from pneumo_dist.run import Run
from pneumo_dist.runtime.files import write_bytes


def refuse_live(plan: Plan, ledger: Ledger, slurm_answers: bool) -> None:
    """Raise ConfigError if another job, on SLURM or on this machine, writes one of the plan's stages.

    Args:
        slurm_answers: SLURM has just answered. False for a run that was copied to a machine without SLURM: its
            SLURM jobs then count as ended, with a note. This is safe, since an older attempt never writes.
    """
    try:
        live = ledger.live([node.key for node in plan.todo])
    except slurm.SlurmError as error:
        if slurm_answers:
            raise ConfigError(f"SLURM does not report the live jobs of this run ({error}): try again later") from None
        print(
            "note: this run was submitted to SLURM, which does not answer on this machine: its SLURM jobs are taken as "
            "ended",
            flush=True,
        )
        live = {}
    for node in plan.todo:
        name = plan.title(node.stage, node.fold)
        if node.key in live:
            raise ConfigError(
                f"{name} of this run is already queued or running as SLURM job {live[node.key]}: wait for it "
                f"(launch/runs.py wait {plan.runs_argument}), or cancel it (launch/runs.py cancel ...)"
            )
        process = holder(plan.run.lock(node.key))
        if process:
            raise ConfigError(f"{process} already runs {name} of this run: wait for it, or stop it")


@dataclass
class Changes:
    """Changes on disk that can be undone, if the jobs for which they were made were not submitted."""

    renamed: list[tuple[Path, Path]] = field(default_factory=list)  # folders of old results: name before, name now
    files: dict[Path, bytes | None] = field(default_factory=dict)  # what they held; None: there was none

    def keep(self, path: Path) -> bytes | None:
        """Return what a file holds, and keep it for `undo`."""
        held = path.read_bytes() if path.exists() else None
        self.files.setdefault(path, held)
        return held

    def replace(self, path: Path, data: bytes | None) -> None:
        """Write a file unless it holds `data` already, or remove it for None."""
        if self.keep(path) == data:
            return
        if data is None:
            path.unlink()
        else:
            write_bytes(path, data)

    def undo(self) -> None:
        """Give the files what they held, and rename old results back."""
        try:
            for path, data in self.files.items():
                self.replace(path, data)
        finally:
            for before, now in self.renamed:
                with suppress(OSError):  # it replaces an empty folder only: a cancelled job may have begun already
                    now.rename(before)


def prepare(plan: Plan, nodes: int = 1) -> tuple[Path, Changes]:
    """Rename old results (--redo), write the configurations and the copy of the code; return the copy's folder.

    After an error or Ctrl-C every change is undone.

    Args:
        nodes: tasks of an array.
    """
    code, changes = codecopy.copy(ROOT, plan.run), Changes()
    try:
        _write(plan, nodes, changes)
    except BaseException:
        changes.undo()
        raise
    return code, changes


def _write(plan: Plan, nodes: int, changes: Changes) -> None:
    run = plan.run
    if plan.request.redo:
        _rename_old_results(plan, changes)
    write_config(run, changes)
    for node in plan.todo:
        if node.stage in DERIVED:  # recomputed from its inputs: the old DONE.json would end the job at once
            changes.replace(run.done_file(node.stage, node.fold), None)
        changes.replace(run.job_config_file(node.key), configuration.to_yaml(run.config).encode())
    films = run.infer_source if any(node.stage == "infer" for node in plan.todo) else None
    if films and films.is_dir():  # not yet for films still to be generated: the first task then writes it
        changes.keep(run.infer_dir / "plan.json")
        write_film_plan(run, nodes)


def close_folders(run: Run, mask: int) -> None:
    """Take the permissions in `mask` from the folders of a run that were made with another umask."""
    for folder in (run.folder, run.jobs_dir, run.code_dir):
        try:
            if folder.is_dir() and (mode := stat.S_IMODE(folder.stat().st_mode)) & mask:
                folder.chmod(mode & ~mask)
                print(f"note: {folder} is now closed to other accounts (umask {mask:04o})", flush=True)
        except OSError as error:
            reason = "it belongs to another account" if error.errno == errno.EPERM else error.strerror
            print(f"note: the permissions of {folder} stay as they are: {reason}", flush=True)


def write_config(run: Run, changes: Changes) -> None:
    """Write config.yaml of an accepted command; the text before is kept under the next number."""
    text = configuration.to_yaml(run.config).encode()
    before = changes.keep(run.config_file)
    if before not in (None, text):
        number = len(list(run.config_history.glob("*.yaml"))) + 1
        changes.replace(run.config_history / f"{number:04d}.yaml", before)
    changes.replace(run.config_file, text)


def write_config_alone(run: Run) -> None:
    """Write config.yaml of a command that starts no job; say so if that is not possible."""
    text, held = configuration.to_yaml(run.config), run.config_file
    try:
        if held.exists() and held.read_text() == text:
            return
        guard = lock(run.submit_lock, wait_s=30)
        try:
            write_config(run, Changes())
        finally:
            guard.release()
    except (OSError, Locked) as error:
        print(f"note: {held} keeps the settings of the command before: {error}", flush=True)


def _rename_old_results(plan: Plan, changes: Changes) -> None:
    run = plan.run
    shared = run.config.data.shard_dir and any(node.stage == "preprocess" for node in plan.todo)
    if shared and run.shard_dir.exists():
        raise ConfigError(
            f"--redo: other runs may use the shards in {run.config.data.shard_dir}: remove that folder yourself, "
            "or name another data.shard_dir"
        )
    stamp = time.strftime("%Y%m%d-%H%M%S")
    for folder in dict.fromkeys(run.dir_of(node.stage, node.fold) for node in plan.todo):
        if folder.exists():
            old = folder.with_name(f"{folder.name}.old-{stamp}")
            folder.rename(old)
            changes.renamed.append((folder, old))
            print(f"--redo: the old result is now {old}", flush=True)


_git_state = functools.cache(codecopy.git_state)  # git status of a large checkout takes a while


def ledger_entry(plan: Plan, site: Site, node: Node, code: Path, **fields: Any) -> Entry:
    """Return the ledger's entry for a job, with the given further fields."""
    extra = {
        "folds": sorted(plan.folds),
        "nodes": site.nodes,
        "gpus_per_node": site.gpus_per_node,
        "profile": str(site.profile_path) if site.profile_path else None,
        "typed": site.typed,
        "git": _git_state(ROOT),
        "command": sys.argv,
    }
    return Entry(
        key=node.key,
        stage=node.stage,
        fold=node.fold,
        cluster="slurm" if site.slurm else "local",
        code=code.name,
        extra=extra,
        **fields,
    )

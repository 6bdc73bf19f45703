"""Preprocessing killed with SIGKILL at twenty random moments: after a repeat the directory is that of a quiet run."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import time
from pathlib import Path

import pytest

from pneumo_dist import config as configuration
from pneumo_dist.data import augment
from pneumo_dist.data.preprocess import contact_sheet as picture
from pneumo_dist.data.preprocess import preprocess
from pneumo_dist.data.preprocess.finalize import finalize
from pneumo_dist.run import Run
from pneumo_dist.runtime.task import Task
from tests.film_files import overrides, small_set

KILLS = 20
NEEDED = (augment, picture)  # imported here, before the children are forked: a kill should meet work, not imports
SETTINGS = ["data.shards=5", "data.folds=3", "data.workers=2", "stage1.size=64", "stage2.size=128"]


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def run(run_dir: Path, settings: dict[str, str]) -> None:
    task = Task(run=Run(run_dir, configuration.load(None, [*overrides(settings), *SETTINGS])), stage="preprocess")
    preprocess.write_shards(task)
    finalize(task)


def started(run_dir: Path, settings: dict[str, str]) -> multiprocessing.process.BaseProcess:
    process = multiprocessing.get_context("fork").Process(target=run, args=(run_dir, settings))
    process.start()
    return process


def children(pid: int) -> list[int]:
    pids = []
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                fields = Path(f"/proc/{entry}/stat").read_text().rsplit(")", 1)[1].split()
            except OSError:
                continue
            if int(fields[1]) == pid and fields[0] != "Z":
                pids.append(int(entry))
    return pids


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


@pytest.fixture(scope="module")
def quiet(tmp_path_factory):
    """The films, the directory of an undisturbed run, and how long it took."""
    folder = tmp_path_factory.mktemp("films")
    settings = small_set(folder, films=40, size=192)
    took = []
    for name in ("first", "second"):
        begin = time.monotonic()
        process = started(folder / name, settings)
        process.join()
        assert process.exitcode == 0
        took.append(time.monotonic() - begin)
    assert content(folder / "first" / "shards") == content(folder / "second" / "shards")
    return settings, content(folder / "first" / "shards"), min(took)


def test_twenty_kills_change_no_byte(quiet, tmp_path):
    settings, wanted, took_s = quiet
    moments = random.Random(7)
    unfinished = leftovers = 0
    for number in range(KILLS):
        run_dir = tmp_path / str(number)
        process = started(run_dir, settings)
        time.sleep(took_s * moments.random())
        workers = children(process.pid)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        deadline = time.monotonic() + 5
        while any(map(alive, workers)) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert not any(map(alive, workers)), "a worker outlived its task"
        left = content(run_dir / "shards") if (run_dir / "shards").exists() else {}
        unfinished += "manifest.json" not in left
        leftovers += any(".tmp" in name for name in left)
        # Whatever is there under its final name is whole.
        for name, data in left.items():
            assert ".tmp" in name or data == wanted[name], name
        again = started(run_dir, settings)
        again.join()
        assert again.exitcode == 0
        assert content(run_dir / "shards") == wanted, f"kill {number}"
    assert unfinished > KILLS // 2 and leftovers > 0, "the kills came too late to disturb anything"

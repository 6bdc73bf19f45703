"""A disk that is full or read-only: one error line on every rank, no data lost, and the same command continues.

The run is on a small disk of its own (a tmpfs, which needs root); the training itself makes the disk fail.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pneumo_dist import stages
from pneumo_dist.runtime import history
from pneumo_dist.training import trainer
from pneumo_dist.training.checkpoint import CheckpointStore
from tests.dist import small_run
from tests.dist.spawn import exits

# The moment when the disk fails: (owner, function, at which call of it).
MOMENTS: dict[str, tuple[Any, str, int]] = {
    "a checkpoint": (CheckpointStore, "save", 2),
    "best.pt": (trainer.Trainer, "_note_epoch", 1),
    "metrics.jsonl": (history, "append", 2),
    "last.pt": (trainer.Trainer, "_last_files", 1),
    "DONE.json": (stages.done, "write_done", 1),
}
FILES = {"a checkpoint": "checkpoints/00000000"}


def _mount(*arguments: str) -> None:
    done = subprocess.run(["mount", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(done.stderr.strip())


def _fill(disk: Path) -> None:
    """Fill the disk to the last page."""
    for size in (1 << 20, 1 << 12):
        try:
            with (disk / f"filler{size}").open("wb", buffering=0) as filler:
                while filler.write(b"\0" * size) == size:
                    pass
        except OSError:
            continue


def _break(disk: Path, how: str) -> None:
    if how == "full":
        _fill(disk)
    else:
        _mount("-o", "remount,ro", str(disk))


def _repair(disk: Path) -> None:
    _mount("-o", "remount,rw", str(disk))
    for filler in disk.glob("filler*"):
        filler.unlink()


def train(disk: str, moment: str | None = None, how: str = "") -> int:
    """In the process of a rank: train stage 1; rank 0 makes the disk fail at the moment. Returns the exit status."""
    small_run.thin()
    if moment and os.environ["RANK"] == "0":
        owner, name, at = MOMENTS[moment]
        original, calls = getattr(owner, name), []

        def breaking(*arguments: Any) -> Any:
            calls.append(1)
            if len(calls) == at:
                store = getattr(arguments[0], "store", None)
                if store is not None:
                    store._join()  # an open file: a remount read-only would be refused, or leave a part of it
                _break(Path(disk), how)
            result = original(*arguments)
            if moment == "a checkpoint":
                arguments[0]._join()  # else the end of the epoch may fail first, before the ranks agree
            return result

        setattr(owner, name, breaking)
    return stages.main(["--stage", "1", "--run-dir", f"{disk}/run", "--fold", "0"])


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # At least six steps an epoch, a save at each: the ranks agree on a failed one two steps later.
    settings = ("phantom.films=28", "train.save_every_s=0", "stage1.epochs=2", "stage1.batch_size=2")
    return small_run.prepare(tmp_path_factory.mktemp("prepared"), *settings)


@pytest.fixture(scope="module")
def undisturbed(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, object]]:
    fingerprints = {}
    for ranks in (1, 2):
        folder = tmp_path_factory.mktemp("undisturbed")
        run_dir = small_run.copy_of(prepared, folder)
        codes, printed = exits(train, ranks, str(folder))
        assert codes == [0] * ranks, printed
        fingerprints[ranks] = small_run.fingerprint(run_dir)
    return fingerprints


@pytest.fixture
def disk(prepared: Path, tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    try:
        _mount("-t", "tmpfs", "-o", "size=48m", "none", str(folder))
    except OSError as error:
        pytest.skip(f"cannot mount a tmpfs ({error})")
    try:
        small_run.copy_of(prepared, folder)
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def _assert_one_line(codes: list[int], printed: list[str], *parts: str) -> None:
    """Every rank failed with one line that names the rank, the error and the path; there is no traceback."""
    assert codes == [1] * len(codes), printed
    for rank, text in enumerate(printed):
        lines = [line for line in text.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1 and "Traceback" not in text, text
        for part in (f"rank {rank} of {len(codes)} on ", *parts):
            assert part in lines[0], text


@pytest.mark.parametrize(
    ("moment", "ranks"), [*((moment, 2) for moment in MOMENTS), ("a checkpoint", 1), ("best.pt", 1)]
)
def test_a_disk_full_under(moment: str, ranks: int, disk: Path, undisturbed: dict[int, dict[str, object]]) -> None:
    codes, printed = exits(train, ranks, str(disk), moment, "full")
    _assert_one_line(codes, printed, "No space left on device", f"{disk}/run/fold0/stage1/{FILES.get(moment, moment)}")
    if moment == "a checkpoint":
        assert "the checkpoints before it are whole" in printed[0]
    state = CheckpointStore(disk / "run/fold0/stage1/checkpoints").newest()
    assert state is not None and not (disk / "run/fold0/stage1/DONE.json").exists()
    assert not list(disk.rglob(".*.tmp*")), "no half-written file is left"
    _repair(disk)
    codes, printed = exits(train, ranks, str(disk))
    assert codes == [0] * ranks and "resuming at" in printed[0], printed
    assert small_run.fingerprint(disk / "run") == undisturbed[ranks]


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_disk_that_turns_read_only(ranks: int, disk: Path, undisturbed: dict[int, dict[str, object]]) -> None:
    codes, printed = exits(train, ranks, str(disk), "best.pt", "read-only")
    _assert_one_line(codes, printed, "Read-only file system", f"{disk}/run/fold0/stage1/")
    codes, printed = exits(train, ranks, str(disk))  # and at the start of the next attempt
    _assert_one_line(codes, printed, "Read-only file system", f"{disk}/run/jobs/")
    _repair(disk)
    codes, printed = exits(train, ranks, str(disk))
    assert codes == [0] * ranks and "resuming at" in printed[0], printed
    assert small_run.fingerprint(disk / "run") == undisturbed[ranks]


def watch(disk: str) -> int:
    """In a process: write events to a disk that becomes full. Returns the exit status."""
    from pneumo_dist.runtime import runlog

    runlog.setup()
    events = runlog.RunLog(Path(disk) / "events")
    events.scalars(1, {"a": 1.0})
    _fill(Path(disk))
    for step in range(2, 2000):  # more than one page, and more than the writer's queue
        events.scalars(step, {"a": 1.0})
        if step % 500 == 0:
            events.flush()
    events.close()
    return 0


def test_events_that_cannot_be_written_give_one_warning_and_no_error(disk: Path) -> None:
    codes, printed = exits(watch, 1, str(disk))
    assert codes == [0], printed
    assert printed[0].count("no more TensorBoard events") == 1 and "Traceback" not in printed[0], printed

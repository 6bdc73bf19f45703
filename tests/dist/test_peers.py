"""Faults of one rank of a training, and how the other ranks end."""

from __future__ import annotations

import hashlib
import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pneumo_dist import config as configuration
from pneumo_dist import stages
from pneumo_dist.runtime.task import Attempt
from pneumo_dist.training.checkpoint import CheckpointStore
from pneumo_dist.training.losses import BatchLoss
from pneumo_dist.training.step import Stepper, TrainBatch
from tests.dist import small_run
from tests.dist.spawn import exits

LEFT_BY_USR2 = 128 + signal.SIGUSR2


def _before_step(number: int, what: Callable[[], None]) -> None:
    original, calls = Stepper.step, []

    def step(stepper: Stepper, *arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == number:
            what()
        return original(stepper, *arguments)

    Stepper.step = step  # type: ignore[method-assign]


def note_films(run_dir: Path) -> None:
    """Record the input of every step: a hash of each augmented film, for all ranks in one file."""
    original = Stepper.step

    def step(stepper: Stepper, batch: TrainBatch) -> Any:
        for image in batch.images:
            name = hashlib.sha256(image.numpy().tobytes()).hexdigest()[:16]
            with (run_dir / "seen").open("a") as seen:
                seen.write(f"{name}\n")
        return original(stepper, batch)

    Stepper.step = step  # type: ignore[method-assign]


def leave_at_3(run_dir: Path) -> None:
    note_films(run_dir)
    if os.environ["RANK"] == "0":
        _before_step(3, lambda: os.kill(os.getpid(), signal.SIGUSR2))


def hang_at_5(_run_dir: Path) -> None:
    if os.environ["RANK"] == "1":
        _before_step(5, lambda: time.sleep(60))


def die_at_5(_run_dir: Path) -> None:
    if os.environ["RANK"] == "1":
        _before_step(5, lambda: os.kill(os.getpid(), signal.SIGKILL))


def die_alone_at_7(_run_dir: Path) -> None:
    _before_step(7, lambda: os.kill(os.getpid(), signal.SIGKILL))


def lose_a_worker_at_3(_run_dir: Path) -> None:
    if os.environ["RANK"] == "1":
        _before_step(3, lambda: [os.kill(pid, signal.SIGKILL) for pid in small_run.children(os.getpid())] and None)


def be_overtaken_at_3(run_dir: Path) -> None:
    if os.environ["RANK"] == "0":
        _before_step(3, lambda: Attempt.begin(run_dir / "jobs/stage1-fold0.attempt") and None)


def diverge_from_3(_run_dir: Path) -> None:
    if os.environ["RANK"] == "1":
        original = BatchLoss.share

        def broken(*arguments: Any) -> torch.Tensor:
            return original(*arguments) * float("nan")

        _before_step(3, lambda: setattr(BatchLoss, "share", broken))


def signalled_while_saving(_run_dir: Path) -> None:
    original = CheckpointStore._write

    def write(*arguments: Any) -> None:
        for number in (signal.SIGTERM, signal.SIGUSR2, signal.SIGUSR2):
            os.kill(os.getpid(), number)
        original(*arguments)

    CheckpointStore._write = write  # type: ignore[method-assign]
    leave_at_3(_run_dir)


def train(run_dir: str, prepare: Callable[[Path], None]) -> int:
    """In the process of a rank: prepare the fault, then train stage 1. Returns the exit status."""
    small_run.thin()
    prepare(Path(run_dir))
    status = stages.main(["--stage", "1", "--run-dir", run_dir, "--fold", "0"])
    for thread in Path("/proc/self/task").glob("*/comm"):
        print(f"thread left: {thread.read_text().strip()}")
    return status


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_run.prepare(tmp_path_factory.mktemp("prepared"), "train.max_nonfinite=3")


@pytest.fixture(scope="module")
def undisturbed(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = small_run.copy_of(prepared, tmp_path_factory.mktemp("undisturbed"))
    codes, printed = exits(train, 2, str(run_dir), note_films)
    assert codes == [0, 0], printed
    # One that frees tensors while the process exits needs the interpreter, and aborts the process.
    assert "thread left: python" in printed[0] and "thread left: pt_gloo" not in printed[0]
    return run_dir


@pytest.fixture
def run_dir(prepared: Path, tmp_path: Path) -> Path:
    return small_run.copy_of(prepared, tmp_path)


def _seen(run_dir: Path) -> list[list[str]]:
    """Return the films of each step over all ranks."""
    names = (run_dir / "seen").read_text().split()
    return [sorted(names[at : at + 4]) for at in range(0, len(names), 4)]


def test_another_number_of_ranks_continues_in_the_same_order_and_says_so(run_dir: Path, undisturbed: Path) -> None:
    printed = []
    for ranks, prepare in ((2, leave_at_3), (1, leave_at_3), (2, note_films)):
        codes, said = exits(train, ranks, str(run_dir), prepare)
        assert codes[0] == (0 if prepare is note_films else LEFT_BY_USR2), said
        printed.append(said[0])
    assert "2 ranks before, 1 now: samples continue in the same order; batch-norm statistics" in printed[1]
    assert "1 ranks before, 2 now" in printed[2]
    assert len(_seen(undisturbed)) == 8 and _seen(run_dir) == _seen(undisturbed)


def test_a_hanging_rank_is_seen_before_the_time_out_and_ends_the_job(run_dir: Path) -> None:
    config = configuration.load(run_dir / "config.yaml", ["train.timeout_s=8"])
    (run_dir / "config.yaml").write_text(configuration.to_yaml(config))
    codes, printed = exits(train, 2, str(run_dir), hang_at_5)
    assert codes[0] == 1 and codes[1] != 0, printed
    for text in printed:  # both ranks print their stacks
        assert "Timeout (0:00:04)" in text and "stages.py" in text, text
    assert "rank 0 of 2 on " in printed[0] and re.search("timed out|time out|timeout", printed[0], re.I), printed[0]


@pytest.mark.parametrize("what", [die_at_5, lose_a_worker_at_3])
def test_a_dead_rank_or_worker_ends_the_job_which_then_continues(run_dir: Path, undisturbed: Path, what: Any) -> None:
    codes, printed = exits(train, 2, str(run_dir), what)
    assert codes == [1, -signal.SIGKILL if what is die_at_5 else 1], printed
    assert "rank 0 of 2 on " in printed[0]
    if what is lose_a_worker_at_3:
        assert "rank 1 of 2 on " in printed[1] and "killed by signal: Killed" in printed[1], printed[1]
    codes, printed = exits(train, 2, str(run_dir), note_films)
    assert codes == [0, 0], printed
    assert small_run.fingerprint(run_dir) == small_run.fingerprint(undisturbed)


def _points(run_dir: Path) -> list[int]:
    """Return the steps for which TensorBoard shows a learning rate."""
    events = EventAccumulator(str(run_dir / "fold0/stage1/tensorboard")).Reload()
    return [event.step for event in events.Scalars("train/lr")]


def test_tensorboard_has_each_step_once_after_a_kill(run_dir: Path) -> None:
    config = configuration.load(run_dir / "config.yaml", ["train.save_every_s=0", "train.log_every=1"])
    (run_dir / "config.yaml").write_text(configuration.to_yaml(config))
    codes, printed = exits(train, 1, str(run_dir), die_alone_at_7)
    assert codes == [-signal.SIGKILL], printed
    saved = int(sorted((run_dir / "fold0/stage1/checkpoints").glob("0*.pt"))[-1].stem)
    assert _points(run_dir)[:saved] == list(range(1, saved + 1)), "nothing is missing up to the checkpoint"
    codes, printed = exits(train, 1, str(run_dir), note_films)
    assert codes == [0] and "resuming at" in printed[0], printed
    assert _points(run_dir) == list(range(1, 9))


def test_signals_while_saving_change_nothing(run_dir: Path) -> None:
    codes, printed = exits(train, 1, str(run_dir), signalled_while_saving)
    assert codes == [LEFT_BY_USR2] and "state saved at epoch 2, batch 1" in printed[0], printed
    assert CheckpointStore(run_dir / "fold0/stage1/checkpoints").newest() is not None


def test_an_overtaken_attempt_leaves_on_every_rank_with_one_line(run_dir: Path) -> None:
    codes, printed = exits(train, 2, str(run_dir), be_overtaken_at_3)
    assert codes == [1, 1], printed
    for text in printed:
        assert "a newer attempt has taken over" in text and "Traceback" not in text, text
    assert not (run_dir / "fold0/stage1/DONE.json").exists()


def test_losses_that_stay_not_finite_end_all_ranks_naming_step_and_films(run_dir: Path) -> None:
    codes, printed = exits(train, 2, str(run_dir), diverge_from_3)
    assert codes == [1, 1], printed
    for text in printed:
        assert "3 times in a row" in text and "Traceback" not in text, text
        assert re.search(r"error: rank \d of 2 on .*epoch \d, seen at batch \d", text), text
        assert re.search(r"films of batch \d: \S+ \S+$", text, re.M), text  # two films a rank

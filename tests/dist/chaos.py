"""Interrupt a short training at random many times; it must end with the bits of an uninterrupted one.

    python -m tests.dist.chaos [--rounds 300] [--ranks 2] [--seed 0]

Each rank has a loader worker. A round starts them, waits for a random amount of progress, sends SIGUSR2,
SIGTERM, SIGINT or SIGKILL to a random process of the job (loader workers included), ends the job as a launcher
would, and sometimes truncates the newest checkpoint. The progress in a round depends on the machine: a training that
ends before the last round is compared, and another one begins. The network is thin, and ranks are forked from this
process after the import of torch, so that the time goes into saving, stopping and resuming.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import tempfile
import time
from collections import Counter
from pathlib import Path

from pneumo_dist import stages
from pneumo_dist.training import trainer  # noqa: F401  imported before the ranks are forked
from tests.dist import small_run
from tests.dist.spawn import fork_rank

DAMAGE = "newest checkpoint truncated, in addition"
TRAININGS = "trainings, each with the bits of the uninterrupted one"
SIGNALS = (signal.SIGUSR2, signal.SIGTERM, signal.SIGINT, signal.SIGKILL, signal.SIGKILL)


def _fork(run_dir: Path, log: Path, ranks: int) -> list[int]:
    store = Path(tempfile.mkdtemp(dir=run_dir)) / "store"

    def work() -> int:
        return stages.main(["--stage", "1", "--run-dir", str(run_dir), "--fold", "0"])

    return [fork_rank(rank, ranks, store, log, work) for rank in range(ranks)]


def _collect(pids: list[int], patience_s: float = 60) -> list[int]:
    """Wait for the ranks; once one has failed, kill the others, as every launcher does."""
    codes: dict[int, int] = {}
    deadline = time.monotonic() + patience_s
    while len(codes) < len(pids):
        for pid in pids:
            if pid not in codes:
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    codes[pid] = os.waitstatus_to_exitcode(status)
        orderly = {0, *(128 + s for s in SIGNALS)}
        if any(code not in orderly for code in codes.values()) or time.monotonic() > deadline:
            for pid in pids:
                if pid not in codes:
                    os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)
    return [codes[pid] for pid in pids]


def _progress(run_dir: Path) -> str:
    try:
        return (run_dir / "fold0" / "stage1" / "checkpoints" / "LAST").read_text()
    except OSError:
        return ""


def _disturb(run_dir: Path, pids: list[int], rng: random.Random) -> str:
    """Wait for one or two saves (or for a part of the start-up), then send a signal."""
    before, saves = _progress(run_dir), rng.choice((0, 1, 1, 2))
    deadline = time.monotonic() + (rng.uniform(0, 1.5) if saves == 0 else 20)
    while time.monotonic() < deadline:
        now = _progress(run_dir)
        if now != before:
            before, saves = now, saves - 1
            if saves == 0:
                break
        if not any(small_run.alive(pid) for pid in pids):
            return "ended before"
        time.sleep(0.005)
    time.sleep(rng.uniform(0, 0.1))
    workers = [child for pid in pids for child in small_run.children(pid)]
    sent = []
    while True:
        victim, number = rng.choice(pids + workers), rng.choice(SIGNALS)
        try:
            os.kill(victim, number)
        except ProcessLookupError:
            return "ended before"
        sent.append(f"{signal.Signals(number).name} to {'a rank' if victim in pids else 'a loader worker'}")
        if victim in pids or number == signal.SIGKILL:  # loader workers ignore the others: repeat until one acts
            return ", ".join(sent)


def _damage(run_dir: Path, rng: random.Random) -> bool:
    files = sorted((run_dir / "fold0" / "stage1" / "checkpoints").glob("*.pt"))
    if len(files) < 2:
        return False
    data = files[-1].read_bytes()
    files[-1].write_bytes(data[: rng.randrange(len(data))])
    return True


def chaos(folder: Path, rounds: int, ranks: int = 2, seed: int = 0) -> Counter[str]:
    """Run the rounds and compare; return the number of each interruption.

    Raises:
        AssertionError: the weights differ, or a training fails without interruption.
    """
    small_run.thin()
    rng = random.Random(seed)
    epochs = 8 + min(rounds, 60)  # two steps each, about one epoch a round
    prepared = small_run.prepare(
        folder / "prepared", f"stage1.epochs={epochs}", "train.save_every_s=0", "train.eval_every=3"
    )
    calm = small_run.copy_of(prepared, folder / "calm")
    log = folder / "log"
    assert _collect(_fork(calm, log, ranks), 600) == [0] * ranks, log.read_text()[-4000:]
    wanted = small_run.fingerprint(calm)
    done, extra = Counter[str](), Counter[str]()
    while sum(done.values()) < rounds:
        extra[TRAININGS] += 1
        run_dir = small_run.copy_of(prepared, folder / f"disturbed{extra[TRAININGS]}")
        ended = run_dir / "fold0" / "stage1" / "DONE.json"
        while sum(done.values()) < rounds and not ended.exists():
            pids = _fork(run_dir, log, ranks)
            what = _disturb(run_dir, pids, rng)
            _collect(pids)
            if what == "ended before":
                continue
            done[what] += 1
            if not ended.exists() and rng.random() < 0.15 and _damage(run_dir, rng):
                extra[DAMAGE] += 1
        assert _collect(_fork(run_dir, log, ranks), 600) == [0] * ranks, log.read_text()[-4000:]
        assert small_run.fingerprint(run_dir) == wanted
        shutil.rmtree(run_dir)
    return done + extra


def _main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp())
    try:
        begin = time.monotonic()
        done = chaos(folder, options.rounds, options.ranks, options.seed)
        for what, count in sorted(done.items()):
            print(f"{count:5d}  {what}")
        print(f"bit-identical after {options.rounds} interruptions in {time.monotonic() - begin:.0f} s")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    _main()

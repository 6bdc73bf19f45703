"""Run a function on N gloo ranks of this machine and return the result of each.

The ranks are forked from a helper process that has imported torch: a rank then starts in milliseconds. The helper
never computes, because a fork would copy torch's thread pool without its threads.
"""

from __future__ import annotations

import atexit
import importlib
import os
import pickle
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
_helper: subprocess.Popen[str] | None = None


def environment(rank: int, world_size: int, store: Path) -> dict[str, str]:
    """Return the environment of rank `rank` of `world_size`."""
    return os.environ | {
        "RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(world_size),
        "PNEUMO_STORE": str(store),
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
    }


def on_ranks(function: Callable[..., Any], world_size: int, *arguments: Any) -> list[Any]:
    """Call the module-level `function(ranks, *arguments)` on every rank; results in rank order.

    Raises:
        AssertionError: a rank failed; with its output.
    """
    with tempfile.TemporaryDirectory() as folder:
        codes, printed = _ask("group", function, world_size, Path(folder), arguments)
        assert codes == [0] * world_size, f"ranks exited {codes}:\n" + "\n".join(printed)
        return [pickle.loads((Path(folder) / f"result{rank}").read_bytes()) for rank in range(world_size)]


def exits(function: Callable[..., int], world_size: int, *arguments: Any) -> tuple[list[int], list[str]]:
    """Call the module-level `function(*arguments)` in `world_size` processes without a process group.

    Returns:
        their exit statuses (the function's result, or minus a signal) and their output. Once one has failed, the
        others get a few seconds to report their error, as under a launcher.
    """
    with tempfile.TemporaryDirectory() as folder:
        return _ask("alone", function, world_size, Path(folder), arguments)


def _ask(
    kind: str, function: Callable[..., Any], world_size: int, folder: Path, arguments: tuple[Any, ...]
) -> tuple[list[int], list[str]]:
    global _helper
    if _helper is None:
        _helper = subprocess.Popen(
            [sys.executable, "-m", "tests.dist.spawn"],
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        atexit.register(_helper.kill)
    assert _helper.stdin and _helper.stdout
    (folder / "arguments").write_bytes(pickle.dumps(arguments))
    name = f"{function.__module__}:{function.__qualname__}"
    print(kind, name, world_size, folder, file=_helper.stdin, flush=True)
    codes = [int(code) for code in _helper.stdout.readline().split()]
    return codes, [(folder / f"printed{rank}").read_text() for rank in range(world_size)]


def fork_rank(rank: int, world_size: int, store: Path, log: Path, work: Callable[[], int]) -> int:
    """Fork rank `rank`: it runs `work` with its output in `log` and exits with the status that `work` returns."""
    pid = os.fork()
    if pid == 0:
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(out, 1)
        os.dup2(out, 2)
        os.environ.update(environment(rank, world_size, store))
        status = 1
        try:
            status = work()
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    return pid


def _rank(kind: str, name: str, folder: Path) -> int:
    import torch

    from pneumo_dist.runtime.meeting import group

    torch.set_num_threads(1)
    module, attribute = name.split(":")
    function = getattr(importlib.import_module(module), attribute)
    arguments = pickle.loads((folder / "arguments").read_bytes())
    if kind == "alone":
        return int(function(*arguments))
    ranks = group.init(folder / "secret", "", meet_s=120, first_s=120)
    result = function(ranks, *arguments)
    (folder / f"result{ranks.rank}").write_bytes(pickle.dumps(result))
    ranks.barrier()
    ranks.close()
    return 0


def _serve() -> None:
    """Fork ranks for each line of standard input (kind, function, count, folder); print their exit statuses."""
    importlib.import_module("pneumo_dist.training.swa")
    importlib.import_module("pneumo_dist.training.trainer")
    for line in sys.stdin:
        kind, name, count, path = line.split()
        importlib.import_module(name.partition(":")[0])  # once, instead of in every rank
        folder, world_size = Path(path), int(count)
        pids = [
            fork_rank(r, world_size, folder / "store", folder / f"printed{r}", lambda: _rank(kind, name, folder))  # noqa: B023
            for r in range(world_size)
        ]
        codes: dict[int, int] = {}
        patience = 5.0 if kind == "alone" else 0.0
        while len(codes) < world_size:
            for pid in pids:
                if pid not in codes and (ended := os.waitpid(pid, os.WNOHANG))[0]:
                    codes[pid] = os.waitstatus_to_exitcode(ended[1])
            patience -= 0.01 if any(codes.values()) else 0
            if patience < 0:
                for pid in pids:
                    if pid not in codes:
                        os.kill(pid, 9)
            time.sleep(0.01)
        print(*(codes[pid] for pid in pids), flush=True)


if __name__ == "__main__":
    _serve()

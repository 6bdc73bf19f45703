"""Run a function on N gloo ranks of this machine, as the local executor does, and return what each one gave."""

from __future__ import annotations

import importlib
import os
import pickle
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def environment(rank: int, world_size: int, store: Path) -> dict[str, str]:
    """The variables that make a process rank `rank` of `world_size`."""
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


def on_ranks(function: Callable[..., Any], world_size: int, *arguments: Any, timeout_s: float = 300) -> list[Any]:
    """Call the module-level `function(ranks, *arguments)` on every rank; results in rank order.

    Raises:
        AssertionError: a rank failed; with its output.
    """
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder) / "store"
        name = f"{function.__module__}:{function.__qualname__}"
        (Path(folder) / "arguments").write_bytes(pickle.dumps(arguments))
        processes = [
            subprocess.Popen(
                [sys.executable, "-m", "tests.dist.spawn", name, folder],
                env=environment(rank, world_size, store),
                cwd=ROOT,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for rank in range(world_size)
        ]
        deadline = time.monotonic() + timeout_s
        try:
            printed = [p.communicate(timeout=max(1, deadline - time.monotonic()))[0] for p in processes]
        finally:
            for process in processes:
                process.kill()
        for rank, process in enumerate(processes):
            assert process.returncode == 0, f"rank {rank} exited {process.returncode}:\n{printed[rank]}"
        return [pickle.loads((Path(folder) / f"result{rank}").read_bytes()) for rank in range(world_size)]


def _main(name: str, folder: str) -> None:
    import torch

    from pneumo_dist.runtime import ranks as ranks_module

    torch.set_num_threads(1)
    module, function = name.split(":")
    arguments = pickle.loads((Path(folder) / "arguments").read_bytes())
    ranks = ranks_module.init(timeout_s=120)
    result = getattr(importlib.import_module(module), function)(ranks, *arguments)
    (Path(folder) / f"result{ranks.rank}").write_bytes(pickle.dumps(result))
    ranks.barrier()
    ranks_module.close(ranks)


if __name__ == "__main__":
    _main(*sys.argv[1:])

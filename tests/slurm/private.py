"""The tests' interface to a running private cluster: submit, query, wait, cause faults. It starts no cluster."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
DEVCLUSTER = ROOT / "slurm" / "devcluster" / "devcluster"
PROFILE = ROOT / "configs" / "cluster" / "devcluster.yaml"
TINY = Path(__file__).parent / "tiny.yaml"  # the recipe of the SLURM tests
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "DEADLINE", "OUT_OF_MEMORY")


def until(ready: Callable[[], Any], within_s: float, awaited: str, every_s: float = 0.2) -> Any:
    """Poll `ready` until it returns something true, and return that; fail with `awaited` in the message."""
    end = time.monotonic() + within_s
    while not (result := ready()):
        assert time.monotonic() < end, f"not within {within_s:.0f} s: {awaited}"
        time.sleep(every_s)
    return result


def devcluster(*words: object, check: bool = True, timeout_s: float = 120) -> subprocess.CompletedProcess[str]:
    """Call slurm/devcluster/devcluster."""
    command = [sys.executable, str(DEVCLUSTER), *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False)
    assert not check or done.returncode == 0, f"devcluster {' '.join(map(str, words))}: {done.stdout}{done.stderr}"
    return done


class PrivateCluster:
    """The running cluster in `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.env = os.environ | {"SLURM_CONF": str(folder / "slurm.conf"), "OMP_NUM_THREADS": "1"}

    def command(
        self, *words: object, check: bool = True, timeout_s: float = 60, cwd: Path = ROOT
    ) -> subprocess.CompletedProcess[str]:
        """Run a command whose SLURM calls reach this cluster."""
        done = subprocess.run(
            [str(word) for word in words],
            capture_output=True,
            text=True,
            env=self.env,
            cwd=cwd,
            timeout=timeout_s,
            check=False,
        )
        assert not check or done.returncode == 0, f"{words} exited {done.returncode}:\n{done.stdout}\n{done.stderr}"
        return done

    def submit(self, *words: object, check: bool = True, timeout_s: float = 420) -> subprocess.CompletedProcess[str]:
        """Call launch/submit.py on this cluster."""
        fixed = (sys.executable, ROOT / "launch" / "submit.py", "--cluster", "slurm", "--profile", PROFILE)
        return self.command(*fixed, *words, check=check, timeout_s=timeout_s)

    def control(self, *words: object) -> None:
        """Do something to the cluster: control("node", "off", "node2")."""
        devcluster(words[0], "--dir", self.folder, *words[1:])

    def job(self, job_id: str) -> dict[str, str]:
        """Return the controller's record of a job: JobState, RunTime, BatchHost, Restarts, ..."""
        text = self.command("scontrol", "-o", "show", "job", job_id).stdout
        return dict(re.findall(r"(\S+?)=(.*?)(?=\s+\S+?=|\s*$)", text.splitlines()[0]))

    def state(self, job_id: str) -> str:
        """Return a job's state, for example RUNNING."""
        return self.job(job_id)["JobState"]

    def wait_for(self, job_id: str, states: Iterable[str] = ENDED, within_s: float = 90) -> str:
        """Wait until a job is in one of `states`; return the state."""
        wanted = (states,) if isinstance(states, str) else tuple(states)

        def reached() -> str | None:
            state = self.state(job_id)
            return state if state in wanted else None

        try:
            return str(until(reached, within_s, f"job {job_id} in {wanted}"))
        except AssertionError as error:
            raise AssertionError(f"{error}: it is {self.job(job_id)}") from None

    def saved(self, since: float) -> bool:
        """Tell whether the controller has saved its jobs since then: when killed, it loses later ones."""
        return (self.folder / "controller" / "job_state").stat().st_mtime > since

    def idle(self) -> bool:
        """Tell whether the queue is empty and every node is idle."""
        queue = self.command("squeue", "-h", "-o", "%i").stdout.split()
        nodes = self.command("sinfo", "-h", "-N", "-t", "idle", "-p", "batch", "-o", "%N").stdout.split()
        return not queue and len(set(nodes)) == 3


def same_weights(one: Path, other: Path) -> None:
    """Assert that two model files have bit-identical weights."""
    import torch

    ours, theirs = (torch.load(path, map_location="cpu", weights_only=True)["model"] for path in (one, other))
    assert ours.keys() == theirs.keys()
    differing = [name for name in ours if not torch.equal(ours[name], theirs[name])]
    assert not differing, f"{one} and {other} differ in {len(differing)} of {len(ours)} tensors, first {differing[0]}"

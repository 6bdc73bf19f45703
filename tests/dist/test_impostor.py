"""A stranger on the network joins a job's rendezvous: it runs no code in a rank, and the ranks meet without it."""

from __future__ import annotations

import logging
import os
import pickle
import socket
import sys
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist

from pneumo_dist.runtime.meeting import group
from pneumo_dist.runtime.meeting.launcher import LOCAL_STORE, launch_of
from pneumo_dist.runtime.meeting.packing import unpack
from tests.dist.spawn import exits


class Evil:
    """Code that a pickle runs where it is read."""

    def __init__(self, marker: str) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (self.marker,)


def play(folder: str, job: str) -> int:
    """Be one of three processes of one node: both ranks of a SLURM job, and the impostor, who comes between them."""
    part = int(os.environ.pop("RANK"))
    del os.environ[LOCAL_STORE]
    os.environ |= {"SLURM_JOB_ID": job, "SLURM_PROCID": str(part % 2), "SLURM_STEP_NUM_TASKS": "2"}
    ready, marker = Path(folder, "ready"), f"{folder}/code-has-run"
    if part == 2:
        _be_the_impostor(launch_of().ports[0], marker)
        ready.touch()
        return 0
    logging.basicConfig(stream=sys.stdout)
    while part == 1 and not ready.exists():
        time.sleep(0.05)
    ranks = group.init(Path(folder, "jobs/.secret"), "", meet_s=60, first_s=60)
    gathered = ranks.gather(f"I am {ranks.rank}")
    ranks.close()
    assert gathered in (None, ["I am 0", "I am 1"]), gathered
    return 0


def _be_the_impostor(port: int, marker: str) -> None:
    """Join as rank 1 as PyTorch's rendezvous would have it, and as one that knows the ranks' own protocol."""
    _until_open(port)
    with pytest.raises((dist.DistError, RuntimeError)):
        place = {"rank": 1, "world_size": 2, "timeout": timedelta(seconds=2)}
        dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", **place)
        dist.gather_object(Evil(marker), dst=0)
    for line in (pickle.dumps(Evil(marker)) + b"\n", b'0000 "n"\n' + pickle.dumps(Evil(marker))):
        with socket.create_connection(("127.0.0.1", port), timeout=10) as visit:
            visit.sendall(line)
            assert visit.recv(100) == b""


def _until_open(port: int) -> None:
    for _ in range(600):
        try:
            socket.create_connection(("127.0.0.1", port)).close()
            return
        except OSError:
            time.sleep(0.05)
    raise AssertionError("the victim does not listen")


def test_an_impostor_neither_joins_nor_runs_code_and_the_job_goes_on(tmp_path: Path) -> None:
    codes, printed = exits(play, 3, str(tmp_path), str(os.getpid()))
    assert codes == [0, 0, 0], printed
    assert "127.0.0.1 was refused: it is not a rank of this job" in printed[0]
    assert not (tmp_path / "code-has-run").exists()


def test_what_an_impostor_sends_in_a_ranks_place_runs_no_code(tmp_path: Path) -> None:
    """Gloo's own connections are not authenticated: who takes one over can send false numbers, but no code."""
    marker = str(tmp_path / "code-has-run")
    sent = pickle.dumps(Evil(marker))
    for data in (sent, b"{}\n" + sent):
        with pytest.raises(ValueError):
            unpack(data)
    assert not Path(marker).exists()
    pickle.loads(sent)  # what a collective of objects does
    assert Path(marker).exists()

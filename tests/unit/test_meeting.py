"""The ranks' first meeting: who gets in, what is compared, and which device and backend come out of it."""

from __future__ import annotations

import ast
import os
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from pneumo_dist.runtime.failure import Failure
from pneumo_dist.runtime.meeting import devices, group, handshake
from pneumo_dist.runtime.meeting import facts as facts_module
from pneumo_dist.runtime.meeting.facts import NCCL, decide, own_facts
from pneumo_dist.runtime.meeting.handshake import Meeting, secret_of
from pneumo_dist.runtime.meeting.launcher import Launch
from pneumo_dist.runtime.meeting.packing import pack, unpack
from pneumo_dist.runtime.ranks import Ranks

PACKAGE = Path(__file__).resolve().parents[2] / "pneumo_dist"
SECRET = b"x" * 64


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handshake, "NAMED_AFTER_S", 0.5)
    monkeypatch.setattr(handshake, "_GREETING_S", 0.5)


def meeting(rank: int, world_size: int, timeout_s: float = 20, **launch: Any) -> Meeting:
    session = f"{os.getpid()} {os.environ['PYTEST_CURRENT_TEST']}"
    return Meeting(Launch(rank=rank, world_size=world_size, session=session, **launch), SECRET, timeout_s)


def facts(number: int, **differing: Any) -> dict[str, Any]:
    same = {
        "problem": "",
        "given": 0,
        "gpus": [],
        "world size": 2,
        "code": "c0de",
        "configuration": "cf",
        "python": "3",
    }
    of_rank = {"rank": number, "host": f"node{number + 1}", "torch": "2", "numpy": "2", "device": "cpu", "gpu": ""}
    return same | of_rank | {"threads": 4} | differing


def gpu(rank: int, node: int, *uuids: str, **differing: Any) -> dict[str, Any]:
    return facts(
        rank, host=f"node{node}", gpus=list(uuids), device="cuda", gpu="H100", **{"world size": 4}, **differing
    )


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(8) as pool:
        yield pool


def test_all_ranks_get_rank_0s_answer(threads: ThreadPoolExecutor) -> None:
    seen: list[Any] = []
    visits = [threads.submit(meeting(rank, 3).visit, facts(rank)) for rank in (2, 1)]
    answer = meeting(0, 3).host(facts(0), lambda ranks, address: seen.append((ranks, address)) or {"problem": "p"})
    assert answer == {"problem": "p"} and [visit.result() for visit in visits] == [(answer, "127.0.0.1")] * 2
    assert [rank["rank"] for rank in seen[0][0]] == [0, 1, 2] and seen[0][1] == "127.0.0.1"


def connected(port: int) -> socket.socket:
    for _ in range(200):
        try:
            return socket.create_connection(("127.0.0.1", port), timeout=5)
        except OSError:
            time.sleep(0.02)
    raise AssertionError("nobody listens")


def test_strangers_are_refused_and_the_ranks_meet_all_the_same(
    threads: ThreadPoolExecutor, caplog: pytest.LogCaptureFixture
) -> None:
    here = meeting(0, 2)
    port, host = here.launch.ports[0], threads.submit(here.host, facts(0), lambda *_: {"problem": ""})
    with connected(port):  # one that says nothing
        for line in (
            replace(here, secret=b"y" * 64).seal("hello", "n"),
            replace(here, launch=replace(here.launch, session="the attempt before")).seal("hello", "n"),
            b"GET / HTTP/1.0\r\n",
        ):
            with connected(port) as stranger:
                stranger.sendall(line)
                assert stranger.recv(100) == b""
        with connected(port) as replaying:  # what it has overheard does not fit the number drawn now
            replaying.sendall(here.seal("hello", "n"))
            assert replaying.recv(1000)
            replaying.sendall(here.seal("facts n and the number of another time", facts(1)))
            assert replaying.recv(100) == b""
        with connected(port):  # one that still says nothing when all have met
            assert meeting(1, 2).visit(facts(1))[0] == {"problem": ""} == host.result()
    assert "Traceback" not in caplog.text
    assert "127.0.0.1 was refused: it is not a rank of this job" in caplog.text


def test_a_port_in_use_is_left_to_its_owner_and_all_ranks_take_the_next(
    threads: ThreadPoolExecutor, caplog: pytest.LogCaptureFixture
) -> None:
    ports = meeting(0, 2).launch.ports
    with socket.create_server(("127.0.0.1", ports[0])):  # accepts connections and never answers
        visit = threads.submit(meeting(1, 2).visit, facts(1))
        assert meeting(0, 2).host(facts(0), lambda *_: {"problem": ""}) == visit.result()[0]
    assert f"port {ports[0]} of this node is in use (EADDRINUSE)" in caplog.text


def test_a_missing_rank_is_named_on_all_others(threads: ThreadPoolExecutor, caplog: pytest.LogCaptureFixture) -> None:
    visit = threads.submit(meeting(1, 4, 1).visit, facts(1))
    problem = meeting(0, 4, 1).host(facts(0), lambda *_: {})["problem"]
    assert problem == visit.result()[0]["problem"] and caplog.text.count("rank 2, 3 did not come to 127.0.0.1") == 2
    assert "of 4 ranks, rank 2, 3 did not come to 127.0.0.1, port " in problem and "on node1, node2" in problem


def test_a_rank_without_rank_0_says_where_it_looked() -> None:
    with pytest.raises(
        Failure, match=r"rank 0 was not found at 127\.0\.0\.1 \(127\.0\.0\.1\), ports \d+, .*\(Connection refused\)"
    ):
        meeting(1, 2, 0.1).visit(facts(1))


def test_a_name_with_addresses_of_both_kinds_is_reached_over_ipv4(monkeypatch: pytest.MonkeyPatch) -> None:
    resolve, families = socket.getaddrinfo, set()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *words: families.add(words[2]) or resolve(*words))
    with pytest.raises(Failure):
        meeting(1, 2, 0.1, address="localhost").visit(facts(1))
    assert families == {socket.AF_INET}


def test_a_loopback_address_for_another_node_is_refused() -> None:
    with pytest.raises(Failure, match=r"rank 0's address localhost is the loopback address 127\..*2 nodes.*/etc/hosts"):
        meeting(1, 2, address="localhost", nodes=2).visit(facts(1))


def test_the_secret_is_made_once_and_refused_where_others_may_read_it(
    threads: ThreadPoolExecutor, tmp_path: Path
) -> None:
    path = tmp_path / "jobs" / ".secret"
    known = set(threads.map(lambda _: secret_of(path), range(8)))
    assert len(known) == 1 and len(known.pop()) == 64 and path.stat().st_mode & 0o777 == 0o600
    assert list(path.parent.iterdir()) == [path]
    path.chmod(0o755)
    with pytest.raises(Failure, match=r"other accounts may read the secret .*\(mode 755\): .*mounted with umask=077"):
        secret_of(path)


def test_a_process_killed_while_it_makes_the_secret_leaves_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(handshake.secrets, "token_hex", lambda _: os._exit(9))
    if (child := os.fork()) == 0:
        secret_of(tmp_path / ".secret")
    os.waitpid(child, 0)
    monkeypatch.undo()
    assert len(secret_of(tmp_path / ".secret")) == 64


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"configuration": "other"}, "rank 1 on node2 has configuration other, but rank 0 on node1 has cf: give all"),
        ({"torch": "1"}, "rank 1 on node2 has torch 1, but rank 0 on node1 has 2: use the same environment"),
        ({"code": "x"}, "code x, but rank 0 on node1 has c0de"),
        ({"world size": 4}, "world size 4, but rank 0 on node1 has 2: start all ranks with one srun"),
        ({"device": "cuda", "gpus": ["a"]}, "device cuda, but rank 0 on node1 has cpu: take nodes of one kind"),
        ({"problem": "blind"}, "rank 1 on node2: blind"),
        ({"rank": 0}, "2 ranks are not numbered 0 to 1: 0 on node1, 0 on node2"),
    ],
)
def test_a_difference_names_rank_host_and_both_values(other: dict[str, Any], words: str) -> None:
    answer = decide([facts(0), facts(1, **other)], 2)
    assert words in answer["problem"] and "backend" not in answer


def test_threads_and_kinds_of_gpu_may_differ_with_a_warning() -> None:
    answer = decide([facts(0), facts(1, threads=8)], 2)
    assert not answer["problem"] and answer["backend"] == "gloo" and answer["seen"] == "2 ranks on 2 nodes, CPU, gloo"
    assert answer["warnings"] == ["rank 1 on node2 has threads 8, but rank 0 on node1 has 4"]


@pytest.mark.parametrize(
    ("ranks", "chosen"),
    [
        ([gpu(r, 1, "a", "b", "c", "d") for r in range(4)], [0, 1, 2, 3]),  # all visible to all
        ([gpu(r, 1, uuid) for r, uuid in enumerate("abcd")], [0, 0, 0, 0]),  # one per task
        ([gpu(r, 1 + r // 2, "a", "b") for r in range(4)], [0, 1, 0, 1]),  # nodes with GPUs of the same name
        ([gpu(r, 1, *("ab" if r % 2 == 0 else "cd")) for r in range(4)], [0, 0, 1, 1]),  # bound, ranks dealt in turns
    ],
)
def test_ranks_with_gpus_of_their_own_take_nccl(ranks: list[dict[str, Any]], chosen: list[int]) -> None:
    answer = decide(ranks, 4)
    assert (answer["backend"], answer["gpus"], answer["warnings"]) == (NCCL, chosen, [])
    assert "H100, nccl" in answer["seen"]


def test_ranks_that_share_gpus_take_gloo_with_a_warning_unless_a_gpu_was_lost() -> None:
    answer = decide([gpu(r, 1, "a", "b") for r in range(4)], 4)
    assert answer["backend"] == "gloo" and answer["gpus"] == [0, 1, 0, 1]
    assert answer["warnings"] == [
        "4 ranks share 2 GPU(s) on node1 and communicate over gloo: slow, for tests only (with MIG: --gpus-per-task)"
    ]
    lost = decide([gpu(r, 1, "a", "b", "c", given=4) for r in range(4)], 4)
    assert "node1 was given 4 GPUs, but its 4 ranks see 3" in lost["problem"]


@pytest.mark.parametrize(
    "given",
    [
        {"PNEUMO_GPUS": "4"}, {"SLURM_GPUS_ON_NODE": "1"}, {"SLURM_STEP_GPUS": "0"}, {"SLURM_JOB_GPUS": "2,3"},
        {"SLURM_GPUS_PER_NODE": "a100:2"}, {"PNEUMO_GPUS": "0", "SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_GPUS": "0"},
    ],
)  # fmt: skip
def test_a_job_with_gpus_does_not_work_on_the_cpu(
    given: dict[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(
        Failure, match=r"the job has GPUs \(.*=.*\), but torch .* \(a CPU build\) sees none, with no NVIDIA"
    ):
        _ = Ranks().device
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(devices, "_DRIVER", tmp_path / "version")
    (tmp_path / "version").write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  470.57.02  Tue Jul 13\n")
    monkeypatch.setattr(torch.cuda, "init", lambda: (_ for _ in ()).throw(RuntimeError("The NVIDIA driver is too old")))
    told = own_facts(Launch(), "", 1)
    assert told["device"] == "cpu" and "(CUDA 13.0) sees none, with driver 470.57.02" in told["problem"]
    assert "The NVIDIA driver is too old" in told["problem"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    assert Ranks().device.type == "cpu"


@pytest.mark.parametrize(
    "around",
    [
        {"PNEUMO_GPUS": "0"}, {"CUDA_VISIBLE_DEVICES": "0"},
        {"SLURM_JOB_ID": "7", "CUDA_VISIBLE_DEVICES": "0"},  # of the shell that called sbatch
        {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1", "SLURM_JOB_GPUS": "0,1"},  # --exclusive
    ],
)  # fmt: skip
def test_without_gpus_the_cpu_is_right(around: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name, value in around.items():
        monkeypatch.setenv(name, value)
    assert Ranks().device.type == "cpu"


def test_a_process_with_mig_sees_one_slice_of_those_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "4")
    for visible, given in (("0,1,2,3", 4), ("MIG-a,MIG-b,MIG-c,MIG-d", 0)):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert own_facts(Launch(), "", 1)["given"] == given


def test_what_editors_leave_is_no_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(facts_module, "__file__", str(tmp_path / "runtime/meeting/facts.py"))
    (tmp_path / "a.py").write_text("1")
    before = facts_module.code_hash()
    (tmp_path / ".#a.py").symlink_to("me@host.123:4")
    (tmp_path / ".ipynb_checkpoints").mkdir()
    (tmp_path / ".ipynb_checkpoints/a.py").write_text("2")
    assert facts_module.code_hash() == before
    (tmp_path / "b.py").write_text("")
    assert facts_module.code_hash() != before


def test_a_rank_that_dies_after_the_meeting_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        answer = {"store": ["127.0.0.1", listener.getsockname()[1]], "backend": "gloo", "hosts": ["n1", "n2"]}
        with pytest.raises(Failure, match="^rank 1 on n2 did not connect: see its log$"):
            group._connect(Ranks(0, 2), answer, [listener], 1)


def test_a_rank_tells_its_gpus_and_takes_the_one_it_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    gpus = [SimpleNamespace(uuid="u0", name="H100"), SimpleNamespace(uuid="u1", name="H100")]
    monkeypatch.setattr(torch.cuda, "get_device_properties", gpus.__getitem__)
    told = own_facts(Launch(), "", 1)
    assert (told["device"], told["gpus"], told["gpu"]) == ("cuda", ["u0", "u1"], "H100")
    assert str(Ranks(3, 4, gpu=1).device) == "cuda:1" == str(Ranks(3, 4, gpu=3).device)


def test_an_interface_that_other_nodes_cannot_reach_or_that_is_not_there_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    assert own_facts(Launch(), "", 1)["problem"] == ""
    assert (
        "GLOO_SOCKET_IFNAME=lo is the loopback interface, but there are 2"
        in own_facts(Launch(nodes=2), "", 1)["problem"]
    )
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "ib9")
    assert (
        "GLOO_SOCKET_IFNAME=ib9 names no interface of this node: set it to one of lo"
        in own_facts(Launch(), "", 1)["problem"]
    )


def test_gloo_takes_the_interface_over_which_the_ranks_met_unless_one_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth7")
    group._choose_interface("127.0.1.1", "127.0.0.1")
    assert os.environ["GLOO_SOCKET_IFNAME"] == "eth7"
    monkeypatch.delenv("GLOO_SOCKET_IFNAME")
    group._choose_interface("127.0.1.1", "127.0.0.1")
    assert os.environ["GLOO_SOCKET_IFNAME"] == "lo"


def test_values_come_back_from_bytes_and_code_does_not() -> None:
    arrays = {"a": np.array(["é", "xyz"]), "b": np.zeros((2, 0, 3), bool), "c": np.array(0.1, np.float32)}
    value = [1, 0.1, float("inf"), None, "text", {"x": [True]}, arrays]
    came = unpack(pack(value))
    assert came[:6] == value[:6]
    assert all(came[6][k].dtype == v.dtype and np.array_equal(came[6][k], v) for k, v in arrays.items())
    for wrong in ({1, 2}, np.array([object()]), [{"x": {1: 2}}]):
        with pytest.raises((TypeError, ValueError)):
            pack(wrong)


def test_nothing_that_crosses_ranks_is_a_pickle() -> None:
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            called = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            unsafe = called.endswith(("gather_object", "_object_list", "pickle.loads", "pickle.dumps", "pickle.load"))
            assert not unsafe, f"{path}: {called}"

"""What each rank tells of itself, the comparison of all ranks, and the choice of GPUs and backend. No communication."""

from __future__ import annotations

import hashlib
import os
import platform
import socket
from collections import Counter
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pneumo_dist.runtime.meeting.devices import blindness, visible_gpus
from pneumo_dist.runtime.meeting.launcher import Launch
from pneumo_dist.runtime.processes import thread_count

Facts = dict[str, Any]
NCCL = "cpu:gloo,cuda:nccl"
# Facts that must be the same on every rank, each with what to do where they differ.
_SAME = {
    "world size": "start all ranks with one srun or one torchrun command",
    "code": "start all ranks from one copy of the code",
    "configuration": "give all ranks the same run directory, on a file system that all nodes share",
    "python": "use the same environment on all nodes",
    "torch": "use the same environment on all nodes",
    "numpy": "use the same environment on all nodes",
    "device": "take nodes of one kind (constraint in the profile)",
}
# Facts that may differ: the result is right, but its last bits depend on them, and the slowest rank sets the pace.
_ALIKE = ("gpu", "threads")


def code_hash() -> str:
    """Return a hash of the package's source files, without what editors leave beside them."""
    root = Path(__file__).resolve().parents[2]
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if not any(part.startswith(".") for part in name.parts):
            digest.update(f"{name}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def own_facts(launch: Launch, configuration: str, threads: int) -> Facts:
    """Return what this rank tells; configuration: hash of its settings; threads: 0 for the task's cores."""
    gpus, visible = visible_gpus(), os.environ.get("CUDA_VISIBLE_DEVICES", "")
    return {
        "rank": launch.rank,
        "host": socket.gethostname(),
        "problem": blindness() or _interface_problem(launch),
        # CUDA shows a process only one MIG slice, however many it was given.
        "given": 0 if "MIG" in visible else int(os.environ.get("SLURM_GPUS_ON_NODE") or 0),
        "gpus": [uuid for uuid, _ in gpus],
        "world size": launch.world_size,
        "code": code_hash(),
        "configuration": configuration[:12],
        "python": platform.python_version(),
        "torch": version("torch"),
        "numpy": version("numpy"),
        "device": "cuda" if gpus else "cpu",
        "gpu": gpus[0][1] if gpus else "",
        "threads": thread_count(threads),
    }


def _interface_problem(launch: Launch) -> str:
    """Return what is wrong with the network interfaces that the environment names; "" for nothing."""
    known = [name for _, name in socket.if_nameindex()]
    advice = f"set it to one of {', '.join(known[launch.nodes > 1 :])} in the profile's env, or not at all"
    for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        value = os.environ.get(variable, "")
        if value == "lo" and launch.nodes > 1:
            return f"{variable}=lo is the loopback interface, but there are {launch.nodes} nodes: {advice}"
        # NCCL takes prefixes and exclusions as well.
        if variable == "GLOO_SOCKET_IFNAME" and value and not set(known) & set(value.split(",")):
            return f"{variable}={value} names no interface of this node: {advice}"
    return ""


def decide(ranks: Sequence[Facts], world_size: int) -> Facts:
    """Return the answer for all ranks: problem, warnings, and for each rank its GPU, and the backend of all.

    ranks: their facts, sorted by rank.
    """
    problem = _problem(ranks, world_size)
    if problem:
        return {"problem": problem}
    gpus, shared = _assign(ranks)
    warnings = [line for name in _ALIKE if (line := _difference(ranks, name))]
    if shared:
        warnings.append(f"{shared} and communicate over gloo: slow, for tests only (with MIG: --gpus-per-task)")
    on_gpus = ranks[0]["device"] == "cuda"
    nodes = len({rank["host"] for rank in ranks})
    backend = NCCL if on_gpus and not shared else "gloo"
    seen = f"{world_size} ranks on {nodes} nodes, {ranks[0]['gpu'] or 'CPU'}, {'nccl' if backend == NCCL else 'gloo'}"
    return {"problem": "", "warnings": warnings, "gpus": gpus, "backend": backend, "seen": seen}


def _problem(ranks: Sequence[Facts], world_size: int) -> str:
    """Return why these ranks must not work together, each rank with its host; "" where they may."""
    lines = []
    for problem in dict.fromkeys(rank["problem"] for rank in ranks if rank["problem"]):
        concerned = [rank for rank in ranks if rank["problem"] == problem]
        more = f" (and {len(concerned) - 1} more)" if len(concerned) > 1 else ""
        lines.append(f"rank {concerned[0]['rank']} on {concerned[0]['host']}{more}: {problem}")
    lines += [f"{line}: {advice}" for name, advice in _SAME.items() if (line := _difference(ranks, name))]
    numbers = [rank["rank"] for rank in ranks]
    if numbers != list(range(world_size)):
        hosts = ", ".join(f"{rank['rank']} on {rank['host']}" for rank in ranks)
        lines.append(f"{world_size} ranks are not numbered 0 to {world_size - 1}: {hosts}: {_SAME['world size']}")
    for host in sorted({rank["host"] for rank in ranks}):
        there = [rank for rank in ranks if rank["host"] == host]
        seen = len({uuid for rank in there for uuid in rank["gpus"]})
        if 0 < seen < min(len(there), max(rank["given"] for rank in there)):
            lines.append(
                f"{host} was given {there[0]['given']} GPUs, but its {len(there)} ranks see {seen}: see nvidia-smi "
                "there, report the node, and name it in the profile's exclude"
            )
    return "; ".join(lines)


def _difference(ranks: Sequence[Facts], name: str) -> str:
    """Return the first difference of a fact from rank 0's, with both ranks, hosts and values; "" for none."""
    first = ranks[0]
    other = next((rank for rank in ranks if rank[name] != first[name]), None)
    if other is None:
        return ""
    return (
        f"rank {other['rank']} on {other['host']} has {name} {other[name]}, "
        f"but rank {first['rank']} on {first['host']} has {first[name]}"
    )


def _assign(ranks: Sequence[Facts]) -> tuple[list[int], str]:
    """Give each rank the least used of the GPUs that it sees; return the indices, and who shares GPUs ("": nobody)."""
    uses: Counter[tuple[str, str]] = Counter()
    indices = []
    for rank in ranks:
        seen = [(str(rank["host"]), str(uuid)) for uuid in rank["gpus"]]
        index = min(range(len(seen)), key=lambda i: uses[seen[i]], default=0)
        uses.update(seen[index : index + 1])
        indices.append(index)
    host = next((host for (host, _), n in uses.items() if n > 1), "")
    there = [n for (name, _), n in uses.items() if name == host]
    return indices, f"{sum(there)} ranks share {len(there)} GPU(s) on {host}" if host else ""

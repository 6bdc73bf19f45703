"""From the meeting of the ranks to their process group. Every process of a stage with ranks calls `init` once."""

from __future__ import annotations

import fcntl
import logging
import os
import re
import socket
import struct
from contextlib import suppress
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

from pneumo_dist.runtime.failure import Failure
from pneumo_dist.runtime.meeting.facts import Facts, decide, own_facts
from pneumo_dist.runtime.meeting.handshake import Meeting, secret_of
from pneumo_dist.runtime.meeting.launcher import LOCAL_STORE, Launch, contradiction, launch_of, left_behind
from pneumo_dist.runtime.ranks import Ranks, discover

log = logging.getLogger(__name__)
_SIOCGIFADDR = 0x8915  # ioctl: the IPv4 address of an interface


def init(secret_file: Path, configuration: str, meet_s: float, first_s: float, threads: int = 0) -> Ranks:
    """Meet the other ranks, compare, set up the process group (NCCL where every rank has its own GPU, else gloo).

    Args:
        secret_file: the run's secret; ranks of the local executor have a file of their own.
        configuration: hash of the settings.
        meet_s: seconds until all ranks must have met and connected.
        first_s: seconds that a collective may wait for the slowest rank until the first step is done.
        threads: torch threads of a rank; 0 for the task's cores.

    Raises:
        Failure: the ranks cannot work together; on every rank, with the same line.
    """
    launch = launch_of()
    if problem := contradiction(launch):
        raise Failure(problem)
    if launch.rank == 0 and (left := left_behind(launch)):
        log.warning("left in the environment by an earlier torchrun, and ignored: %s", " ".join(left))
    if launch.world_size == 1:
        log.info("1 rank, %s", discover().device)
        return discover()
    meeting = Meeting(launch, secret_of(Path(os.environ.get(LOCAL_STORE, secret_file))), meet_s)
    own, listeners, address = own_facts(launch, configuration, threads), list[socket.socket](), ""

    def answer_all(facts: list[Facts], at: str) -> Facts:
        # The store of the process group: one address, and a port that nobody can know beforehand.
        listeners.append(socket.create_server((at, 0), backlog=1024))
        store = [at, listeners[0].getsockname()[1]]
        return decide(facts, launch.world_size) | {"store": store, "hosts": [rank["host"] for rank in facts]}

    if launch.rank:
        answer, address = meeting.visit(own)
    else:
        answer = meeting.host(own, answer_all)
    if answer["problem"]:
        raise Failure(answer["problem"])
    _announce(launch, answer)
    _choose_interface(address, str(answer["store"][0]))
    ranks = replace(discover(), gpu=int(answer["gpus"][launch.rank]))
    _connect(ranks, answer, listeners, meet_s)
    ranks.set_timeout(first_s)
    return ranks


def _announce(launch: Launch, answer: Facts) -> None:
    if launch.rank == 0:
        log.info("%s", answer["seen"])
        for warning in answer["warnings"]:
            log.warning("%s", warning)


def _choose_interface(own: str, first: str) -> None:
    """Have gloo use the interface over which the ranks met: by default it takes the node's name, often a loopback."""
    address = first if not own or own.startswith("127.") else own
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            with suppress(OSError):  # an interface without an address
                request = struct.pack("256s", name.encode())
                if socket.inet_ntoa(fcntl.ioctl(probe, _SIOCGIFADDR, request)[20:24]) == address:
                    os.environ.setdefault("GLOO_SOCKET_IFNAME", name)


def _connect(ranks: Ranks, answer: Facts, listeners: list[socket.socket], timeout_s: float) -> None:
    import torch
    import torch.distributed as dist
    import torch.distributed.nn  # now: default arguments in there would keep the group, and its threads, for ever
    from torch.distributed import TCPStore  # type: ignore[attr-defined]  # public, but not in __all__

    if ranks.device.type == "cuda":
        torch.cuda.set_device(ranks.device)
    (address, port), timeout = answer["store"], timedelta(seconds=timeout_s)
    try:
        store = TCPStore(
            address,
            port,
            is_master=ranks.first,
            timeout=timeout,
            wait_for_workers=False,
            master_listen_fd=listeners[0].detach() if listeners else None,
        )
        dist.init_process_group(
            answer["backend"], store=store, rank=ranks.rank, world_size=ranks.world_size, timeout=timeout
        )
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        if absent := re.search(r"keys: .*/(\d+)$", reason):
            rank = int(absent[1])
            raise Failure(f"rank {rank} on {answer['hosts'][rank]} did not connect: see its log") from None
        interface = os.environ.get("GLOO_SOCKET_IFNAME", "")
        raise Failure(
            f"the ranks have met at {address}, but this one cannot connect to the others "
            f"(GLOO_SOCKET_IFNAME={interface}): {reason}: set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME in the "
            "profile's env"
        ) from None

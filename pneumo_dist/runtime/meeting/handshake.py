"""The first meeting of the ranks: rank 0 listens, every other rank proves that it knows the run's secret, then tells.

Each line is `HMAC JSON`, keyed with a secret that only the owner of the run can read and bound to the job's attempt and
to a number that each side has just drawn: a stranger, or a rank of another job, can neither join nor be believed.
"""

from __future__ import annotations

import asyncio
import errno
import hmac
import json
import logging
import os
import secrets
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

from pneumo_dist.runtime.failure import Failure
from pneumo_dist.runtime.meeting.launcher import LOOPBACK, Launch

log = logging.getLogger(__name__)
Facts = dict[str, Any]  # what a rank tells
NAMED_AFTER_S = 60.0  # a rank that is missing for so long is named
_GREETING_S = 5.0  # for either side to show that it knows the secret: a stranger may say nothing
_SECRET_BYTES = 64


def secret_of(path: Path) -> bytes:
    """Return the secret in `path`, which only its owner may read; the first process that asks makes it.

    Raises:
        Failure: others may read the file, or it is not whole.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        with NamedTemporaryFile("w", dir=path.parent, prefix=path.name) as file:  # of mode 600
            file.write(secrets.token_hex(_SECRET_BYTES // 2))
            file.flush()
            os.fsync(file.fileno())
            with suppress(FileExistsError):  # another rank was faster
                os.link(file.name, path)
    mode = path.stat().st_mode & 0o777
    if mode & 0o077:
        raise Failure(
            f"{path}: other accounts may read the secret of this run (mode {mode:o}): remove it; if the next "
            "one is the same, this file system ignores modes: have it mounted with umask=077, or keep runs on another"
        )
    with suppress(PermissionError):
        if len(secret := path.read_bytes()) == _SECRET_BYTES:
            return secret
    raise Failure(f"{path}: the secret of this run is damaged or of another account: remove it, repeat the command")


@dataclass(frozen=True)
class Meeting:
    """One meeting as one rank sees it."""

    launch: Launch
    secret: bytes
    timeout_s: float

    def seal(self, what: str, value: Any) -> bytes:
        """Return `value` as a line that only ranks of this meeting can write; `what` says its place in the exchange."""
        text = json.dumps(value)
        return f"{self._proof(what, text)} {text}\n".encode()

    def open(self, what: str, line: bytes) -> Any:
        """Return the value of a line.

        Raises:
            ValueError: no rank of this meeting wrote it, or not for this place.
        """
        proof, _, text = line.decode(errors="replace").rstrip("\n").partition(" ")
        if not hmac.compare_digest(proof.encode(), self._proof(what, text).encode()):
            raise ValueError("who answers is not a rank of this job")
        return json.loads(text)

    def _proof(self, what: str, text: str) -> str:
        words = f"{self.launch.session}\n{what}\n{text}"
        return hmac.new(self.secret, words.encode(), "sha256").hexdigest()

    def host(self, own: Facts, decide: Callable[[list[Facts], str], Facts]) -> Facts:
        """Collect the facts of all ranks, send everyone what `decide` makes of them and of our address; on rank 0."""
        return asyncio.run(_Host(self, own).meet(decide))

    def visit(self, own: Facts) -> tuple[Facts, str]:
        """Tell rank 0 our facts; return its answer and this rank's own address; on every other rank.

        Raises:
            Failure: rank 0 was not found, or did not answer.
        """
        return asyncio.run(_visit(self, own))


def _listen(launch: Launch) -> socket.socket:
    """Listen at the first free port, for other nodes only where there are any."""
    for port in launch.ports:
        try:
            return socket.create_server((LOOPBACK if launch.nodes == 1 else "", port), backlog=1024)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
            log.warning("port %d of this node is in use (EADDRINUSE): the ranks take the next one", port)
    raise Failure(f"all ports where the ranks may meet are in use on this node: {launch.ports}")


class _Host:
    """Rank 0's side."""

    def __init__(self, meeting: Meeting, own: Facts) -> None:
        self._meeting, self._own = meeting, own
        self._arrived: list[tuple[Facts, str, asyncio.StreamWriter]] = []
        self._strangers: set[str] = set()
        self._complete = asyncio.Event()
        self._port = 0

    async def meet(self, decide: Callable[[list[Facts], str], Facts]) -> Facts:
        listener = _listen(self._meeting.launch)
        self._port = listener.getsockname()[1]
        server = await asyncio.start_server(self._greet, sock=listener)
        problem = await self._wait()
        server.close()  # without waiting for it: a stranger may keep his connection
        facts = sorted([self._own, *(facts for facts, _, _ in self._arrived)], key=lambda rank: int(rank["rank"]))
        answer = {"problem": problem} if problem else decide(facts, self._address())
        for _, place, writer in self._arrived:
            with suppress(OSError):
                writer.write(self._meeting.seal(f"answer {place}", answer))
                await writer.drain()
            writer.close()
        return answer

    async def _greet(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Let one rank prove that it knows the secret, and take its facts; refuse everyone else."""
        try:
            async with asyncio.timeout(_GREETING_S):
                place = self._meeting.open("hello", await reader.readline())
            writer.write(self._meeting.seal(f"welcome {place}", drawn := secrets.token_hex(16)))
            place += drawn
            async with asyncio.timeout(NAMED_AFTER_S):
                facts = self._meeting.open(f"facts {place}", await reader.readline())
        except (TimeoutError, OSError, ValueError, asyncio.CancelledError):  # cancelled: the meeting is over
            if (stranger := _end(writer, "peername")) not in self._strangers:
                log.warning("%s was refused: it is not a rank of this job", stranger)
            self._strangers.add(stranger)
            writer.close()
            return
        self._arrived.append((facts, place, writer))
        if len(self._arrived) == self._meeting.launch.world_size - 1:
            self._complete.set()

    async def _wait(self) -> str:
        """Wait for all ranks; return which are missing, "" for none."""
        first_s = min(NAMED_AFTER_S, self._meeting.timeout_s)
        for wait_s in (first_s, self._meeting.timeout_s - first_s):
            with suppress(TimeoutError):
                await asyncio.wait_for(self._complete.wait(), wait_s)
                return ""
            if wait_s == first_s:
                log.warning("%s", self._missing())
        return self._missing()

    def _missing(self) -> str:
        launch = self._meeting.launch
        here = {int(facts["rank"]): str(facts["host"]) for facts in [self._own, *(come[0] for come in self._arrived)]}
        missing = [str(rank) for rank in range(launch.world_size) if rank not in here]
        named = ", ".join(missing[:8]) + (f" and {len(missing) - 8} more" if len(missing) > 8 else "")
        nodes = os.environ.get("SLURM_STEP_NODELIST", "")
        return (
            f"of {launch.world_size} ranks, rank {named} did not come to {launch.address}, port {self._port}; the "
            f"others are on {', '.join(sorted({*here.values()}))}{f' of the nodes {nodes}' if nodes else ''}: see the "
            "log of the missing rank, and whether its node resolves and reaches that address"
        )

    def _address(self) -> str:
        """Return the address of this node by which ranks of other nodes have reached it."""
        ends = [_end(writer, "sockname") for _, _, writer in self._arrived]
        return next((end for end in ends if not end.startswith("127.")), LOOPBACK)


def _end(writer: asyncio.StreamWriter, which: str) -> str:
    return str((writer.get_extra_info(which) or ("?",))[0])


def _resolved(launch: Launch) -> str:
    """Return rank 0's address as a number.

    Raises:
        Failure: on a node other than rank 0's the name means this very node.
    """
    try:
        address = socket.gethostbyname(launch.address)
    except OSError:
        return "unknown"
    own = socket.gethostname().partition(".")[0]
    if address.startswith("127.") and launch.nodes > 1 and launch.address.partition(".")[0] != own:
        raise Failure(
            f"rank 0's address {launch.address} is the loopback address {address} on {own}, but there are "
            f"{launch.nodes} nodes: correct /etc/hosts of this node, or MASTER_ADDR where torchrun started the ranks"
        )
    return address


async def _visit(meeting: Meeting, own: Facts) -> tuple[Facts, str]:
    launch, begin, named = meeting.launch, time.monotonic(), False
    where = f"{launch.address} ({_resolved(launch)}), ports {launch.ports[0]}, {launch.ports[1]}, ..."
    reasons: set[str] = set()
    while True:
        for port in launch.ports:
            reader, writer = None, None
            try:
                async with asyncio.timeout(_GREETING_S):
                    reader, writer = await asyncio.open_connection(launch.address, port, family=socket.AF_INET)
                    place = secrets.token_hex(16)
                    writer.write(meeting.seal("hello", place))
                    place += meeting.open(f"welcome {place}", await reader.readline())
                break
            except (OSError, TimeoutError, ValueError) as error:
                # asyncio's own text names the port; negative numbers are of name resolution
                number = getattr(error, "errno", None) or 0
                reasons.add(os.strerror(number) if number > 0 else str(error) or "no answer")
                if writer:
                    writer.close()
        else:
            waited_s = time.monotonic() - begin
            problem = f"rank 0 was not found at {where} within {waited_s:.0f} s ({'; '.join(sorted(reasons))})"
            if waited_s > meeting.timeout_s:
                raise Failure(f"{problem}: see the log of rank 0, and whether this node reaches that address")
            if waited_s > NAMED_AFTER_S and not named:
                log.warning("%s", problem)
                named = True
            await asyncio.sleep(0.3)
            continue
        writer.write(meeting.seal(f"facts {place}", own))
        try:
            async with asyncio.timeout(meeting.timeout_s + NAMED_AFTER_S):
                answer = meeting.open(f"answer {place}", await reader.readline())
        except (OSError, TimeoutError, ValueError):
            raise Failure(f"rank 0 at {where} has left before all ranks had come: see its log") from None
        address = _end(writer, "sockname")
        writer.close()
        return answer, address

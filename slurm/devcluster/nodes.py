"""The nodes of a private cluster: Linux namespaces of this machine, connected by a bridge, each with its own slurmd.

Every action affects the node's namespaces only: when its processes have ended, no named network namespace, no mount
and no file outside the cluster's directory is left.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

from conf import Network
from processes import ClusterError, Daemons, Process, run, wait


class Node:
    """One node, whose power, network and slurmd can be cut separately."""

    def __init__(self, name: str, folder: Path, network: Network) -> None:
        self.name = name
        self.folder = folder
        self.network = network
        self.daemons = Daemons(folder)

    @property
    def process(self) -> Process | None:
        """Return the unshare(1) process that holds the node's namespaces; None while the node is off."""
        return self.daemons.find(self.name)

    def on(self) -> None:
        """Power on: create the namespaces, connect the network, start slurmd (in the node, by node-init.sh)."""
        if self.process:
            raise ClusterError(f"{self.name} is already on")
        (self.folder / "spool" / self.name).mkdir(parents=True, exist_ok=True)
        script = Path(__file__).resolve().parent / "node-init.sh"
        process = self.daemons.spawn(
            self.name,
            *("unshare", "--net", "--uts", "--mount", "--pid", "--ipc", "--fork", "--kill-child=KILL", "--mount-proc"),
            *(script, self.folder, self.name, self.network.address(self.name)),
        )
        machine = Path("/proc/self/ns/net").readlink()

        def has_namespaces() -> bool:
            try:
                return Path(f"/proc/{process.pid}/ns/net").readlink() != machine
            except OSError:
                raise ClusterError(
                    f"{self.name}: unshare failed; the private cluster needs permission to create namespaces and mounts"
                    " (in a container: CAP_SYS_ADMIN and CAP_NET_ADMIN)",
                    self.folder / "log" / f"{self.name}.out",
                ) from None

        wait(has_namespaces, 10, f"{self.name} got no network namespace")
        link = self.network.link(self.name)
        run("ip", "link", "add", link, "type", "veth", "peer", "name", "eth0", "netns", str(process.pid))
        run("ip", "link", "set", link, "master", self.network.bridge, "up")

    def off(self) -> None:
        """Cut the power: slurmd, the processes of all jobs and the network card disappear at once."""
        process = self._running()
        process.kill()  # --kill-child kills the node's process 1, and the kernel then kills all others
        with contextlib.suppress(ClusterError):  # the kernel may have removed it already
            run("ip", "link", "delete", self.network.link(self.name))

    def cut(self) -> None:
        """Disconnect the network; processes continue."""
        run("ip", "link", "set", self.network.link(self._running_name()), "down")

    def heal(self) -> None:
        """Connect the network again."""
        run("ip", "link", "set", self.network.link(self._running_name()), "up")

    def slurmd_kill(self) -> None:
        """SIGKILL slurmd; the steps of running jobs continue."""
        find = "cat /proc/[0-9]*/stat 2>/dev/null | awk '$2 == \"(slurmd)\" {print $1}'"
        run(*self.inside("bash", "-c", f"kill -9 $({find})"))

    def slurmd_start(self) -> None:
        """Start slurmd again; it finds its steps."""
        command = f"setsid slurmd -D >>{self.folder}/log/{self.name}.out 2>&1 </dev/null &"
        run(*self.inside("bash", "-c", command), env=self.daemons.environment())

    def inside(self, *command: str) -> list[str]:
        """Return the command line that runs `command` in the node."""
        process = self._running()
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        if not children:
            raise ClusterError(f"{self.name} has no process 1: power it off and on again")
        return ["nsenter", "--target", children[0], "--all", "--", *command]

    def _running(self) -> Process:
        process = self.process
        if process is None:
            raise ClusterError(f"{self.name} is off: `devcluster node on {self.name}` powers it on")
        return process

    def _running_name(self) -> str:
        self._running()
        return self.name

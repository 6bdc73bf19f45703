"""Start and stop of a private cluster: munge, optional accounting, the controller and the nodes.

It leaves nothing behind: every process, network interface and file is removed when the cluster is stopped,
when its start fails, and when its owner dies.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import select
import shutil
import sys
import time
from pathlib import Path

import conf
from conf import SUBNETS, Network, Size
from nodes import Node
from processes import ClusterError, Daemons, Process, run, wait
from services import Services

HERE = Path(__file__).resolve().parent
PROGRAMS = ("slurmctld", "slurmd", "scontrol", "sinfo", "munged", "unshare", "nsenter", "ip")
ACCOUNTING_PROGRAMS = ("slurmdbd", "sacct", "mariadbd", "mariadb-install-db", "mariadb")
LONGEST = 80  # characters of the directory's path: the path of a unix socket in it must be shorter than 108


def check_machine(accounting: bool) -> None:
    """Check that this machine can run a private cluster.

    Raises:
        ClusterError: not Linux, not root, or programs missing.
    """
    if sys.platform != "linux":
        raise ClusterError("the private cluster needs Linux: its nodes are Linux namespaces")
    if os.geteuid() != 0:
        raise ClusterError(
            "only root may start the private cluster: it creates namespaces and a network bridge (try sudo)"
        )
    path = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])
    programs = PROGRAMS + (ACCOUNTING_PROGRAMS if accounting else ())
    missing = ", ".join(name for name in programs if not shutil.which(name, path=path))
    if missing:
        raise ClusterError(f"not installed: {missing}; on Debian or Ubuntu: sudo bash {HERE}/install-packages.sh")
    os.environ["PATH"] = path  # daemons are in sbin, which is often missing in a user's PATH


class Cluster:
    """The private cluster in `folder`, which holds all its files."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.resolve()
        self.daemons = Daemons(self.folder)
        self.services = Services(self.folder)

    @property
    def slurm_conf(self) -> Path:
        """Return the path that clients need in SLURM_CONF."""
        return self.folder / "slurm.conf"

    def load(self) -> tuple[Network, Size]:
        """Return the running cluster's network and size.

        Raises:
            ClusterError: no cluster runs in this directory.
        """
        try:
            saved = json.loads((self.folder / "cluster.json").read_text())
        except OSError:
            message = f"no cluster runs in {self.folder}: `devcluster start --dir {self.folder}` starts one"
            raise ClusterError(message) from None
        return Network(saved["number"]), Size(**saved["size"])

    # ---- start

    def start(self, size: Size, owner: int | None = None) -> None:
        """Start everything and return when every node is idle; the cluster stops when process `owner` ends.

        Raises:
            ClusterError: the start failed, with the reason; nothing is left running.
        """
        check_machine(size.accounting)
        self._check_folder()
        for name in ("munge", "controller", "spool", "log", "run", "dev"):
            (self.folder / name).mkdir(parents=True)
            (self.folder / name).chmod(0o755)  # munge wants a way to its socket for all, whatever the umask
        self.folder.chmod(0o755)
        (self.folder / "controller").chmod(0o700)
        starter = Process.of(os.getpid())
        assert starter is not None
        (self.folder / "run" / "start").write_text(f"{starter.pid} {starter.started}\n")
        try:
            if owner is not None:
                self.daemons.spawn("watch", sys.executable, HERE / "devcluster", "_watch", self.folder, str(owner))
            network = self._reserve_network()
            self._write_files(size, network)
            self.services.start_munge()
            if size.accounting:
                self.services.start_accounting(network)
            self.services.start_controller()
            for name in size.node_names:
                Node(name, self.folder, network).on()
            wait(lambda: self._idle() >= size.nodes, 30, "not every node came up", self.folder / "log/node1.out")
            (self.folder / "run" / "start").unlink()
        except BaseException as error:
            if isinstance(error, ClusterError) and error.log and error.log.exists():
                lines = error.log.read_text(errors="replace").splitlines()[-15:]
                print("\n".join([f"--- end of {error.log.name}:", *lines, "---"]), file=sys.stderr)
            self.stop()
            raise

    def _check_folder(self) -> None:
        text = str(self.folder)
        if (self.folder / "cluster.json").exists():
            raise ClusterError(f"a cluster runs in {text} already: `devcluster stop --dir {text}`, or another --dir")
        if self.folder.exists() and (not self.folder.is_dir() or any(self.folder.iterdir())):
            raise ClusterError(f"{text} is not an empty directory: a cluster needs its own")
        if len(text) > LONGEST or not re.fullmatch(r"[A-Za-z0-9_./-]+", text):
            raise ClusterError(
                f"{text}: at most {LONGEST} plain characters, because of the sockets in it (try --dir /tmp/NAME)"
            )
        for parent in self.folder.parents:
            if parent.exists() and not parent.stat().st_mode & 0o001:
                raise ClusterError(
                    f"{parent} is not accessible to all users: munge refuses a socket below it (try --dir /tmp/NAME)"
                )

    def _reserve_network(self) -> Network:
        failure = ""
        for number in SUBNETS:
            network = Network(number)
            try:
                run("ip", "link", "add", network.bridge, "type", "bridge")  # fails if it exists: an atomic lock
            except ClusterError as error:
                failure = str(error)
                if "File exists" in failure:
                    continue
                message = f"cannot create a network bridge ({failure}); a container needs CAP_NET_ADMIN"
                raise ClusterError(message) from None
            run("ip", "link", "set", network.bridge, "alias", self.folder)  # how `--stale` finds the directory
            run("ip", "address", "add", f"{network.head}/24", "dev", network.bridge)
            run("ip", "link", "set", network.bridge, "up")
            return network
        raise ClusterError("all subnets are in use: `devcluster stop --stale` removes crashed clusters")

    def _write_files(self, size: Size, network: Network) -> None:
        for gpu in range(size.gpus):  # SLURM needs a device file: a copy of /dev/null
            os.mknod(self.folder / "dev" / f"gpu{gpu}", 0o20666, os.makedev(1, 3))
        machine = Path("/etc/nsswitch.conf")
        record = {"number": network.number, "size": dataclasses.asdict(size), "started": time.time()}
        files = {
            "hosts": conf.hosts(size, network),
            "nsswitch.conf": conf.nsswitch(machine.read_text() if machine.exists() else ""),
            "slurm.conf": conf.slurm_conf(self.folder, size, network),
            "gres.conf": conf.gres_conf(self.folder, size),
            "slurmdbd.conf": conf.slurmdbd_conf(self.folder, network) if size.accounting else "",
            "cluster.json": json.dumps(record),
        }
        for name, text in files.items():
            (self.folder / name).write_text(text)
        (self.folder / "slurmdbd.conf").chmod(0o600)  # slurmdbd refuses a file that others can read

    # ---- status

    def _idle(self) -> int:
        try:
            names = run("sinfo", "-h", "-N", "-t", "idle", "-o", "%N", within_s=5, env=self.daemons.environment())
        except ClusterError:
            return 0
        return len(set(names.split()))

    def running(self) -> bool:
        """Tell whether the cluster runs or is starting.

        munged decides: a test may have killed slurmctld on purpose.
        """
        if (self.folder / "run" / "start").exists():
            return self.daemons.find("start") is not None
        return self.daemons.find("munged") is not None

    def status(self) -> tuple[str, bool]:
        """Return a few lines to print, and whether the controller answers."""
        network, size = self.load()
        names = ["munged", "slurmctld", *(["mariadbd", "slurmdbd"] if size.accounting else [])]
        daemons = [name if self.daemons.find(name) else f"{name} (dead)" for name in names]
        up = self.services.answers()
        states, queue = "unknown: the controller does not answer", "unknown"
        if up:
            env = self.daemons.environment()
            rows = [row.split() for row in run("sinfo", "-h", "-N", "-p", "batch", "-o", "%N %T", env=env).splitlines()]
            off = {name for name in size.node_names if not Node(name, self.folder, network).process}
            states = ", ".join(f"{name} {state}{' (powered off)' if name in off else ''}" for name, state in rows)
            jobs = run("squeue", "-h", "-o", "%T", env=env).split()
            queue = ", ".join(f"{jobs.count(state)} {state.lower()}" for state in sorted(set(jobs))) or "empty"
        lines = [
            f"cluster   {self.folder} ({network.bridge}, {network.head}/24)",
            f"daemons   {', '.join(daemons)}",
            f"nodes     {states}",
            f"queue     {queue}",
            f"logs      {self.folder}/log",
            f"clients   export SLURM_CONF={self.slurm_conf}",
        ]
        return "\n".join(lines), up

    # ---- stop

    def stop(self) -> bool:
        """End every process, remove the network and the directory. Return False if there was no cluster."""
        try:
            network: Network | None = self.load()[0]
        except ClusterError:
            network = next((Network(number) for number, folder in bridges() if folder == str(self.folder)), None)
        if network is None and not (self.folder / "run" / "start").exists():
            return False
        for _ in range(20):  # repeated, for a process that starts at the same time
            self.daemons.kill_all()
            if not self.daemons.marked():
                break
        if network is not None:
            for link in Path("/sys/class/net").iterdir():
                if link.name.startswith(f"{network.bridge}n") or link.name == network.bridge:
                    with contextlib.suppress(ClusterError):  # the kernel has removed it with its node
                        run("ip", "link", "delete", link.name)
        for _ in range(3):
            shutil.rmtree(self.folder, ignore_errors=True)
        return True

    def watch(self, owner: int) -> None:
        """Wait until process `owner` ends, then stop the cluster; return if the cluster is stopped before."""
        try:
            handle = os.pidfd_open(owner)
        except OSError:
            handle = -1
        while handle >= 0 and not select.select([handle], [], [], 1.0)[0]:
            if not (self.folder / "run").is_dir():
                return
        self.stop()


def bridges() -> list[tuple[int, str]]:
    """Return (number, directory) of every cluster's bridge on this machine; the directory may be empty text."""
    clusters = []
    for path in Path("/sys/class/net").glob("pdc*"):
        if path.name.removeprefix("pdc").isdigit():
            with contextlib.suppress(OSError):  # stopped in the meantime
                clusters.append((int(path.name.removeprefix("pdc")), (path / "ifalias").read_text().strip()))
    return sorted(clusters)


def stop_stale() -> list[str]:
    """Remove crashed clusters, not running ones. Return the directories that were removed."""
    removed = []
    for number, folder in bridges():
        if not folder:
            time.sleep(1)  # it may be starting
            if (number, "") in bridges():
                run("ip", "link", "delete", Network(number).bridge)
            continue
        cluster = Cluster(Path(folder))
        if not cluster.running():
            cluster.stop()
            removed.append(folder)
    return removed

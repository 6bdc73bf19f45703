"""The services of a private cluster: munge, the database with slurmdbd, and the controller slurmctld.

Their sockets, ports, keys and files are in the cluster's own directory or subnet, apart from those of the machine.
"""

from __future__ import annotations

import os
import socket
from pathlib import Path

from conf import HEAD, Network
from processes import ClusterError, Daemons, run, wait


class Services:
    """The services of the cluster in `folder`; each needs the ones before it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.daemons = Daemons(folder)

    def start_munge(self) -> None:
        """Start munged, with a new key for this cluster."""
        folder = self.folder / "munge"
        key = folder / "key"
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(128))
        self.daemons.spawn(
            "munged",
            *("munged", "--foreground", f"--key-file={key}", f"--socket={folder}/socket", f"--pid-file={folder}/pid"),
            *(f"--seed-file={folder}/seed", f"--log-file={self.folder}/log/munged.log", "--num-threads=2"),
        )
        wait((folder / "socket").exists, 10, "munged did not start", self.folder / "log/munged.out")

    def start_accounting(self, network: Network) -> None:
        """Start mariadbd, which listens on a unix socket only, and slurmdbd."""
        folder = self.folder / "database"
        (folder / "tmp").mkdir(parents=True)
        # A separate --tmpdir: servers that share /tmp delete each other's temporary tables.
        common = ["--no-defaults", f"--datadir={folder}/data", f"--tmpdir={folder}/tmp", "--user=root"]
        common += ["--innodb-log-file-size=8M"]
        run(
            *("mariadb-install-db", *common, "--auth-root-authentication-method=normal", "--skip-test-db"),
            env=self.daemons.environment(),
        )
        # Small and without durability: the database is deleted with the cluster.
        self.daemons.spawn(
            "mariadbd",
            *("mariadbd", *common, "--skip-networking", f"--socket={folder}/socket", f"--pid-file={folder}/pid"),
            *("--innodb-buffer-pool-size=32M", "--innodb-flush-log-at-trx-commit=0", "--innodb-doublewrite=0"),
            *("--innodb-lock-wait-timeout=900", "--skip-log-bin", "--performance-schema=off", "--key-buffer-size=1M"),
            *("--aria-pagecache-buffer-size=8M", "--skip-name-resolve", "--max-connections=30"),
        )
        client = ["mariadb", "--no-defaults", "-S", str(folder / "socket"), "-uroot", "-e"]

        def database_exists() -> bool:
            try:
                run(*client, "create database if not exists slurm_acct", within_s=5)
            except ClusterError:
                return False
            return True

        wait(database_exists, 20, "mariadbd did not start", self.folder / "log/mariadbd.out")
        self._spawn_on_head("slurmdbd", MYSQL_UNIX_PORT=str(folder / "socket"))

        def listens() -> bool:
            try:
                socket.create_connection((network.head, network.accounting_port), 1).close()
            except OSError:
                return False
            return True

        wait(listens, 20, "slurmdbd did not start", self.folder / "log/slurmdbd.log")

    def _spawn_on_head(self, program: str, **extra: str) -> None:
        # The host name in slurm.conf must be that of the daemon: a constant one, in a separate namespace.
        script = f"hostname {HEAD}; mount --bind {self.folder}/hosts /etc/hosts; exec {program} -D"
        self.daemons.spawn(program, "unshare", "--uts", "--mount", "bash", "-c", script, **extra)

    def start_controller(self) -> None:
        """Start slurmctld from its saved state; running jobs are not affected."""
        if self.daemons.find("slurmctld"):
            raise ClusterError("the controller runs already")
        self._spawn_on_head("slurmctld")
        wait(self.answers, 15, "slurmctld did not start", self.folder / "log/slurmctld.log")

    def kill_controller(self) -> None:
        """SIGKILL slurmctld: commands fail and nothing is scheduled; running jobs are not affected.

        slurmctld saves its state every 5 s: after a restart it does not know of later changes.
        """
        process = self.daemons.find("slurmctld")
        if process is None:
            raise ClusterError("the controller does not run")
        process.kill()

    def answers(self) -> bool:
        """Tell whether the controller answers."""
        try:
            return " UP" in run("scontrol", "ping", within_s=3, env=self.daemons.environment())
        except ClusterError:
            return False

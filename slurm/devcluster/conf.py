"""The text of every configuration file of a private cluster, as pure functions of its size and directory.

This module writes no file and starts no process. Comments explain values that differ from a production cluster.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

HEAD = "slurmhead"  # the controller's host name in its own namespace, the same for every cluster
SUBNETS = range(1, 251)  # 10.213.<number>.0/24, one per cluster on this machine


@dataclass(frozen=True)
class Size:
    """The resources that a cluster claims to have: SLURM schedules by them, the kernel enforces none of them."""

    nodes: int = 3
    cpus: int = 4
    memory_mb: int = 8000
    gpus: int = 0
    accounting: bool = True
    settings: dict[str, str] = field(default_factory=dict)  # lines of slurm.conf to replace or add

    @property
    def node_names(self) -> list[str]:
        """Return node1, node2, ..."""
        return [f"node{i}" for i in range(1, self.nodes + 1)]

    @property
    def node_list(self) -> str:
        """Return the nodes in SLURM's notation, node[1-3]."""
        return f"node[1-{self.nodes}]"


@dataclass(frozen=True)
class Network:
    """The private subnet of one cluster: a bridge on this machine, one address per node."""

    number: int

    @property
    def bridge(self) -> str:
        """Return the bridge's name; creating the bridge reserves `number`."""
        return f"pdc{self.number}"

    @property
    def head(self) -> str:
        """Return the controller's address, which is that of the bridge."""
        return f"10.213.{self.number}.1"

    @property
    def accounting_port(self) -> int:
        """Return slurmdbd's port: it listens on every address of the machine, so each cluster needs its own."""
        return 6900 + self.number

    def address(self, node: str) -> str:
        """Return the address of `node`, for example 10.213.1.12 of node2."""
        return f"10.213.{self.number}.{10 + int(node.removeprefix('node'))}"

    def link(self, node: str) -> str:
        """Return the name of this machine's end of the node's network cable."""
        return f"{self.bridge}n{node.removeprefix('node')}"


def hosts(size: Size, network: Network) -> str:
    """Return the /etc/hosts of the controller and of every node."""
    lines = ["127.0.0.1 localhost", f"{network.head} {HEAD}"]
    return "\n".join(lines + [f"{network.address(name)} {name}" for name in size.node_names]) + "\n"


def nsswitch(machine: str) -> str:
    """Return nsswitch.conf for the nodes: `machine`'s text, with host names from files only.

    A node reaches no name server: each reverse look-up of torch's TCPStore would wait many seconds for an answer.
    """
    kept = [line for line in machine.splitlines() if not line.startswith("hosts:")]
    return "\n".join([*kept, "hosts: files"]) + "\n"


def gres_conf(folder: Path, size: Size) -> str:
    """Return gres.conf: simulated GPUs, which SLURM counts and lists in CUDA_VISIBLE_DEVICES."""
    if not size.gpus:
        return ""
    return f"NodeName={size.node_list} AutoDetect=off Name=gpu File={folder}/dev/gpu[0-{size.gpus - 1}]\n"


def slurm_conf(folder: Path, size: Size, network: Network) -> str:
    """Return slurm.conf."""
    settings = _settings(folder, network)
    if size.accounting:
        settings |= {
            "AccountingStorageType": "accounting_storage/slurmdbd",
            "AccountingStorageHost": network.head,
            "AccountingStoragePort": str(network.accounting_port),
            "AccountingStoragePass": f"{folder}/munge/socket",
        }
    if size.gpus:
        settings["GresTypes"] = "gpu"
        if size.accounting:
            settings["AccountingStorageTRES"] = "gres/gpu"
    lines = [f"{key}={value}" for key, value in (settings | size.settings).items() if value]
    return "\n".join([*lines, *_nodes(size, network), *_partitions(size)]) + "\n"


def _nodes(size: Size, network: Network) -> list[str]:
    gres = f" Gres=gpu:{size.gpus}" if size.gpus else ""
    default = f"NodeName=DEFAULT CPUs={size.cpus} RealMemory={size.memory_mb}{gres} State=UNKNOWN"
    return [default, *(f"NodeName={name} NodeAddr={network.address(name)}" for name in size.node_names)]


def _partitions(size: Size) -> list[str]:
    # Without DefMemPerCPU a job gets a whole node's memory. A job in `high` preempts the others: in `low` after a
    # grace time of 10 s, in `low0` at once.
    return [
        f"PartitionName=DEFAULT Nodes={size.node_list} State=UP DefaultTime=60 MaxTime=UNLIMITED DefMemPerCPU=100",
        "PartitionName=batch Default=YES PriorityTier=10",
        "PartitionName=low PriorityTier=1 GraceTime=10",
        "PartitionName=low0 PriorityTier=1 GraceTime=0",
        "PartitionName=high PriorityTier=100 PreemptMode=OFF",
    ]


def _settings(folder: Path, network: Network) -> dict[str, str]:
    return {
        "ClusterName": "devcluster",
        "SlurmctldHost": f"{HEAD}({network.head})",
        # The controller listens on its bridge only, so that several clusters can use the same port.
        "CommunicationParameters": "NoCtldInAddrAny",
        "SlurmctldPort": "6817",
        "SlurmdPort": "6818",
        "SlurmUser": "root",
        "SlurmdUser": "root",
        "AuthType": "auth/munge",
        "CredType": "cred/munge",
        # A requeued job waits until its old credential has expired: 5 s is SLURM's minimum, 120 s its default.
        "AuthInfo": f"socket={folder}/munge/socket,cred_expire=5",
        # Time from SIGTERM to SIGKILL. Well below cred_expire, so that a requeued job does not meet its own old step.
        "KillWait": "2",
        "StateSaveLocation": f"{folder}/controller",
        "SlurmdSpoolDir": f"{folder}/spool/%n",
        "SlurmctldPidFile": f"{folder}/run/slurmctld.self",
        "SlurmdPidFile": f"{folder}/run/slurmd-%n.self",
        "SlurmctldLogFile": f"{folder}/log/slurmctld.log",
        "SlurmdLogFile": f"{folder}/log/slurmd-%n.log",
        "SlurmctldDebug": "verbose",
        "SlurmdDebug": "verbose",
        # No cgroups: most containers do not offer them. Memory is scheduled, not enforced.
        "ProctrackType": "proctrack/linuxproc",
        "TaskPlugin": "task/none",
        "JobAcctGatherType": "jobacct_gather/none",
        "MpiDefault": "none",
        "MailProg": "/bin/true",
        "PropagateResourceLimits": "NONE",
        # Nodes may claim more cores and memory than the machine has.
        "SlurmdParameters": "config_overrides",
        # A crashed node returns by itself; a node that an administrator set down stays down.
        "ReturnToService": "1",
        # A dead node is detected after 9 to 16 s (on production clusters: minutes).
        "SlurmdTimeout": "5",
        "SlurmctldTimeout": "10",
        "TCPTimeout": "1",
        "MessageTimeout": "5",
        "MinJobAge": "3600",  # `scontrol show job` still knows finished jobs
        "JobRequeue": "1",
        "SelectType": "select/cons_tres",
        "SelectTypeParameters": "CR_Core_Memory",
        "SchedulerType": "sched/backfill",
        # Jobs start within a second of their submission or of their parent's end.
        "SchedulerParameters": "batch_sched_delay=0,sched_interval=2,sched_min_interval=0,bf_interval=2",
        "PreemptType": "preempt/partition_prio",
        "PreemptMode": "REQUEUE",
        "AccountingStorageType": "accounting_storage/none",
    }


def slurmdbd_conf(folder: Path, network: Network) -> str:
    """Return slurmdbd.conf, without the database's socket: libmariadb reads that from MYSQL_UNIX_PORT."""
    settings = {
        "AuthType": "auth/munge",
        "AuthInfo": f"socket={folder}/munge/socket",
        "DbdHost": HEAD,
        "DbdAddr": network.head,
        "DbdPort": str(network.accounting_port),
        "SlurmUser": "root",
        "LogFile": f"{folder}/log/slurmdbd.log",
        "PidFile": f"{folder}/run/slurmdbd.self",
        "DebugLevel": "info",
        "StorageType": "accounting_storage/mysql",
        "StorageHost": "localhost",
        "StorageUser": "root",
        "StorageLoc": "slurm_acct",
    }
    return "".join(f"{key}={value}\n" for key, value in settings.items())

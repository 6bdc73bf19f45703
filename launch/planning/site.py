"""Where the jobs of a request go: to SLURM or to this machine, with which profile and how many GPUs a node."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from launch.planning import profile
from launch.planning.arguments import Request
from launch.planning.profile import Profile
from launch.state import slurm_client as slurm
from pneumo_dist.config import ConfigError


@dataclass(frozen=True, kw_only=True)
class Site:
    """The chosen place."""

    slurm: bool
    profile: Profile
    profile_path: Path | None
    gpus_per_node: int
    line: str  # what to tell the user: why this machine, or that it is SLURM

    def ranks(self, nodes: int) -> int:
        """Return the ranks of a training job on `nodes` nodes: one a GPU, or one a node without GPUs."""
        return nodes * max(1, self.gpus_per_node)


def choose_site(request: Request) -> Site:
    """Choose between SLURM and this machine.

    Raises:
        ConfigError: SLURM was asked for and is not there, or the profile is wrong.
    """
    path = profile.find(request.profile)
    chosen = profile.load(path)
    reason = "asked for" if request.cluster == "local" else slurm.why_not()
    if not request.dry_run and reason:
        if request.cluster == "slurm":
            raise ConfigError(f"--cluster slurm: {reason}")
        if request.after:
            raise ConfigError(f"--after waits for a SLURM job, and jobs would run on this machine: {reason}")
    gpus = chosen.gpus_per_node if request.gpus_per_node is None else request.gpus_per_node
    if gpus is None:
        facts = None if reason else slurm.partition(chosen.partition)
        gpus = 1 if facts and facts.gpus else 0
    line = f"running on this machine ({reason})" if reason else "submitting to SLURM"
    return Site(slurm=not reason, profile=chosen, profile_path=path, gpus_per_node=gpus, line=line)

"""Where the jobs of a request run: on SLURM or on this machine, with which profile and how many GPUs per node."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from pathlib import Path

from launch.planning.arguments import Request
from launch.planning.profile import Profile, find_profile, load_profile
from launch.state import environment, slurm_client
from pneumo_dist.config import ConfigError


@dataclass(frozen=True, kw_only=True)
class Site:
    """SLURM or this machine, and its settings."""

    slurm: bool
    profile: Profile
    profile_path: Path | None
    gpus_per_node: int
    line: str  # message for the user: SLURM, or why this machine
    _partitions: dict[str | None, slurm_client.Partition | None] = field(default_factory=dict, init=False, repr=False)

    def ranks(self, nodes: int) -> int:
        """Return the ranks of a training job on `nodes` nodes: one per GPU, or one per node without GPUs."""
        return nodes * max(1, self.gpus_per_node)

    @property
    def environment_note(self) -> str:
        """The variables of the shell that will not reach the jobs although the user may expect it, as a note; or ""."""
        shell_lines = "\n".join([*self.profile.setup, self.profile.python or ""]) if self.slurm else ""
        names = environment.left_out(local=not self.slurm)
        names |= set(re.findall(r"\$(?!SLURM_)(\w+)", shell_lines)) & os.environ.keys() - environment.passed().keys()
        names -= self.profile.env.keys()
        if not names:
            return ""
        return (
            f"note: of this shell, {', '.join(sorted(names))} will not reach the jobs: "
            "set what they need in the profile (env, sbatch, setup)"
        )

    def partition(self, stage: str) -> slurm_client.Partition | None:
        """Return the partition that runs `stage`; None on this machine, or if SLURM does not answer.

        Each partition is queried once: a chain has many jobs and sinfo may take seconds.
        """
        name = self.profile.resources(stage).partition
        if self.slurm and name not in self._partitions:
            self._partitions[name] = slurm_client.partition(name)
        return self._partitions.get(name)


def choose_site(request: Request) -> Site:
    """Choose between SLURM and this machine.

    Raises:
        ConfigError: SLURM is requested but not available, or the profile is wrong.
    """
    path = find_profile(request.profile)
    profile = load_profile(path)
    reason = "--cluster local" if request.cluster == "local" else slurm_client.unavailable_reason()
    if not request.dry_run and reason:
        if request.cluster == "slurm":
            raise ConfigError(f"--cluster slurm: {reason}")
        if request.after:
            raise ConfigError(f"--after waits for a SLURM job, but the jobs would run on this machine: {reason}")
    gpus = profile.gpus_per_node if request.gpus_per_node is None else request.gpus_per_node
    if gpus is None:
        partition = None if reason else slurm_client.partition(profile.partition)
        gpus = 1 if partition and partition.gpus else 0
    line = f"running on this machine ({reason})" if reason else "submitting to SLURM"
    return Site(slurm=not reason, profile=profile, profile_path=path, gpus_per_node=gpus, line=line)

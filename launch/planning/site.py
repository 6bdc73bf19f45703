"""Where the jobs of a request run: on SLURM or on this machine, with which profile and how many GPUs per node."""

from __future__ import annotations

import os
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launch.planning.arguments import Request
from launch.planning.profile import FAMILY, ONE_CLUSTER, Profile, find_profile, load_profile
from launch.state import environment, slurm_client
from launch.state.ledger import Ledger
from pneumo_dist.chain import STAGES
from pneumo_dist.config import ConfigError
from pneumo_dist.run import RunFolder


@dataclass(frozen=True, kw_only=True)
class Site:
    """SLURM or this machine, and its settings."""

    slurm: bool
    profile: Profile
    profile_path: Path | None
    nodes: int
    gpus_per_node: int
    line: str  # message for the user: SLURM, or why this machine
    typed: dict[str, Any]  # profile, nodes and GPUs as far as this command or an earlier one names them
    _partitions: dict[str | None, slurm_client.Partition | None] = field(default_factory=dict, init=False, repr=False)

    @property
    def ranks(self) -> int:
        """The ranks of a training job: one per GPU, or one per node without GPUs."""
        return self.nodes * max(1, self.gpus_per_node)

    @property
    def array_tasks(self) -> int:
        """The tasks of an array: one per node, on this machine one per process."""
        return self.nodes if self.slurm else self.ranks

    @property
    def environment_note(self) -> str:
        """The variables of the shell that will not reach the jobs although the user may expect it, as a note; or ""."""
        shell_lines = "\n".join([*self.profile.setup, self.profile.python or ""]) if self.slurm else ""
        names = environment.left_out(local=not self.slurm)
        names |= set(re.findall(r"\$(?!SLURM_)(\w+)", shell_lines)) & os.environ.keys() - environment.passed().keys()
        clusters = names & {"SLURM_CLUSTERS", "SBATCH_CLUSTERS"}
        names -= self.profile.env.keys() | clusters
        notes = []
        if names:
            notes.append(
                f"of this shell, {', '.join(sorted(names))} will not reach the jobs: "
                "set what they need in the profile (env, sbatch, setup)"
            )
        if clusters:
            notes.append(f"{', '.join(sorted(clusters))} is ignored: {ONE_CLUSTER}")
        return f"note: {'; '.join(notes)}" if notes else ""

    def partition(self, stage: str) -> slurm_client.Partition | None:
        """Return the partition that runs `stage`; None on this machine, or if SLURM does not answer.

        Each partition is queried once: a chain has many jobs and sinfo may take seconds.
        """
        name = self.profile.resources(stage).partition
        if self.slurm and name not in self._partitions:
            self._partitions[name] = slurm_client.partition(name)
        return self._partitions.get(name)


def choose_site(request: Request, run: RunFolder) -> Site:
    """Choose between SLURM and this machine; profile, nodes and GPUs are by default those last typed for such jobs.

    A typed profile comes before earlier GPUs, and another one before earlier nodes too.

    Raises:
        ConfigError: SLURM is requested but not available, or the profile is wrong.
    """
    reason = "--cluster local" if request.cluster == "local" else slurm_client.unavailable_reason()
    if not request.dry_run and reason:
        if request.cluster == "slurm":
            raise ConfigError(f"--cluster slurm: {reason}")
        if request.after:
            raise ConfigError(f"--after waits for a SLURM job, but the jobs would run on this machine: {reason}")
    last = _last_submission(request, run, slurm=not reason)
    if not request.profile and not Path(last.get("profile", "/")).exists():
        print(f"note: the profile of the last submission is gone: {last.pop('profile')}", file=sys.stderr)
    path = find_profile(request.profile or last.get("profile"))
    profile = load_profile(path)
    typed: dict[str, Any] = {"profile": str(path)} if request.profile else {}
    if typed and typed["profile"] != last.get("profile"):
        last = {}  # the nodes and GPUs of another profile
    elif typed and profile.gpus_per_node is not None:
        last.pop("gpus_per_node", None)
    given = {"nodes": request.nodes, "gpus_per_node": request.gpus_per_node}
    typed |= {key: value for key, value in given.items() if value is not None}
    kept = " ".join(f"--{key.replace('_', '-')} {last[key]}" for key in last if key not in typed)
    typed = last | typed
    gpus = typed.get("gpus_per_node", profile.gpus_per_node)
    if gpus is None:
        partition = None if reason else slurm_client.partition(profile.partition)
        gpus = 1 if partition and partition.gpus else 0
    line = f"running on this machine ({reason})" if reason else "submitting to SLURM"
    line += f" (as in the last submission: {kept})" if kept else ""
    return Site(
        slurm=not reason,
        profile=profile,
        profile_path=path,
        nodes=typed.get("nodes", 1),
        gpus_per_node=gpus,
        line=line,
        typed=typed,
    )


def _last_submission(request: Request, run: RunFolder, slurm: bool) -> dict[str, Any]:
    """Return what was typed of profile, nodes and GPUs by the run's last submission to SLURM, or to this machine.

    Only jobs of the same shape count: a training does not need the nodes of an array.
    """
    array = request.stage if request.stage in ("preprocess", "infer") else ""
    for entry in reversed(Ledger(run).entries()):
        family = FAMILY.get(entry.stage, entry.stage)
        same = family == array if array else STAGES[family].shape == "ranks"
        if entry.event == "submitted" and same and (entry.cluster == "slurm") == slurm:
            return dict(entry.extra.get("typed", {}))
    return {}

"""The shape of a SLURM job: its script requests it, and the checks compare it with the nodes of a partition."""

from __future__ import annotations

from dataclasses import dataclass

from launch.planning.profile import CPU_ONLY
from pneumo_dist.chain import STAGES


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The size of one job of a chain."""

    kind: str  # "array", "ranks" or "single"
    nodes: int = 1
    tasks_per_node: int = 1
    gpus_per_node: int = 0
    array_tasks: int = 1  # 1 for "ranks" and "single"

    def __str__(self) -> str:
        if self.array_tasks > 1:
            return f"array of {self.array_tasks} tasks"
        return f"{self.nodes} nodes x {self.tasks_per_node} ranks" if self.kind == "ranks" else "one process"


def shape_of(stage: str, nodes: int, gpus_per_node: int) -> Shape:
    """Return the shape of a stage's job: N nodes of G ranks, an array of N tasks, or one process."""
    kind = STAGES[stage].shape
    gpus = 0 if stage in CPU_ONLY else gpus_per_node
    if kind == "ranks":
        return Shape(kind=kind, nodes=nodes, tasks_per_node=max(1, gpus), gpus_per_node=gpus)
    if kind == "array":
        return Shape(kind=kind, gpus_per_node=min(1, gpus), array_tasks=nodes)
    return Shape(kind=kind, gpus_per_node=min(1, gpus))

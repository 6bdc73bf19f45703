"""The shape of a SLURM job: what its script asks for, and what the checks hold against a partition's nodes."""

from __future__ import annotations

from dataclasses import dataclass

from launch.planning.profile import CPU_ONLY
from pneumo_dist.chain import STAGES


@dataclass(frozen=True, kw_only=True)
class Shape:
    """How large one job of a chain is."""

    kind: str  # "array", "ranks" or "single"
    nodes: int = 1
    tasks_per_node: int = 1
    gpus_per_node: int = 0
    elements: int = 1  # of an array

    def __str__(self) -> str:
        if self.elements > 1:
            return f"array of {self.elements}"
        return f"{self.nodes} nodes x {self.tasks_per_node} ranks" if self.kind == "ranks" else "one process"


def shape_of(stage: str, nodes: int, gpus_per_node: int) -> Shape:
    """Return the shape of a stage's job: N nodes of G ranks, an array of N elements, or one process."""
    kind = STAGES[stage].shape
    gpus = 0 if stage in CPU_ONLY else gpus_per_node
    if kind == "ranks":
        return Shape(kind=kind, nodes=nodes, tasks_per_node=max(1, gpus), gpus_per_node=gpus)
    if kind == "array":
        return Shape(kind=kind, gpus_per_node=min(1, gpus), elements=nodes)
    return Shape(kind=kind, gpus_per_node=min(1, gpus))

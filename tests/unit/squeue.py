"""What squeue prints, from short rows."""

from __future__ import annotations

from launch.state.slurm_client import COLUMNS


def squeue(*rows: str) -> str:
    """Return squeue's lines for rows of job|name|state|reason|nodes[|restarts[|wait status]]."""
    lines = []
    for row in rows:
        cells = [*row.split("|"), "0", "0"][: len(COLUMNS)]
        lines.append("".join(cell.ljust(width) for cell, width in zip(cells, COLUMNS.values(), strict=True)))
    return "\n".join(lines)

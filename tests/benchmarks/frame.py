"""What the benchmarks share: turns that alternate, medians and ratios over them, tables with machine and versions.

No torch in here: the start-up benchmark must not pay for it.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import importlib.metadata
import json
import os
import platform
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

Values = dict[str, list[float]]
PACKAGES = (
    "torch", "numpy", "segmentation-models-pytorch", "lightning", "monai", "nnunetv2", "mosaicml-streaming", "webdataset",
)  # fmt: skip
LOAD_BEFORE = os.getloadavg()[0]  # above 0 others use the machine, and clock figures are worth little


@dataclass
class Table:
    """One table of a report; cells are texts or numbers."""

    title: str
    columns: list[str]
    rows: list[list[Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def markdown(self) -> str:
        """Return the table as people read it, in a terminal or in RESULTS.md."""
        cells = [self.columns, *([shown(cell) for cell in row] for row in self.rows)]
        widths = [max(len(row[i]) for row in cells) for i in range(len(self.columns))]
        lines = ["| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |" for row in cells]
        lines.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
        return "\n".join([f"### {self.title}", "", *lines, "", *(f"* {note}" for note in self.notes)])


def shown(value: Any) -> str:
    """Return a cell as text: four significant digits are more than any clock here is good for."""
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return "" if value is None else str(value)


def in_turns(contestants: Mapping[str, Callable[[], float]], rounds: int) -> Values:
    """Call every contestant once a round, every second round in the opposite order; return what each call gave."""
    values: Values = {name: [] for name in contestants}
    for turn in range(rounds):
        for name in list(contestants)[:: -1 if turn % 2 else 1]:
            values[name].append(contestants[name]())
    return values


def ratio(above: Sequence[float], below: Sequence[float]) -> float:
    """Return the median of the ratios of the turns: what disturbs a whole round cancels out."""
    return statistics.median(a / b for a, b in zip(above, below, strict=True))


def speed_table(title: str, unit: str, values: Values, base: str, ratio_name: str, invert: bool = False) -> Table:
    """Return a table of medians, spreads and the ratio of `base` to each (`invert`: of each to `base`)."""
    table = Table(title, ["", f"{unit} (median)", "lowest", "highest", ratio_name])
    for name, found in values.items():
        pair = (found, values[base]) if invert else (values[base], found)
        table.rows.append([name, statistics.median(found), min(found), max(found), ratio(*pair)])
    return table


def peak_memory_mb() -> float:
    """Return the most memory this process has held at once (its own pages and those of files it has read)."""
    return _status_mb("VmHWM")  # not ru_maxrss, which a process inherits from the one that started it


def settled_memory_mb() -> float:
    """Return the memory that this process holds once it has given back what it can; peaks count from here."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # see proc(5): resets VmHWM
    return _status_mb("VmRSS")


def anonymous_memory_mb() -> float:
    """Return the memory that this process holds beside files."""
    return _status_mb("RssAnon")


def _status_mb(key: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(key + ":")).split()[1]) / 1024


def cores() -> int:
    """Return the processors that this process may use."""
    return len(os.sched_getaffinity(0))


def machine() -> dict[str, str]:
    """Return processor, cores, kernel and load; the GPU is added by those who use one."""
    model = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.split(":", 1)[1].strip()
            break
    gigabytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    found = {"processor": model, "cores": str(cores()), "memory": f"{gigabytes:.0f} GiB", "system": platform.platform()}
    return found | {"load before": f"{LOAD_BEFORE:.2f}"}


def versions() -> dict[str, str]:
    """Return the versions of Python, torch and the peers that are installed here."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def arguments(doc: str | None) -> argparse.ArgumentParser:
    """Return a parser with what every benchmark understands."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the tables there as well")
    parser.add_argument("--rounds", type=int, default=7, help="turns of every contestant")
    return parser


def report(tables: Sequence[Table], options: argparse.Namespace, about: Mapping[str, str] | None = None) -> int:
    """Print the tables with machine and versions; write them as JSON where that was asked for."""
    where = machine() | dict(about or {})
    print("\n" + ", ".join(f"{key} {value}" for key, value in (where | versions()).items()))
    for table in tables:
        print("\n" + table.markdown())
    sys.stdout.flush()
    if options.json:
        found = {"machine": where, "versions": versions(), "tables": [asdict(table) for table in tables]}
        options.json.write_text(json.dumps(found, indent=2) + "\n")
    return 0

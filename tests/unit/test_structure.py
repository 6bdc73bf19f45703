"""The architecture holds, file by file: imports go one way, no circle, small folders, torch out of what starts quickly."""

import ast
import subprocess
import sys
from collections import Counter
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for folder in ("launch", "pneumo_dist")
    for path in sorted((ROOT / folder).rglob("*.py"))
}
# A file may import from its own room and from the rows below; rooms of one row do not know each other.
ROWS = [
    ("launch",),  # the commands
    ("launch.backends", "launch.jobs"),
    ("launch.monitor",),
    ("launch.planning",),
    ("launch.state",),
    ("launch.bootstrap",),
    ("pneumo_dist.stages", "pneumo_dist.done", "pneumo_dist.chain"),
    ("pneumo_dist.inference", "pneumo_dist.training", "pneumo_dist.evaluation"),
    ("pneumo_dist.prediction", "pneumo_dist.reports"),
    ("pneumo_dist.scoring",),
    ("pneumo_dist.data", "pneumo_dist.model"),
    ("pneumo_dist.runtime",),
    ("pneumo_dist.run",),
    ("pneumo_dist.config",),
]
ONE_ROOM = {"launch.jobs": "launch.backends", "pneumo_dist.done": "pneumo_dist.stages", "pneumo_dist.chain": "pneumo_dist.stages"}  # fmt: skip
MOST_FILES = 12


def _room(module: str) -> tuple[int, str]:
    """Return row and room of a module: the longest name that fits."""
    fits = [(len(room), row, room) for row, rooms in enumerate(ROWS) for room in rooms if f"{module}.".startswith(f"{room}.")]  # fmt: skip
    _, row, room = max(fits)
    return row, ONE_ROOM.get(room, room)


def _imports(module: str) -> set[str]:
    """Return the modules of the product that a file imports anywhere, in functions and for types as well."""
    found = set()
    for node in ast.walk(ast.parse(FILES[module].read_text())):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{module}:{node.lineno}: relative import"
            names = {f"{node.module}.{name.name}" for name in node.names}
            found |= {name if name in FILES else str(node.module) for name in names}
    return found


GRAPH = {module: _imports(module) & FILES.keys() for module in FILES}
# The package's own file names `load_model` and `predict` lazily, for Python users.
GRAPH["pneumo_dist"] = set()


def test_imports_go_one_way_file_by_file():
    wrong = []
    for module, imported in GRAPH.items():
        if module == "pneumo_dist":
            continue
        row, room = _room(module)
        for name in imported - {"launch", "pneumo_dist"}:
            to, other = _room(name)
            if to < row or (to == row and other != room):
                wrong.append(f"{module} imports {name}")
    assert not wrong, "\n".join(sorted(wrong))


def test_no_import_circle():
    try:
        TopologicalSorter(GRAPH).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_no_folder_holds_more_than_a_person_can_remember():
    counts = Counter(path.parent.relative_to(ROOT).as_posix() for path in FILES.values())
    assert {folder: n for folder, n in counts.items() if n > MOST_FILES} == {}


def test_torchvision_is_imported_in_one_place():
    users = {module for module, path in FILES.items() if "torchvision" in _top_level_packages(path)}
    assert users == {"pneumo_dist.model.pretrained"}


def test_torch_load_runs_no_code_of_a_file():
    for module, path in FILES.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
                assert "weights_only=True" in map(ast.unparse, node.keywords), f"{module}:{node.lineno}"


def _top_level_packages(path: Path) -> set[str]:
    nodes = list(ast.walk(ast.parse(path.read_text())))
    names = {name.name for node in nodes if isinstance(node, ast.Import) for name in node.names}
    return {name.split(".")[0] for name in names | {str(n.module) for n in nodes if isinstance(n, ast.ImportFrom)}}


@pytest.mark.parametrize("module", ["pneumo_dist", "pneumo_dist.stages", "pneumo_dist.data.cases", "launch.jobs"])
def test_torch_is_not_imported_by(module):
    program = f"import sys, {module}; print([m for m in ('torch', 'cv2', 'albumentations') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_top_level_holds_what_was_agreed():
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    top = {name.split("/")[0] for name in tracked if not name.startswith(".")}
    agreed = {"launch", "pneumo_dist", "slurm", "configs", "tests"}
    assert top <= agreed | {"README.md", "requirements.txt", "pyproject.toml", "LICENSE"}


def test_no_file_needs_more_than_400_lines():
    long = [f"{p.relative_to(ROOT)}: {n}" for p in FILES.values() if (n := len(p.read_text().splitlines())) > 400]
    assert not long, long


def test_no_function_needs_more_than_50_lines():
    long = [
        f"{module}:{node.lineno} {node.name}: {lines} lines"
        for module, path in FILES.items()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef) and (lines := (node.end_lineno or 0) - node.lineno + 1) > 50
    ]
    assert not long, "\n".join(long)

"""The architecture holds: imports go one way, torch stays out of what must start quickly, one place for torchvision."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted([*(ROOT / "launch").glob("*.py"), *(ROOT / "pneumo_dist").rglob("*.py")])

# A room may import from its own row and from those below it.
ROWS = [
    {"launch"},
    {"pneumo_dist.stages", "pneumo_dist.done", "pneumo_dist.chain"},
    {"pneumo_dist.training"},
    {"pneumo_dist.prediction"},
    {"pneumo_dist.scoring"},
    {"pneumo_dist.data", "pneumo_dist.model"},
    {"pneumo_dist.runtime", "pneumo_dist.config"},
]


def _module(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def _row(module: str) -> int | None:
    for i, rooms in enumerate(ROWS):
        if any(module == room or module.startswith(room + ".") for room in rooms):
            return i
    return None


def _imports(path: Path) -> Iterator[tuple[str, int]]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((name.name, node.lineno) for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}:{node.lineno}: relative import"
            yield from ((f"{node.module}.{name.name}", node.lineno) for name in node.names)


def test_imports_go_one_way():
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for path in FILES
        if _module(path) != "pneumo_dist"  # the package's own file names things lazily
        for name, line in _imports(path)
        if (to := _row(name)) is not None and to < (_row(_module(path)) or 0)
    ]
    assert not wrong, "\n".join(wrong)


def test_data_and_model_do_not_know_each_other():
    for path in FILES:
        for name, line in _imports(path):
            here = _module(path)
            for one, other in (("pneumo_dist.data", "pneumo_dist.model"), ("pneumo_dist.model", "pneumo_dist.data")):
                assert not (here.startswith(one) and name.startswith(other)), f"{path}:{line} imports {name}"


def test_torchvision_is_imported_in_one_place():
    users = {_module(path) for path in FILES for name, _ in _imports(path) if name.split(".")[0] == "torchvision"}
    assert users == {"pneumo_dist.model.pretrained"}


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
    long = [f"{p.relative_to(ROOT)}: {n}" for p in FILES if (n := len(p.read_text().splitlines())) > 400]
    assert not long, long

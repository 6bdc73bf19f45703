"""The linters stand in one list: pre-commit and tests/run.sh run the same commands, in the pinned versions."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
REPOS = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
HOOKS = [hook for repo in REPOS for hook in repo["hooks"]]
LINTERS = [".venv/bin/ruff check", ".venv/bin/ruff format --check", ".venv/bin/mypy"]


def _program(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/bash\n{text}\n")
    path.chmod(0o755)


@pytest.fixture
def checkout(tmp_path):
    """Return a checkout with tests/run.sh, whose programs in .venv only note how they are called."""
    for name in (
        "tests/run.sh",
        *(f"launch/locks/{lock}.txt" for lock in ("common", "tests", "torch-cpu", "torch-cuda")),
        "launch/setup_env.sh",
        ".pre-commit-config.yaml",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    for name in ("python", "ruff", "mypy"):
        _program(
            tmp_path / ".venv/bin" / name,
            'call=".venv/bin/${0##*/}${*:+ $*}"; echo "$call" >>calls; [ "$call" != "${FAILS-}" ]',
        )
    _program(tmp_path / "bin/id", "echo 1000")  # root would install packages
    return tmp_path


def _run(checkout: Path, **environment: str) -> tuple[int, list[str]]:
    """Run the whole suite there; return the exit status, and the calls from the first linter on."""
    path = f"{checkout / 'bin'}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "tests/run.sh"], cwd=checkout, env={**os.environ, "PATH": path, **environment}, timeout=60
    )
    calls = (checkout / "calls").read_text().splitlines()
    return done.returncode, calls[calls.index(LINTERS[0]) :]


def test_pre_commit_downloads_nothing_and_uses_pinned_linters():
    pinned = re.findall(r"^(\S+)==", (ROOT / "tests/requirements.txt").read_text(), re.MULTILINE)
    assert {repo["repo"] for repo in REPOS} == {"local"}
    assert [hook["entry"] for hook in HOOKS] == LINTERS
    assert {Path(linter.split()[0]).name for linter in LINTERS} | {"pre-commit"} <= set(pinned)
    assert all(hook["language"] == "system" and not hook["pass_filenames"] for hook in HOOKS)


def test_run_sh_runs_the_hooks_of_pre_commit_before_the_tests(checkout):
    assert _run(checkout) == (0, [*(hook["entry"] for hook in HOOKS), ".venv/bin/python -m pytest"])


def test_run_sh_stops_at_a_linter_that_fails(checkout):
    assert _run(checkout, FAILS=LINTERS[1]) == (1, LINTERS[:2])

"""What the set-up installs is locked with hashes, agrees with the requirements, and has a licence that is accepted."""

import re
import subprocess
from importlib.metadata import distribution, distributions

import pytest

from tests.licences import BUNDLED, LOCKS, accepted, holds_copyleft, licence, locked

ROOT = LOCKS.parents[1]
ENTRY = re.compile(
    r"^([a-z0-9][a-z0-9._-]*)==(\S+)(?: ; [^\\]+)? \\\n((?:    --hash=sha256:[0-9a-f]{64}(?: \\)?\n?)+)", re.M
)


def _name(text):
    return re.sub(r"[-_.]+", "-", text).lower()


def _required(file):
    pins = re.findall(r"^([^\s=]+)==(\S+)$", (ROOT / file).read_text(), re.MULTILINE)
    return {_name(name): version for name, version in pins}


@pytest.mark.parametrize("lock", ["common", "torch-cpu", "torch-cuda", "tests"])
def test_a_lock_holds_only_pinned_packages_with_hashes(lock):
    text = (LOCKS / f"{lock}.txt").read_text().removeprefix("# Made by launch/locks/renew.sh: do not edit.\n")
    assert ENTRY.sub("", text) == "" and ENTRY.search(text)  # no index, no address, no folder of this machine


def test_locks_agree_with_the_requirements():
    wanted = _required("requirements.txt")
    torch = (LOCKS / "torch-cpu.txt").read_text()
    assert wanted.items() <= locked().items() and f"torch=={wanted['torch']}+cpu " in torch
    assert _required("tests/requirements.txt").items() <= locked().items()
    names = [
        entry[0]
        for name in ("common", "torch-cuda", "tests")
        for entry in ENTRY.findall((LOCKS / f"{name}.txt").read_text())
    ]
    assert len(names) == len(set(names))


def test_locks_hold_all_that_their_packages_require():
    """The set-up installs with --no-deps. Only packages installed here tell what they require: those of this build."""
    from packaging.requirements import Requirement

    lacking = {
        f"{package.metadata['Name']} requires {requirement}"
        for package in distributions()
        if _name(package.metadata["Name"]) in locked()
        for requirement in map(Requirement, package.requires or ())
        if (not requirement.marker or requirement.marker.evaluate({"extra": ""}))
        and not requirement.specifier.contains(locked().get(_name(requirement.name), "0"), prereleases=True)
    }
    assert not lacking


def test_no_package_has_a_licence_that_is_not_accepted():
    refused = {name: licence(name) for name in locked() if not accepted(licence(name))}
    assert not refused
    assert {name for name in locked() if name in _installed() and holds_copyleft(distribution(name))} == set(BUNDLED)


def _installed():
    return {_name(package.metadata["Name"]) for package in distributions()}


@pytest.mark.parametrize(
    ("text", "good"),
    [("MIT", True), ("MPL-2.0 AND MIT", True), ("", False), ("GPL-3.0-only", False), ("MIT OR GPL-2.0", False),
     ("GNU Affero General Public License v3", False), ("LGPL-2.1-or-later", False), ("some licence", False)],
)  # fmt: skip
def test_licences(text, good):
    assert accepted(text) == good


@pytest.fixture
def checkout(tmp_path):
    """Return a checkout whose .venv has a pip that fails for the lock named in FAILS and notes the others."""
    (tmp_path / "launch/locks").mkdir(parents=True)
    for file in ("launch/setup_env.sh", *(f"launch/locks/{path.name}" for path in LOCKS.glob("*.txt"))):
        (tmp_path / file).write_text((ROOT / file).read_text())
    python = tmp_path / ".venv/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text(
        '#!/bin/bash\n[[ $2 = *version_info* ]] && exit ${TOO_NEW-0}\n[ "$1" = --version ] && exec echo Python 3.14.0\n'
        '[ "$1" = -c ] && { echo "${BUILD-}"; exit; }\n'
        'echo "$*${PYTHONPATH-}${PIP_TARGET-}${PIP_USER-}" >>calls; [ -z "${FAILS-}" ] || [[ $* != *$FAILS* ]]\n'
    )
    python.chmod(0o755)
    return tmp_path


def _set_up(checkout, **environment):
    (checkout / "calls").write_text("")
    done = subprocess.run(
        ["bash", "launch/setup_env.sh", "tests"],
        cwd=checkout,
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": "/other", "PIP_TARGET": "/other", "PIP_USER": "1", **environment},
        capture_output=True,
        text=True,
    )
    calls = (checkout / "calls").read_text().splitlines()
    assert all("--require-hashes" in call and "--no-deps" in call and "--only-binary :all:" in call for call in calls)
    return done.returncode, [re.search(r"locks/(\S+)\.txt(.*)", call).groups() for call in calls], done.stderr


def test_set_up_installs_each_lock_once_and_says_which_failed(checkout):
    index = " --extra-index-url https://download.pytorch.org/whl/cpu"
    status, calls, error = _set_up(checkout, PNEUMO_TORCH="cpu", FAILS="common")
    assert status == 2 and calls == [("torch-cpu", index), ("common", "")]
    assert "launch/locks/common.txt" in error and len(error.splitlines()) == 1
    assert _set_up(checkout, BUILD="2.13.0+cpu") == (0, [("common", ""), ("tests", "")], "")
    assert _set_up(checkout, BUILD="2.13.0+cpu") == (0, [], "")
    status, calls, _ = _set_up(checkout, BUILD="2.13.0+cpu", PNEUMO_TORCH="cuda")
    assert status == 0 and calls == [("torch-cuda", " --force-reinstall")]
    status, calls, error = _set_up(checkout, PNEUMO_TORCH="rocm")
    assert status == 2 and not calls and "use cpu or cuda" in error
    status, calls, error = _set_up(checkout, TOO_NEW="1")
    assert status == 2 and not calls and ".venv has Python 3.14.0" in error and "remove .venv" in error


def test_gpus_of_a_large_cluster_are_found(tmp_path):
    (tmp_path / "sinfo").write_text('#!/bin/sh\n[ -z "$SINFO_PARTITION" ] && yes gpu:4 | head -n 100000\n')
    (tmp_path / "sinfo").chmod(0o755)
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "SINFO_PARTITION": "none"}
    command = ["bash", "-c", "set -o pipefail; . launch/setup_env.sh; _has_gpus"]
    assert subprocess.run(command, cwd=ROOT, env=environment).returncode == 0

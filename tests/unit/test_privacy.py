"""Who may read, change or steer what: permissions, copies of the code, cells of csv files, terminals, TensorBoard."""

from __future__ import annotations

import dataclasses
import errno
import io
import logging
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import urlopen

import numpy as np
import pytest

from launch.backends.prepare import close_folders
from launch.monitor.display import Display, plain_output
from launch.planning.profile import load_profile
from launch.planning.recipe import ROOT
from launch.runs import main
from launch.state import codecopy
from pneumo_dist.config import ConfigError
from pneumo_dist.data.films.dicom import FilmError, parse_film
from pneumo_dist.data.films.rle import encode_rle
from pneumo_dist.inference.film_plan import PlannedFilm
from pneumo_dist.inference.outputs import csv_text, empty_row, write_predictions
from pneumo_dist.run import RunFolder
from pneumo_dist.runtime import runlog
from pneumo_dist.scoring.submission_csv import as_cell, from_cell, read_rows, score_submission, write_submission
from tests.film_files import film_bytes, grey, streamed_bytes
from tests.unit.test_sbatch import script
from tests.unit.test_slurm_chain import submit, tools
from tests.unit.test_submit import make

__all__ = ["tools"]


@pytest.fixture
def shell() -> Iterator[Callable[[int], int]]:
    """Set the umask as a shell does; restored after the test."""
    before = os.umask(0o022)
    yield os.umask
    os.umask(before)


# ---- permissions


@pytest.mark.parametrize(
    ("of_shell", "text", "mask"),
    [
        (0o022, "", 0o027),
        (0o077, "", 0o077),
        (0o002, "", 0o027),
        (0o022, "umask: '077'", 0o077),
        (0o077, "umask: '022'", 0o022),
        (0o022, "umask: '027'", 0o027),
    ],
)
def test_the_umask_of_the_profile_reaches_the_jobs(
    tmp_path: Path, shell: Callable[[int], int], of_shell: int, text: str, mask: int
) -> None:
    shell(of_shell)
    (tmp_path / "p.yaml").write_text(text)
    profile = load_profile(tmp_path / "p.yaml")
    written = script(tmp_path, profile=dataclasses.replace(profile, setup=["umask 0"]))
    assert profile.file_mask == mask and written.index("\numask 0\n") < written.index(f"\numask {mask:04o}\n")


@pytest.mark.parametrize(("of_shell", "mask"), [("022", "0027"), ("077", "0077"), ("0", "0027")])
def test_plain_scripts_have_the_shells_umask_if_it_is_stricter(of_shell: str, mask: str) -> None:
    program = ["bash", "-c", f"umask {of_shell}; . slurm/env.sh; umask"]
    assert subprocess.run(program, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()[-1] == mask


@pytest.mark.parametrize("value", ["'002'", "77", "0o27", "27", "027", "727", "[1]"])
def test_a_umask_with_which_others_could_write_is_refused(tmp_path: Path, value: str) -> None:
    (tmp_path / "p.yaml").write_text(f"umask: {value}")
    with pytest.raises(ConfigError, match="umask=|umask:|umask must not|put 027 in quotes"):
        load_profile(tmp_path / "p.yaml")


def test_no_other_account_reads_a_run_and_nobody_else_writes_it(
    tools: Path, tmp_path: Path, shell: Callable[[int], int], capfd: pytest.CaptureFixture[str]
) -> None:
    """Also a run that an older version has begun."""
    shell(0)
    for folder in ("a", "a/jobs", "a/code"):
        (tmp_path / folder).mkdir()
    assert submit(tmp_path, "--stage", "preprocess", "--nodes", "2000") == 2, "a refused command changes nothing"
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o777
    assert submit(tmp_path, "--stage", "preprocess") == 0
    assert capfd.readouterr().out.count("is now closed to other accounts (umask 0027)") == 3
    entries = [tmp_path / "a", *(tmp_path / "a").rglob("*")]
    assert len(entries) > 100
    for path in entries:
        assert not path.stat().st_mode & 0o027, path


def test_a_run_of_another_account_keeps_its_permissions(
    tmp_path: Path, shell: Callable[[int], int], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    shell(0o022)
    (tmp_path / "jobs").mkdir()
    (tmp_path / "code").mkdir(mode=0o750)
    tmp_path.chmod(0o750)
    run = make("--stage", "1", f"run_root={tmp_path.parent}", "--run", tmp_path.name, "model.pretrained=none").run
    for number, reason in ((errno.EPERM, "it belongs to another account"), (errno.EROFS, "Read-only file system")):
        failed = OSError(number, os.strerror(number))
        monkeypatch.setattr(Path, "chmod", lambda *_, failed=failed: (_ for _ in ()).throw(failed))
        close_folders(run, 0o027)
        assert capfd.readouterr().out == f"note: the permissions of {tmp_path / 'jobs'} stay as they are: {reason}\n"


# ---- the copy of the code


@pytest.fixture
def copied(tmp_path: Path) -> tuple[Path, RunFolder, Path]:
    """Return a checkout, a run, and the copy of the code in it."""
    root = tmp_path / "checkout"
    for name in ("launch/a.py", "pneumo_dist/b.py", "configs/c.yaml"):
        (root / name).parent.mkdir(parents=True)
        (root / name).write_text(name)
    run = RunFolder(tmp_path / "run")
    return root, run, codecopy.copy(root, run)


def _replaced(path: Path, other: Path) -> None:
    """Move a folder out of the copy and link to it: the content is the same, today."""
    path.rename(other)
    path.symlink_to(other)


CHANGES: dict[str, Callable[[Path, Path], object]] = {
    "launch/a.py": lambda code, _: (code / "launch/a.py").write_text("import os"),
    "torch.py": lambda code, _: (code / "torch.py").write_text("import os"),  # it would be imported for the real one
    "configs/c.yaml": lambda code, _: (code / "configs/c.yaml").unlink(),
    "pneumo_dist": lambda code, out: _replaced(code / "pneumo_dist", out),
    "pneumo_dist/b.py": lambda code, out: _replaced(code / "pneumo_dist/b.py", out),
    "launch/__pycache__": lambda code, out: (out.mkdir(), (code / "launch/__pycache__").symlink_to(out)),
    "": lambda code, out: _replaced(code, out),
    ".a.py": lambda code, out: (out.touch(), (code / ".a.py").symlink_to(out)),
}


@pytest.mark.parametrize("named", CHANGES)
def test_a_copy_of_the_code_that_was_changed_is_not_used_again(
    tmp_path: Path, copied: tuple[Path, RunFolder, Path], named: str
) -> None:
    root, run, code = copied
    CHANGES[named](code, tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match="not as it was copied") as refused:
        codecopy.copy(root, run)
    assert str(code / named) in str(refused.value)


def test_compiled_files_of_a_copy_are_not_used_again(copied: tuple[Path, RunFolder, Path]) -> None:
    root, run, code = copied
    (code / "launch" / "__pycache__").mkdir()
    (code / "launch" / "__pycache__" / "a.cpython-311.pyc").write_bytes(b"anything")
    for hidden in (".nfs0001", ".DS_Store"):
        (code / hidden).touch()
    assert codecopy.copy(root, run) == code and not (code / "launch" / "__pycache__").exists()


def test_a_running_job_or_a_failing_disk_is_no_traceback(
    copied: tuple[Path, RunFolder, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    root, run, code = copied
    (code / "launch" / "__pycache__").mkdir()

    def job_writes(*_: object, **__: object) -> None:
        raise OSError(errno.ENOTEMPTY, "Directory not empty")

    with monkeypatch.context() as busy:
        busy.setattr(os, "rmdir", job_writes)
        assert codecopy.copy(root, run) == code
    (root / "launch" / "a.py").write_text("changed")
    monkeypatch.setattr(codecopy.shutil, "copyfile", job_writes)
    with pytest.raises(ConfigError, match="cannot copy the code: Directory not empty"):
        codecopy.copy(root, run)


# ---- csv


IDS = ["=1+1", "+1", "-1", "@a", "\ta", "\ra", "\uff1da", "'=1", "''-1", "'a", "a=1", "", "1.2.3", "film"]


def test_no_cell_is_a_formula_and_every_id_is_read_back() -> None:
    cells = [as_cell(name) for name in IDS]
    assert not [cell for cell in cells if cell[:1] in ("=", "+", "-", "@", "\t", "\r", "\uff1d")]
    assert [from_cell(cell) for cell in cells] == IDS and len(set(cells)) == len(IDS)
    assert [cell for cell in cells if cell in IDS] == ["'a", "a=1", "", "1.2.3", "film"]  # unchanged
    assert csv_text(["path", "share"], [{"path": "=cmd|'/C calc'!A0", "share": -0.5}]).endswith(
        "\n'=cmd|'/C calc'!A0,-0.5\n"
    )


def test_films_with_the_names_of_formulas_are_scored(tmp_path: Path) -> None:
    mask = np.zeros((40, 30), bool)
    mask[5:9, 3:8] = True
    rows = []
    for name, top in (("=1+1", 0.9), ("-b", 0.1)):
        rows.append(
            empty_row(PlannedFilm(name, f"{name}.dcm", 1, name), "") | {"top_score": top, "rows": 40, "columns": 30}
        )
    rows.append(empty_row(PlannedFilm("@bad", "@bad.dcm", 1, "@bad"), "-cut off"))
    triplet = {"top_score": 0.0, "min_area": 0, "mask_threshold": 0.5}
    write_predictions(tmp_path / "predictions.csv", rows, {"triplet": triplet, "tta": "none", "models": []})
    cells = [row[0] for row in read_rows(tmp_path / "predictions.csv")[1:]]
    assert cells == ["'=1+1", "'-b", "'@bad"] and "'-cut off" in (tmp_path / "predictions.csv").read_text()
    truth = [("=1+1", encode_rle(mask)), ("-b", "-1"), ("@bad", "-1")]
    write_submission(tmp_path / "submission.csv", truth[:2])  # the competition's form has the ids as they are
    write_submission(tmp_path / "truth.csv", truth)
    result = score_submission(tmp_path / "submission.csv", tmp_path / "truth.csv", bootstrap=0)
    assert (result["films"], result["dice"], result["auc"], result["unreadable"]) == (2, 1.0, 1.0, 1)


# ---- terminals and messages


def test_no_control_character_reaches_the_terminal(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "ch\x1b[2Jest\u202e"
    (run / "jobs").mkdir(parents=True)
    (run / "config.yaml").write_text("no: setting")
    assert main(["list", "--run-root", str(tmp_path)]) == 0
    assert main(["status", str(run)]) == 2
    assert main(["logs", f"{run}\x07"]) == 2
    (run / "jobs" / "submitted.jsonl").write_text(
        '{"key": "stage1-fold0", "stage": "1", "fold": 0, "cluster": "slurm", "log": "4_%r_log.out"}\n'
    )
    (run / "jobs" / "4_0_log.out").write_bytes("\x1b]0;owned\x07fine ü\r\n".encode() + b"\xff\x9b31m\n")
    assert main(["logs", str(run)]) == 0
    Display().pass_on(b"worker \x1b[31mred \xc3")
    Display().say("film \x9b1m")
    with plain_output():
        print("a file \udcff name")
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    runlog.setup()
    logging.getLogger("pneumo_dist").info("film %s", "\x1b[8m.dcm")
    shown = "".join(capfd.readouterr())
    assert not [c for c in shown if (c < " " or "\x7f" <= c < "\xa0" or c in "\u202e\udcff") and c not in "\t\n"]
    for text in (
        "ch\\x1b[2Jest\\u202e",
        "\\x1b]0;owned\\x07fine ü\\r\n",
        "worker \\x1b[31mred ",
        "\\x9b1m",
        "\\x1b[8m.dcm",
    ):
        assert text in shown


def test_a_terminal_that_is_not_utf_8_shows_every_text(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.TextIOWrapper(io.BytesIO(), "latin-1")
    monkeypatch.setattr(sys, "stdout", stream)
    with plain_output():
        print("fine \u00fc, film \u6f22")
    stream.flush()
    assert stream.buffer.getvalue() == b"fine \xfc, film \\u6f22\n"


@pytest.mark.parametrize("name", ["DOE JOHN", "DOE^JOHN", "12345678"])
def test_no_message_quotes_a_text_of_the_header(name: str) -> None:
    pixels = grey(20, 24)
    for data in (
        film_bytes(pixels, PhotometricInterpretation=name),
        streamed_bytes(pixels, b"xx", name),
        film_bytes(pixels, PresentationLUTShape=name, ViewPosition=name, PhotometricInterpretation="HSV"),
    ):
        with pytest.raises(FilmError) as refused:
            parse_film(data, 1_000_000, "x.dcm")
        assert name[:4] not in str(refused.value)


# ---- TensorBoard


def test_tensorboard_answers_only_who_knows_the_secret(tmp_path: Path) -> None:
    command = [sys.executable, ROOT / "launch/runs.py", "tensorboard", tmp_path, "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as server:
        try:
            assert server.stdout is not None
            address = re.match(r"(http://127\.0\.0\.1:\d+/)([\w-]{20,})/", server.stdout.readline())
            assert address
            assert ":127.0.0.1:" in server.stdout.readline() and "other accounts" in server.stdout.readline()
            for path in ("", "data/runs", f"{'x' * len(address[2])}/data/runs"):
                with pytest.raises(HTTPError, match="404"):
                    urlopen(address[1] + path)
            assert urlopen(f"{address[0]}data/runs").read() == b"[]"
            assert address[2] not in Path(f"/proc/{server.pid}/cmdline").read_text()
            children = Path(f"/proc/{server.pid}/task/{server.pid}/children").read_text()
            assert not children, "a data server would answer on another port"
        finally:
            server.kill()

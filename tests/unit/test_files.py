"""A file is written completely or not at all."""

import errno

import pytest

from pneumo_dist.runtime import files
from pneumo_dist.runtime.failure import Failure, error_line


def test_an_error_while_writing_leaves_the_old_file_and_no_other(tmp_path):
    path = tmp_path / "a.json"
    files.write_json(path, {"old": 1})
    with pytest.raises(RuntimeError), files.atomic_path(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert files.read_json(path) == {"old": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_a_disk_error_that_a_writer_has_replaced_is_raised_with_the_path(tmp_path):
    with (
        pytest.raises(OSError, match=r"No space left on device: '.*/model\.pt'"),
        files.atomic_path(tmp_path / "model.pt"),
    ):
        try:
            raise OSError(errno.ENOSPC, "No space left on device")
        except OSError:
            raise RuntimeError("unexpected pos 64 vs 0")  # noqa: B904  torch.save does so
    with pytest.raises(FileNotFoundError, match="other"), files.atomic_path(tmp_path / "model.pt"):
        (tmp_path / "other").read_bytes()  # the error of another file keeps its name


def test_only_failures_outside_the_program_are_one_line():
    assert error_line(Failure("two\nlines")) == "two lines"
    assert error_line(OSError(errno.EROFS, "Read-only file system", "/x")) == "[Errno 30] Read-only file system: '/x'"
    for mistake in (RuntimeError("x"), FileNotFoundError(errno.ENOENT, "No such file", "/x"), KeyError("x")):
        assert error_line(mistake) is None


def test_nan_is_not_written_as_json(tmp_path):
    with pytest.raises(ValueError):
        files.write_json(tmp_path / "a.json", {"x": float("nan")})
    assert not (tmp_path / "a.json").exists()


def test_sha256_of_a_file_is_that_of_its_text(tmp_path):
    files.write_text(tmp_path / "a", "abc")
    assert files.sha256_file(tmp_path / "a") == files.sha256_text("abc")
    assert files.sha256_text("abc").startswith("ba7816bf")

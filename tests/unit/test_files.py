"""A file is whole or not there."""

import pytest

from pneumo_dist.runtime import files


def test_an_error_while_writing_leaves_the_old_file_and_no_other(tmp_path):
    path = tmp_path / "a.json"
    files.write_json(path, {"old": 1})
    with pytest.raises(RuntimeError), files.atomic_path(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert files.read_json(path) == {"old": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_nan_is_not_written_as_json(tmp_path):
    with pytest.raises(ValueError):
        files.write_json(tmp_path / "a.json", {"x": float("nan")})
    assert not (tmp_path / "a.json").exists()


def test_sha256_of_a_file_is_that_of_its_text(tmp_path):
    files.write_text(tmp_path / "a", "abc")
    assert files.sha256_file(tmp_path / "a") == files.sha256_text("abc")
    assert files.sha256_text("abc").startswith("ba7816bf")

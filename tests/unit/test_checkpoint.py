"""Checkpoints are whole or absent, and a damaged one never stops a run."""

import threading

import pytest
import torch

from pneumo_dist.runtime.task import Attempt, Stale
from pneumo_dist.training import checkpoint
from pneumo_dist.training.checkpoint import CheckpointError, CheckpointStore


def _state(step: int) -> dict:
    return {"step": step, "weights": torch.full((1000,), float(step)), "nested": {"rng": [torch.arange(step)]}}


def _save(store: CheckpointStore, *steps: int) -> None:
    for step in steps:
        store.save(f"{step:010d}", _state(step))
    store.wait()


def _newest(store: CheckpointStore) -> dict:
    state, problem = store.read(store.newest())
    assert not problem
    return state


def _step(store: CheckpointStore) -> int:
    return _newest(store)["step"]


def _names(folder) -> list[str]:
    return sorted(path.name for path in folder.glob("*.pt"))


def test_the_newest_two_are_kept_and_the_newest_is_read(tmp_path):
    store = CheckpointStore(tmp_path)
    _save(store, 9, 10, 11)
    assert _names(tmp_path) == ["0000000010.pt", "0000000011.pt"]
    assert _step(CheckpointStore(tmp_path)) == 11


def test_a_first_write_has_nothing_to_warn_about(tmp_path, caplog):
    _save(CheckpointStore(tmp_path / "new"), 1, 2, 3)
    assert caplog.text == ""


def test_a_rank_waits_for_the_checkpoint_that_rank_0_has_found(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "_PATIENCE_S", 1.5)
    store = CheckpointStore(tmp_path)
    _save(store, 1)
    entry, hidden = store.newest(), tmp_path / "hidden"
    (tmp_path / entry["file"]).rename(hidden)
    threading.Timer(0.5, hidden.rename, [tmp_path / entry["file"]]).start()
    assert store.read(entry)[0]["step"] == 1
    monkeypatch.setattr(checkpoint, "_PATIENCE_S", 0)
    state, problem = store.read(entry | {"sha256": "0"})
    assert store.read(entry | {"sha256": "0"}, checked=True)[0]["step"] == 1
    assert state == {} and "0000000001.pt cannot be read: its sha256 differs from that which rank 0 found" in problem


def test_a_fresh_folder_has_no_checkpoint(tmp_path):
    assert CheckpointStore(tmp_path / "none").newest() is None


@pytest.mark.parametrize("damage", ["truncate", "flip", "empty", "remove"])
def test_a_damaged_newest_checkpoint_is_skipped_with_a_warning(tmp_path, caplog, damage):
    _save(CheckpointStore(tmp_path), 1, 2)
    newest = tmp_path / "0000000002.pt"
    data = bytearray(newest.read_bytes())
    if damage == "truncate":
        newest.write_bytes(data[: len(data) // 2])
    elif damage == "flip":  # inside a tensor: torch itself would read it without complaint
        at = data.find(torch.full((1000,), 2.0).numpy().tobytes()) + 100
        data[at] ^= 1
        newest.write_bytes(data)
    elif damage == "empty":
        newest.write_bytes(b"")
    else:
        newest.unlink()
    store = CheckpointStore(tmp_path)
    assert _step(store) == 1
    assert "0000000002.pt" in caplog.text
    _save(store, 3)  # the damaged file does not count as one of the two that are kept
    assert _names(tmp_path) == ["0000000001.pt", "0000000003.pt"]


@pytest.mark.parametrize("last", ["{", '{"checkpoints": [1]}', "[]", "\0", None])
def test_a_damaged_or_lost_LAST_falls_back_to_the_files_by_number(tmp_path, last):
    _save(CheckpointStore(tmp_path), 9, 10)
    if last is None:  # as after a kill between the first write and LAST
        (tmp_path / "LAST").unlink()
    else:
        (tmp_path / "LAST").write_text(last)
    assert _step(CheckpointStore(tmp_path)) == 10


def test_without_LAST_a_flipped_bit_is_found_by_the_files_own_checksum(tmp_path):
    _save(CheckpointStore(tmp_path), 9, 10)
    (tmp_path / "LAST").unlink()
    data = bytearray((tmp_path / "0000000010.pt").read_bytes())
    data[data.find(torch.full((1000,), 10.0).numpy().tobytes()) + 100] ^= 1
    (tmp_path / "0000000010.pt").write_bytes(data)
    assert _step(CheckpointStore(tmp_path)) == 9


def test_a_write_killed_just_before_LAST_loses_one_save_and_no_file(tmp_path):
    store = CheckpointStore(tmp_path)
    _save(store, 1, 2)
    before = (tmp_path / "LAST").read_text()
    _save(store, 3)
    (tmp_path / "LAST").write_text(before)
    (tmp_path / "0000000001.pt").write_bytes((tmp_path / "0000000002.pt").read_bytes())
    store = CheckpointStore(tmp_path)
    assert _step(store) == 2
    _save(store, 3, 4)
    assert _names(tmp_path) == ["0000000003.pt", "0000000004.pt"] and _step(CheckpointStore(tmp_path)) == 4


def test_no_whole_checkpoint_left_is_an_error_not_a_restart(tmp_path):
    _save(CheckpointStore(tmp_path), 1, 2)
    for path in tmp_path.glob("*.pt"):
        path.write_bytes(b"x")
    with pytest.raises(RuntimeError, match="none of the 2 checkpoints can be read"):
        CheckpointStore(tmp_path).newest()


def test_the_copy_is_taken_before_save_returns(tmp_path, monkeypatch):
    may_write = threading.Event()
    real = torch.save

    def slow(*args):
        may_write.wait(10)
        real(*args)

    monkeypatch.setattr(checkpoint.torch, "save", slow)
    store = CheckpointStore(tmp_path)
    weights = torch.zeros(10)
    store.save("0000000001", {"weights": weights})
    weights += 1  # training continues while the file is written
    may_write.set()
    store.wait()
    assert _newest(store)["weights"].sum() == 0


def test_a_failed_write_leaves_the_one_before_and_says_which_file(tmp_path, monkeypatch):
    store = CheckpointStore(tmp_path)
    _save(store, 1)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint.torch, "save", full)
    store.save("0000000002", _state(2))
    store.save("0000000003", _state(3))  # only rank 0 saves: the error waits until all ranks agree
    assert store.failed
    for _ in range(2):
        with pytest.raises(CheckpointError, match=r"0000000002\.pt.*No space left"):
            store.wait()
    assert _step(store) == 1
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_an_attempt_that_was_taken_over_writes_nothing(tmp_path):
    old = Attempt.begin(tmp_path / "attempt")
    store = CheckpointStore(tmp_path / "checkpoints", attempt=old)
    _save(store, 1)
    Attempt.begin(tmp_path / "attempt")
    store.save("0000000002", _state(2))
    with pytest.raises(Stale):
        store.wait()
    assert _step(store) == 1

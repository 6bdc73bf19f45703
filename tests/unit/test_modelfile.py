"""The model file: content is preserved, equal content gives equal bytes, other files are refused."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch.optim.swa_utils import AveragedModel

from pneumo_dist.config import ConfigError
from pneumo_dist.model.modelfile import load_model, save_model
from pneumo_dist.model.unet import ResNet34UNet

META = {"size": 256, "threshold": 0.55, "triplet": {"top_score": 0.7, "min_area": 500}, "mean": [0.5], "tta": None}


@pytest.fixture(scope="module")
def model() -> ResNet34UNet:
    model = ResNet34UNet(seed=9)
    model.encoder.bn1.num_batches_tracked.fill_(17)
    return model


@pytest.fixture(scope="module")
def saved(model: ResNet34UNet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "model.pt"
    save_model(path, model.state_dict(), META)
    return path


def test_weights_and_meta_return_in_evaluation_mode(model: ResNet34UNet, saved: Path) -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    loaded, meta = load_model(saved)
    assert torch.equal(torch.get_rng_state(), before)
    assert meta == META and not loaded.training
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in loaded.state_dict().items())
    assert all(p.requires_grad and p.device.type == "cpu" for p in loaded.parameters())


def test_a_loaded_model_predicts_what_the_saved_one_does(model: ResNet34UNet, saved: Path) -> None:
    torch.set_num_threads(1)
    x = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    loaded, _ = load_model(saved)
    same = copy.deepcopy(model).eval().to(memory_format=torch.channels_last)
    with torch.no_grad():
        assert torch.equal(loaded(x)[0], same(x)[0])


def test_wrappers_leave_no_trace_in_keys_or_bytes(model: ResNet34UNet, saved: Path, tmp_path: Path) -> None:
    averaged = AveragedModel(model)
    averaged.update_parameters(model)
    compiled = {f"module._orig_mod.{key}": value for key, value in model.state_dict().items()}
    for i, state in enumerate((averaged.state_dict(), compiled)):
        path = tmp_path / f"another name {i}.pt"
        save_model(path, state, {**META, "mean": (0.5,)})
        assert path.read_bytes() == saved.read_bytes()


def test_half_precision_becomes_float32(model: ResNet34UNet, tmp_path: Path) -> None:
    half = {k: v.half() if v.is_floating_point() else v for k, v in model.state_dict().items()}
    save_model(tmp_path / "m.pt", half, {})
    loaded, _ = load_model(tmp_path / "m.pt")
    assert {v.dtype for v in loaded.state_dict().values()} == {torch.float32, torch.int64}


def test_another_networks_state_is_a_programming_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"keys missing .*1 unknown \['fc.weight'\]"):
        save_model(tmp_path / "m.pt", {"fc.weight": torch.zeros(1)}, {})
    assert list(tmp_path.iterdir()) == []


def test_meta_holds_plain_values_only(model: ResNet34UNet, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"meta.files\[0\] is a PosixPath"):
        save_model(tmp_path / "m.pt", model.state_dict(), {"files": [tmp_path]})


def test_a_failed_write_leaves_the_file_before_it(
    model: ResNet34UNet, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = saved.read_bytes()

    def full(payload: object, file: object) -> None:
        file.write(b"half")  # type: ignore[attr-defined]
        raise OSError("No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space"):
        save_model(saved, model.state_dict(), META)
    assert saved.read_bytes() == before and list(saved.parent.iterdir()) == [saved]


class Malicious:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return print, ("code from the file ran",)


def test_files_that_are_no_model_are_refused_by_name(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.pt").write_text("hello")
    (tmp_path / "empty.pt").write_bytes(b"")
    (tmp_path / "cut.pt").write_bytes(saved.read_bytes()[:-2000])
    torch.save({"weights": torch.zeros(1)}, tmp_path / "other.pt")
    torch.save(torch.zeros(1), tmp_path / "tensor.pt")
    torch.save({"format": "pneumo_dist.model/1", "model": {"x": torch.zeros(1)}, "meta": {}}, tmp_path / "keys.pt")
    torch.save({"format": "pneumo_dist.model/1"}, tmp_path / "hollow.pt")
    torch.save(Malicious(), tmp_path / "code.pt")
    (tmp_path / "folder").mkdir()
    for name in ("text", "empty", "cut", "other", "tensor", "keys", "hollow", "code", "missing"):
        with pytest.raises(ConfigError, match=f"{name}.pt") as error:
            load_model(tmp_path / f"{name}.pt")
        assert "\n" not in str(error.value)
    with pytest.raises(ConfigError, match="is a folder"):
        load_model(tmp_path / "folder")
    assert "code from the file ran" not in capsys.readouterr().out

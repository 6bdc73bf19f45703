"""Weights from elsewhere: what a file has is taken, what it lacks starts at random, and the log says both."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pneumo_dist.config import ConfigError
from pneumo_dist.model.modelfile import save_model
from pneumo_dist.model.pretrained import import_torchvision
from pneumo_dist.model.resnet import ResNet34Encoder
from pneumo_dist.model.start import start_model
from pneumo_dist.model.transfer import load_weights
from pneumo_dist.model.unet import ResNet34UNet
from tests.films import task

ALL = ["encoder", "decoder", "mask head", "image-level head"]


@pytest.fixture
def thin(monkeypatch: pytest.MonkeyPatch) -> None:
    """A narrow network: what is tested is names, not arithmetic."""
    monkeypatch.setattr(ResNet34Encoder, "channels", (8, 8, 8, 16, 16))
    monkeypatch.setattr(ResNet34UNet, "widths", (16, 8, 8, 8, 8))


def changed(seed: int, film_head: bool) -> ResNet34UNet:
    """A network of which no parameter or buffer has its starting value."""
    network = ResNet34UNet(seed, film_head)
    generator = torch.Generator().manual_seed(seed)
    for value in network.state_dict().values():
        value.copy_(torch.rand(value.shape, generator=generator) if value.is_floating_point() else value + 7)
    return network


def same(found: ResNet34UNet, wanted: ResNet34UNet, *parts: str) -> bool:
    state = wanted.state_dict()
    return all(torch.equal(value, state[key]) for key, value in found.state_dict().items() if key.startswith(parts))


def stored(kind: str, state: dict[str, Tensor], path: Path) -> Path:
    """Write a state dict as each of its sources does."""
    prefixes = {"DDP": "module.", "compiled": "_orig_mod.", "Lightning": "model.", "both": "module._orig_mod."}
    if kind == "model file":
        save_model(path, state, {"size": 64})
        return path
    if kind in prefixes:
        state = {f"{prefixes[kind]}{key}": value for key, value in state.items()}
    content: dict[str, Any] = state
    if kind == "checkpoint":
        content = {"steps": 3, "model": state, "optimizer": {}, "rng": [torch.get_rng_state()]}
    if kind == "Lightning":
        content = {"epoch": 1, "state_dict": state}
    torch.save(content, path)
    return path


@pytest.mark.parametrize(
    "kind", ["model file", "checkpoint", "state dict", "DDP", "compiled", "both", "Lightning", "half precision"]
)
def test_every_part_of_a_network_of_this_project_is_taken(thin: None, tmp_path: Path, kind: str) -> None:
    source, target = changed(3, film_head=True), ResNet34UNet(0, film_head=True)
    if kind == "half precision":
        source = source.half().float()  # values that float16 holds
        state = {key: v.half() if v.is_floating_point() else v for key, v in source.state_dict().items()}
    else:
        state = source.state_dict()
    assert load_weights(target, stored(kind, state, tmp_path / "w.pt")) == ALL
    assert same(target, source, "") and {p.dtype for p in target.parameters()} == {torch.float32}


def test_a_part_that_a_file_lacks_keeps_its_start(thin: None, tmp_path: Path) -> None:
    source, target, start = changed(3, film_head=False), *(ResNet34UNet(5, film_head=True) for _ in range(2))
    path = stored("model file", source.state_dict(), tmp_path / "w.pt")
    assert load_weights(target, path) == ALL[:3]
    assert same(target, start, "film_head.") and not same(target, start, "head.")
    state = source.state_dict()
    state["decoder.3.conv1.weight"] = state["decoder.3.conv1.weight"][:-1]  # of another width
    del state["head.bias"]
    target = ResNet34UNet(5, film_head=True)
    assert load_weights(target, stored("state dict", state, tmp_path / "other.pt")) == ["encoder"]
    assert same(target, source, "encoder.") and same(target, start, "decoder.", "head.", "film_head.")


def test_a_head_that_the_network_lacks_is_left_out(thin: None, tmp_path: Path) -> None:
    source, target = changed(3, film_head=True), ResNet34UNet(0)
    assert load_weights(target, stored("model file", source.state_dict(), tmp_path / "w.pt")) == ALL[:3]
    assert target.film_head is None and same(target, source, "")


@pytest.mark.parametrize("prefix", ["", "model."])
def test_a_unet_of_segmentation_models_pytorch_gives_its_logits(tmp_path: Path, prefix: str) -> None:
    torch.set_num_threads(1)
    import_torchvision()  # the peer imports torchvision, which fails with a CPU torch otherwise
    smp = pytest.importorskip("segmentation_models_pytorch")
    with torch.random.fork_rng():
        torch.manual_seed(1)
        theirs = smp.Unet("resnet34", encoder_weights=None)
        theirs.train()(torch.randn(2, 3, 64, 64))  # running statistics of its own
    state = {f"{prefix}{key}": value for key, value in theirs.state_dict().items()}
    torch.save({"state_dict": state} if prefix else state, tmp_path / "smp.pt")
    ours = ResNet34UNet(0, film_head=True)
    assert load_weights(ours, tmp_path / "smp.pt") == ALL[:3]
    x = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        wanted, (found, _) = theirs.eval()(x), ours.eval()(x)
    assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max()  # other order of sums


@pytest.mark.parametrize("counts", [True, False])
def test_a_bare_resnet34_gives_its_encoder(tmp_path: Path, counts: bool) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(5)
        state = import_torchvision().resnet34(weights=None).state_dict()
    if not counts:  # files of old versions of torch do not count the batches of batch norm
        state = {key: value for key, value in state.items() if not key.endswith("num_batches_tracked")}
    torch.save(state, tmp_path / "resnet34.pth")
    model, start = ResNet34UNet(2), ResNet34UNet(2)
    assert load_weights(model, tmp_path / "resnet34.pth") == ["encoder"]
    found = model.encoder.state_dict()
    assert all(torch.equal(value, found[key]) for key, value in state.items() if not key.startswith("fc."))
    assert same(model, start, "decoder.", "head.")


class Malicious:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return print, ("code from the file ran",)


@pytest.mark.parametrize("content", [{"fc.weight": torch.zeros(1)}, {}, {1: torch.zeros(1)}, [1, 2], Malicious(), None])
def test_a_file_without_an_encoder_is_refused_with_a_line(
    thin: None, tmp_path: Path, content: object, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "w.pt"
    if content is None:
        path.write_text("no weights")
    else:
        torch.save(content, path)
    model, start = ResNet34UNet(0), ResNet34UNet(0)
    with pytest.raises(ConfigError, match=r"w\.pt.*give a model file, a checkpoint or a state dict$") as error:
        load_weights(model, path)
    assert "\n" not in str(error.value) and same(model, start, "")
    assert "code from the file ran" not in capsys.readouterr().out


def test_the_log_says_what_was_taken_and_what_starts_at_random(
    thin: None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    source = changed(3, film_head=False)
    path = stored("model file", source.state_dict(), tmp_path / "w.pt")
    words = ["model.pretrained=none", f"stage1.init_from={path}"]
    model = start_model(task(tmp_path / "run", "1", words, fold=0))
    assert model.training and model.film_head is not None and same(model, source, "encoder.", "decoder.", "head.")
    assert f"{path}: encoder, decoder, mask head; random start: image-level head" in caplog.text
    caplog.clear()
    model = start_model(task(tmp_path / "run", "1", [*words, "loss.image=0"], fold=0))
    assert model.film_head is None
    assert f"{path}: encoder, decoder, mask head" in caplog.text and "random" not in caplog.text

"""ImageNet weights: verified, downloaded once, never replaced silently by a random start."""

from __future__ import annotations

import ast
import hashlib
from pathlib import Path

import pytest
import torch

from pneumo_dist.config import ConfigError, Model
from pneumo_dist.model import pretrained
from pneumo_dist.model.pretrained import build_model, imagenet_file, import_torchvision
from pneumo_dist.model.unet import ResNet34UNet

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def official(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stand-in for torchvision's file, named after its own hash as the official one is."""
    with torch.random.fork_rng():
        torch.manual_seed(5)
        state = import_torchvision().resnet34(weights=None).state_dict()
    path = tmp_path_factory.mktemp("site") / "weights.pth"
    torch.save(state, path)
    return path.rename(path.with_name(f"resnet34-{hashlib.sha256(path.read_bytes()).hexdigest()[:8]}.pth"))


@pytest.fixture
def site(official: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Set the stand-in as the official address, with an empty download cache; return the path in the cache."""
    monkeypatch.setattr(pretrained, "_entry", lambda: (official.as_uri(), official.stem.rpartition("-")[2]))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    return tmp_path / "hub" / "checkpoints" / official.name


def same_encoder(model: ResNet34UNet, official: Path) -> bool:
    state = torch.load(official, weights_only=True)
    return all(torch.equal(value, state[key]) for key, value in model.encoder.state_dict().items())


def test_the_entry_is_torchvisions_with_its_hash() -> None:
    url, prefix = pretrained._entry()
    assert url == "https://download.pytorch.org/models/resnet34-b627a593.pth"
    assert prefix == "b627a593"


def test_a_given_file_is_loaded_into_the_encoder_whatever_its_name(official: Path, site: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copied by hand"
    copy.write_bytes(official.read_bytes())
    model = build_model(Model(weights=str(copy)), seed=2)
    assert same_encoder(model, official)
    decoder = ResNet34UNet(seed=2).decoder.state_dict()
    assert all(torch.equal(value, decoder[key]) for key, value in model.decoder.state_dict().items())
    assert not site.exists()


def test_a_given_file_of_another_content_is_refused(site: Path, tmp_path: Path) -> None:
    other = tmp_path / site.name
    torch.save({}, other)
    with pytest.raises(ConfigError, match=r"sha256 begins [0-9a-f]{8}, not [0-9a-f]{8}; copy file://.* again"):
        build_model(Model(weights=str(other)), seed=0)


def test_a_missing_file_is_one_line_with_three_remedies(site: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        imagenet_file(tmp_path / "nothing.pth")
    text = str(error.value)
    assert "\n" not in text and "nothing.pth: no such file" in text
    assert (
        "python -m pneumo_dist.model.pretrained" in text and "model.weights=PATH" in text and "pretrained=none" in text
    )


def test_weights_are_downloaded_once_and_then_taken_from_the_cache(
    official: Path, site: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert imagenet_file() == site and site.read_bytes() == official.read_bytes()
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda *a, **k: pytest.fail("downloaded twice"))
    assert same_encoder(build_model(Model(), seed=0), official)


def test_no_internet_is_an_error_never_a_random_start(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pretrained, "_entry", lambda: ("http://127.0.0.1:9/resnet34-b627a593.pth", "b627a593"))
    with pytest.raises(ConfigError, match=r"download failed .*refused.*on a machine with internet run"):
        build_model(Model(), seed=0)


def test_a_download_with_another_hash_is_not_kept(official: Path, site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pretrained, "_entry", lambda: (official.as_uri(), "00000000"))
    with pytest.raises(ConfigError, match="download failed"):
        imagenet_file()
    assert not site.exists()


def test_a_damaged_cache_is_noticed(official: Path, site: Path) -> None:
    site.parent.mkdir(parents=True)
    site.write_bytes(official.read_bytes()[:-1])
    with pytest.raises(ConfigError, match="delete it and try again"):
        imagenet_file()


def test_the_login_node_command_says_where_the_file_is(
    site: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert pretrained.main() == 0
    assert capsys.readouterr().out.strip() == str(site)
    site.write_bytes(b"")
    assert pretrained.main() == 2
    assert "delete it" in capsys.readouterr().err


def test_a_random_start_needs_no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pretrained, "_entry", lambda: pytest.fail("asked for weights"))
    model = build_model(Model(pretrained="none"), seed=4)
    wanted = ResNet34UNet(seed=4).state_dict()
    assert all(torch.equal(value, wanted[key]) for key, value in model.state_dict().items())


def test_only_one_module_imports_torchvision() -> None:
    importers = set()
    for path in [*ROOT.glob("pneumo_dist/**/*.py"), *ROOT.glob("launch/*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            if any(name.partition(".")[0] == "torchvision" for name in names):
                importers.add(path.relative_to(ROOT).as_posix())
    assert importers == {"pneumo_dist/model/pretrained.py"}

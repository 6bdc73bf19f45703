"""Films in the device's memory and validation on a GPU: the host's bits and counts, and no wait of the host."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.utils._python_dispatch import _disable_current_modes

from pneumo_dist.config import Augment, ConfigError, load
from pneumo_dist.data.augment import Augmenter
from pneumo_dist.data.cases import read_cases
from pneumo_dist.data.loaders import Batch, FilmDataset
from pneumo_dist.data.resident import ResidentFilms
from pneumo_dist.model.resnet import ResNet34Encoder
from pneumo_dist.model.unet import ResNet34UNet
from pneumo_dist.prediction import predictor as predictor_module
from pneumo_dist.prediction.film_scores import FilmScorer
from pneumo_dist.prediction.predictor import Predictor
from pneumo_dist.runtime.ranks import Ranks
from pneumo_dist.runtime.stopping import StopSignal
from pneumo_dist.training.batches import StageFilms
from tests.fake_cuda import cuda_on_cpu, fake_cuda
from tests.films import make_shards, network, picture, task

OVERRIDES = [
    "phantom.films=14", "phantom.size=96", "stages=1", "stage1.size=32", "stage1.epochs=3", "stage1.batch_size=2",
    "stage1.positive_share=0.8,0.2", "data.shards=2", "data.folds=2", "train.workers=0", "evaluate.batch_size=4",
]  # fmt: skip
pytestmark = pytest.mark.usefixtures("thin")
CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("run")
    make_shards(run, OVERRIDES)
    return run


@pytest.fixture
def thin(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make networks narrow; nothing else changes."""
    monkeypatch.setattr(ResNet34Encoder, "channels", (8, 8, 8, 16, 16))
    monkeypatch.setattr(ResNet34UNet, "widths", (16, 8, 8, 8, 8))


class Pictures(FilmDataset):
    """300 films without files: every grey value occurs; every third mask is empty."""

    def __init__(self, augmenter: Augmenter | None = None) -> None:
        self.size, self.augmenter = 32, augmenter
        rng = np.random.default_rng(0)
        self.images = rng.permuted(np.resize(np.arange(256, dtype=np.uint8), (300, 32, 32)), axis=1)
        self.masks = ((rng.random((300, 32, 32)) < 0.3) & (np.arange(300) % 3 > 0)[:, None, None]).astype(np.uint8)

    def __len__(self) -> int:
        return len(self.images)

    def _arrays(self, key: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
        image, mask = self.images[key[1]], self.masks[key[1]]
        return self.augmenter(image, mask, *key) if self.augmenter else (image, mask)


STRONG = {"hflip": 0.5, "tone": 1.0, "contrast": 0.9, "brightness": 0.9, "gamma": 0.9}


@pytest.mark.parametrize(
    "augment", [{}, STRONG, *(STRONG | {name: 0.0} for name in ("hflip", "tone", "contrast", "brightness", "gamma"))]
)
def test_films_on_the_device_have_the_bits_of_albumentations(augment: dict[str, float]) -> None:
    augmenter = Augmenter(Augment(**augment), seed=len(augment))
    films, host = ResidentFilms(Pictures(), augmenter, CPU), Pictures(augmenter)
    keys = [(epoch, index) for epoch in (0, 5) for index in range(300)]
    same(films.batch(keys), host.__getitems__(keys))


def same(one: Batch, other: Batch) -> None:
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(one, other, strict=True))


def batches_of(run_dir: Path, place: str, start: tuple[int, int] = (0, 0), ranks: Ranks | None = None) -> list[Batch]:
    films = StageFilms(task(run_dir, "1", [*OVERRIDES, f"data.on_device={place}"], fold=0, ranks=ranks or Ranks()))
    return [(batch.images, batch.masks, indices) for batch, indices in films.batches(*start)]


def test_the_batches_of_a_stage_are_the_same_bits_on_the_device_for_any_ranks_and_from_any_start(run_dir: Path) -> None:
    whole = batches_of(run_dir, "off")
    assert len(whole) == 6 and any(mask.any() for _, mask, _ in whole)
    for start in ((0, 0), (1, 1)):
        for one, other in zip(batches_of(run_dir, "on", start), whole[2 * start[0] + start[1] :], strict=True):
            same(one, other)
    parts = [batches_of(run_dir, "on", ranks=Ranks(rank, 2)) for rank in range(2)]
    for batch, *of_ranks in zip(whole, *parts, strict=True):
        same(batch, tuple(torch.cat(tensors) for tensors in zip(*of_ranks, strict=True)))


@pytest.mark.parametrize(
    ("free", "augment", "wanted"),
    [(80 << 30, "0", "in the GPU's memory"), (1000, "0", "more than a quarter"), (80 << 30, "1", "moves pixels")],
)
def test_a_gpu_holds_the_films_where_they_fit_and_the_log_says_why_not(
    run_dir: Path,
    free: int,
    augment: str,
    wanted: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    loaded: list[torch.device] = []
    init = ResidentFilms.__init__
    monkeypatch.setattr(ResidentFilms, "__init__", lambda *args: (loaded.append(args[-1]), init(*args))[1])
    with cuda_on_cpu():
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, free))
        films = StageFilms(task(run_dir, "1", [*OVERRIDES, f"augment.affine={augment}"], fold=0))
        assert len(list(films.batches(2, 1))) == 1
    assert wanted in caplog.text and loaded == ([CUDA] if "in the GPU" in wanted else [])


def test_films_that_must_be_moved_cannot_be_asked_for_on_the_device() -> None:
    with pytest.raises(ConfigError, match="set data.on_device=auto"):
        load(None, ["data.on_device=on", "augment.affine=0.5"])


def test_a_batch_waits_for_nothing() -> None:
    films = ResidentFilms(Pictures(), Augmenter(Augment(), 0), CPU)
    with fake_cuda() as record:
        for name in ("_images", "_masks", "_mask_rows", "_bits"):
            setattr(films, name, getattr(films, name).to(CUDA))
        films._device = CUDA
        record.clear()
        images, masks, indices = films.batch([(0, 3), (0, 1)])
    assert {images.device, masks.device} == {CUDA} and indices.device == CPU
    assert record.waits == [] and len(record.calls) < 30


def scorer(run_dir: Path) -> FilmScorer:
    cases = read_cases(run_dir / "shards")
    shown = {cases[3].id, cases[9].id}
    stage = task(run_dir, "1", OVERRIDES, fold=0)
    return FilmScorer(stage, cases, run_dir / "shards", 32, StopSignal(), shown, lambda _, prob: prob > 0.5)


@pytest.mark.parametrize("film_head", [False, True])
@pytest.mark.parametrize("group_px", [1, 3 * 96 * 96])
def test_validation_on_a_gpu_counts_what_the_host_counts(
    run_dir: Path, film_head: bool, group_px: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pneumo_dist.prediction.film_scores._GROUP_PX", group_px)
    model = network(film_head=film_head)
    host = scorer(run_dir).score(Predictor([model], 32, "cpu", "none"))
    with cuda_on_cpu():
        gpu = scorer(run_dir).score(Predictor([model], 32, "cuda", "none", "off"))
    assert len(host.masks) == 2 and all(np.array_equal(mask, gpu.masks[film]) for film, mask in host.masks.items())
    for name in ("ids", "truth_px", "film_px"):
        assert np.array_equal(getattr(gpu.records, name), getattr(host.records, name))
    for name in ("areas", "hits"):  # a probability within rounding of the threshold may be counted
        np.testing.assert_allclose(getattr(gpu.records, name), getattr(host.records, name), atol=1)
    assert host.records.hits.any() and host.records.scored == gpu.records.scored == film_head
    np.testing.assert_allclose(gpu.records.top, host.records.top, atol=5e-6)
    for film, loss in host.losses.items():
        found = gpu.losses[film]
        np.testing.assert_allclose(
            [found.bce, found.dice, found.highest], [loss.bce, loss.dice, loss.highest], rtol=1e-5
        )


@pytest.fixture
def numbers_on_the_host(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let what comes back from the fake device be ones: NumPy reads no fakes."""
    copy = predictor_module._pinned_copy

    def ones(part: torch.Tensor) -> torch.Tensor:
        fake = copy(part)
        if part.dtype is torch.bool:
            return fake
        with unset_fake_temporarily(), _disable_current_modes():
            return torch.ones(fake.shape, dtype=fake.dtype)

    monkeypatch.setattr(predictor_module, "_pinned_copy", ones)
    yield


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_a_validation_never_waits_for_the_device(run_dir: Path, amp: str, numbers_on_the_host: None) -> None:
    model = network()
    with fake_cuda() as record:
        predictor = Predictor([model.to(CUDA)], 32, CUDA, "none", amp)
        record.clear()
        share = scorer(run_dir).score(predictor)
    assert len(share.records) == 13 and record.waits == [] and record.calls


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_inference_waits_for_its_own_batch_only(amp: str) -> None:
    images, model = torch.from_numpy(np.stack([picture(i, 32, 32) for i in range(4)]))[:, None], network()
    with fake_cuda() as record:
        predictor = Predictor([model.to(CUDA)], 32, CUDA, "hflip", amp)
        record.clear()
        predictor.launch(images)()
    assert record.waits == []  # a flag that lies on the device would be read behind the next batch
    convolutions = [call for call in record.calls if call.name == "aten.conv2d"]
    assert {call.inputs[0].size[0] for call in convolutions} == {8}  # films and mirror images in one batch


def test_an_overflow_of_float16_is_repeated_in_float32(caplog: pytest.LogCaptureFixture) -> None:
    images, model = torch.from_numpy(np.stack([picture(i, 32, 32) for i in range(3)]))[:, None], network(film_head=True)
    wanted = Predictor([model], 32).probabilities(images)
    with cuda_on_cpu():
        predictor = Predictor([model], 32, "cuda", amp="fp16")
        model.register_forward_hook(
            lambda _, inputs, out: (
                tuple(part * float("nan") for part in out) if torch.is_autocast_enabled("cpu") else out
            )
        )
        found = predictor.probabilities(images)
    assert "a batch of 3 films overflowed" in caplog.text
    torch.testing.assert_close(found.maps, wanted.maps, atol=1e-5, rtol=0)  # other batch sizes: other rounding
    torch.testing.assert_close(found.scores, wanted.scores, atol=1e-5, rtol=0)

"""The image-level head: its start, its gradient, its model file, and one score for a film wherever it is decided.

Nothing in here depends on what the head reads from the network, only that its last layer is linear.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from pneumo_dist.config import ConfigError
from pneumo_dist.data.cases import read_cases
from pneumo_dist.evaluation import evaluate
from pneumo_dist.inference import infer
from pneumo_dist.inference.film_plan import write_film_plan
from pneumo_dist.model.modelfile import load_model, save_model
from pneumo_dist.model.resnet import ResNet34Encoder
from pneumo_dist.model.unet import ResNet34UNet, normalise
from pneumo_dist.prediction.ensemble import load_ensemble
from pneumo_dist.prediction.forward import Predictor, predict, predict_records
from pneumo_dist.scoring.records import Records, Triplet, apply_triplet, film_record
from tests.films import make_shards, network, picture, task, write_model

OVERRIDES = [
    "phantom.films=14", "phantom.size=96", "stages=1", "stage1.size=32", "data.shards=2", "data.folds=2",
    "evaluate.bootstrap=0",
]  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def thin_network() -> Iterator[None]:
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ResNet34Encoder, "channels", (8, 8, 8, 16, 16))
        patch.setattr(ResNet34UNet, "widths", (16, 8, 8, 8, 8))
        yield


def films(count: int, size: int = 32) -> torch.Tensor:
    return torch.from_numpy(np.stack([picture(i, size, size) for i in range(count)]))[:, None]


# --- the network


def test_the_head_leaves_the_start_of_all_other_weights_as_it_is() -> None:
    without, with_head = ResNet34UNet(seed=7).state_dict(), ResNet34UNet(seed=7, film_head=True).state_dict()
    extra = with_head.keys() - without.keys()
    assert extra and all(key.startswith("film_head.") for key in extra)
    assert all(torch.equal(value, with_head[key]) for key, value in without.items())
    again = ResNet34UNet(seed=7, film_head=True).state_dict()
    assert all(torch.equal(with_head[key], again[key]) for key in extra)


def test_the_head_changes_no_mask() -> None:
    x = normalise(films(2))
    without, with_head = ResNet34UNet(seed=7).eval(), ResNet34UNet(seed=7, film_head=True).eval()
    with torch.no_grad():
        (masks, nothing), (same, film_logits) = without(x), with_head(x)
    assert nothing is None and torch.equal(masks, same) and film_logits.shape == (2,)


def test_its_logits_and_gradient_are_those_of_a_linear_layer_over_what_it_reads() -> None:
    model = ResNet34UNet(seed=7, film_head=True).eval()
    read: list[torch.Tensor] = []
    linear = [module for module in model.film_head.modules() if isinstance(module, torch.nn.Linear)][-1]
    linear.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0]))
    labels = torch.tensor([1.0, 0.0, 1.0])
    _, logits = model(normalise(films(3)))
    torch.nn.functional.binary_cross_entropy_with_logits(logits, labels).backward()
    features = read[0].detach().double()
    weight, bias = linear.weight.detach().double()[0], linear.bias.item()
    wanted = features @ weight + bias
    torch.testing.assert_close(logits.detach().double(), wanted, rtol=1e-5, atol=1e-6)
    slope = (torch.sigmoid(wanted) - labels) / 3
    torch.testing.assert_close(linear.weight.grad.double()[0], slope @ features, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(linear.bias.grad.double(), slope.sum()[None], rtol=1e-4, atol=1e-6)
    # The encoder learns from the films' labels; the head of the masks does not.
    assert all(p.grad is not None and p.grad.any() for p in model.encoder.layer4.parameters() if p.dim() == 4)
    assert model.head.weight.grad is None


def test_a_films_logit_depends_on_that_film_alone() -> None:
    model = ResNet34UNet(seed=7, film_head=True).eval()
    x = normalise(films(3))
    with torch.no_grad():
        whole, alone = model(x)[1], torch.cat([model(x[i : i + 1])[1] for i in range(3)])
    torch.testing.assert_close(alone, whole, rtol=1e-4, atol=1e-5)  # other kernels at another batch size
    assert len(set(whole.tolist())) == 3


# --- the model file


@pytest.mark.parametrize("film_head", [True, False])
def test_a_model_file_keeps_the_head_or_its_absence(tmp_path: Path, film_head: bool) -> None:
    model = network(1, film_head=film_head)
    save_model(tmp_path / "model.pt", model.state_dict(), {"size": 32})
    loaded, _ = load_model(tmp_path / "model.pt")
    assert (loaded.film_head is not None) == film_head and loaded.state_dict().keys() == model.state_dict().keys()
    x = normalise(films(2))
    with torch.no_grad():
        wanted, found = model(x), loaded(x)
    assert torch.equal(found[0], wanted[0])
    assert torch.equal(found[1], wanted[1]) if film_head else found[1] is None


def test_a_part_of_a_head_is_a_programming_error(tmp_path: Path) -> None:
    state = network(1, film_head=True).state_dict()
    key = next(key for key in reversed(state) if key.startswith("film_head."))
    del state[key]
    with pytest.raises(ValueError, match=r"not a ResNet34UNet state"):
        save_model(tmp_path / "model.pt", state, {})


# --- prediction


@pytest.mark.parametrize("tta", ["none", "hflip"])
def test_a_films_score_is_the_mean_over_flips_and_models(tta: str) -> None:
    models, images = [network(seed, film_head=True) for seed in (1, 2, 3)], films(4)
    with torch.no_grad():
        passes = [
            torch.sigmoid(model(normalise(batch))[1])
            for model in models
            for batch in ((images,) if tta == "none" else (images, images.flip(-1)))
        ]
    found = Predictor(models, 32, tta=tta).probabilities(images)
    assert found.scores is not None and found.scores.dtype == torch.float32
    # The reference forwards the batch as a whole: other kernels, other rounding.
    torch.testing.assert_close(found.scores, torch.stack(passes).mean(0), atol=1e-5, rtol=0)
    assert len({round(score, 3) for score in found.scores.tolist()}) == 4
    one_by_one = torch.cat([Predictor(models, 32, tta=tta).probabilities(images[i : i + 1]).scores for i in range(4)])
    assert torch.equal(one_by_one, found.scores)


def test_without_a_head_in_every_model_films_are_scored_by_their_highest_probability(tmp_path: Path) -> None:
    models, images = [network(1, film_head=True), network(2)], films(3)
    for pair in (models, models[::-1]):
        predictor = Predictor(pair, 32)
        found = predictor.probabilities(images)
        assert found.scores is None and not predictor.scored
        assert [score for _, score in found.films()] == [None] * 3
    two_sizes = Predictor(models, [32, 64])
    assert two_sizes.probabilities(images).scores is None and two_sizes.probabilities(films(3, 64)).scores is None
    paths = [write_model(tmp_path / f"{i}.pt", seed=i, film_head=bool(i)) for i in range(2)]
    with pytest.raises(ConfigError, match=r"with and without an image-level head .* give infer\.triplet"):
        load_ensemble(paths)
    given = load_ensemble(paths, triplet=Triplet(0.0, 0, 0.5))
    assert not given.predictor.scored and given.settings["score"] == "highest probability of the mask"
    assert load_ensemble(paths[1:]).settings["score"] == "image-level head"
    pooled = tmp_path / "thresholds.json"  # tuned before the models had heads
    pooled.write_text('{"triplet": {"top_score": 0.9, "min_area": 0, "mask_threshold": 0.5}}')
    with pytest.raises(ConfigError, match="another kind of film score"):
        load_ensemble(paths[1:], pooled=pooled)


def test_the_score_decides_in_place_of_the_highest_probability() -> None:
    prob, truth = np.full((20, 20), 0.2, np.float32), np.zeros((20, 20), bool)
    prob[:5] = 0.9
    rule = Triplet(0.6, 0, 0.5)
    assert apply_triplet(prob, rule).sum() == 100 and film_record(prob, truth, (0.5,)).top == np.float32(0.9)
    assert not apply_triplet(prob, rule, 0.59).any() and apply_triplet(prob, rule, 0.6).sum() == 100
    assert film_record(prob, truth, (0.5,), 0.59).top == 0.59
    assert not apply_triplet(np.zeros((20, 20), np.float32), rule, 0.99).any()  # a score alone is no mask


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("run")
    make_shards(run, OVERRIDES)
    write_model(run / "fold0" / "stage1" / "best.pt", seed=3, film_head=True)
    evaluate.run(task(run, "evaluate", OVERRIDES, fold=0))
    return run


def test_evaluation_inference_and_predict_agree_on_score_and_decision(run_dir: Path, tmp_path: Path) -> None:
    records = Records.load(run_dir / "fold0" / "evaluate" / "records.npz")
    model = run_dir / "fold0" / "model.pt"
    rule = Triplet(float(np.median(records.top)), 0, 0.5)
    phantom = run_dir / "phantom" / "dicom-images-train"
    words = [
        *OVERRIDES, f"infer.dir={phantom}", f"infer.models={model}", "infer.label=it", "infer.outputs=csv",
        f"infer.triplet={rule.top_score},{rule.min_area},{rule.mask_threshold}",
    ]  # fmt: skip
    write_film_plan(task(tmp_path, "infer", words).run)
    infer.infer_parts(task(tmp_path, "infer", words))
    infer.merge(task(tmp_path, "merge", words))
    with open(tmp_path / "infer" / "it" / "predictions.csv", newline="") as lines:
        rows = {row["film"]: row for row in csv.DictReader(lines)}
    column, decisions = records.column(rule.mask_threshold), set()
    paths = {path.stem: path for path in phantom.rglob("*.dcm")}
    for i, name in enumerate(records.ids):
        positive = records.top[i] >= np.float32(rule.top_score) and records.areas[i, column] > 0
        assert np.float32(rows[name]["top_score"]) == records.top[i]
        assert rows[name]["decision"] == ("positive" if positive else "negative")
        by_path = predict(model, paths[str(name)], triplet=rule)[0]
        assert np.float32(by_path.top_score) == records.top[i] and by_path.positive == positive
        assert int(rows[name]["area_px"]) == by_path.area_px == (records.areas[i, column] if positive else 0)
        decisions.add(bool(positive))
    assert decisions == {True, False}


def test_the_records_of_ranks_hold_the_heads_scores(run_dir: Path) -> None:
    model, cases = load_model(run_dir / "fold0" / "model.pt")[0], read_cases(run_dir / "shards")
    predictor = Predictor([model], 32)
    parts = [predict_records(predictor, cases, run_dir / "shards", 32, 3, (0.5,), rank, 2) for rank in range(2)]
    joined = Records.concatenate(parts)
    evaluated = Records.load(run_dir / "fold0" / "evaluate" / "records.npz")
    kept = np.isin(joined.ids, evaluated.ids)
    assert np.array_equal(joined.top[kept], evaluated.top)


def test_records_of_two_kinds_of_score_cannot_be_pooled(run_dir: Path, tmp_path: Path) -> None:
    cases = read_cases(run_dir / "shards")
    parts = []
    for i, film_head in enumerate((False, True)):
        predictor = Predictor([ResNet34UNet(1, film_head).eval()], 32)
        predict_records(predictor, cases[i::2], run_dir / "shards", 32, 4, (0.5,)).save(tmp_path / f"{i}.npz")
        parts.append(Records.load(tmp_path / f"{i}.npz"))
    assert [part.scored for part in parts] == [False, True]
    assert Records.concatenate(parts[1:]).select(np.arange(1)).scored
    with pytest.raises(ValueError, match="cannot be joined"):
        Records.concatenate(parts)

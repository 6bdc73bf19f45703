"""Probabilities, film size and records: one forward pass, whose bits depend on the film and the models only."""

import itertools

import numpy as np
import pytest
import torch

import pneumo_dist
from pneumo_dist.data.cases import read_cases
from pneumo_dist.data.films.dicom import read_film
from pneumo_dist.data.films.rle import decode_rle
from pneumo_dist.data.shards import ShardReader, to_size
from pneumo_dist.model.unet import normalise
from pneumo_dist.prediction.filmsize import film_probability, mean_film_probability
from pneumo_dist.prediction.forward import Predictor, predict, predict_records
from pneumo_dist.runtime.stopping import StopSignal
from pneumo_dist.scoring.records import Records, Triplet, apply_triplet, film_record
from tests.films import make_shards, network, picture, write_dicom, write_model

SHARDS = ["phantom.films=7", "phantom.size=96", "stages=1", "stage1.size=32", "data.shards=2", "data.folds=2"]
THRESHOLDS = (0.3, 0.5, 0.7)


def films(count: int, size: int = 32) -> torch.Tensor:
    return torch.from_numpy(np.stack([picture(i, size, size) for i in range(count)]))[:, None]


@pytest.fixture(scope="module")
def model():
    return network()


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    run = tmp_path_factory.mktemp("run")
    make_shards(run, SHARDS)
    return run / "shards"


def test_flips_are_averaged_before_any_threshold(model):
    images = films(3)
    with torch.inference_mode():
        plain = torch.sigmoid(model(normalise(images))[0])[:, 0]
        mirrored = torch.sigmoid(model(normalise(images.flip(-1)))[0]).flip(-1)[:, 0]
    probabilities = Predictor([model], 32, tta="hflip").probabilities(images).maps
    assert probabilities.dtype == torch.float32 and probabilities.shape == (3, 32, 32)
    # The reference forwards the batch as a whole: other kernels, other rounding.
    torch.testing.assert_close(probabilities, (plain + mirrored) / 2, atol=1e-5, rtol=0)
    assert not torch.allclose(plain, mirrored, atol=1e-3)


@pytest.mark.parametrize("size", [32, 64])
def test_a_films_bits_depend_on_neither_batch_nor_threads(model, size):
    images, before = films(6, size), torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        predictor = Predictor([model], size)
        whole = predictor.probabilities(images).maps
        assert torch.get_num_threads() == 2  # the caller's setting stays
        for cut in ([0, 6], [0, 1, 6], [0, 2, 4, 6], [0, 5, 6]):
            parts = [predictor.probabilities(images[a:b]).maps for a, b in itertools.pairwise(cut)]
            assert torch.equal(torch.cat(parts), whole)
        torch.set_num_threads(1)
        assert torch.equal(predictor.probabilities(images.flip(0)).maps.flip(0), whole)
    finally:
        torch.set_num_threads(before)


def test_an_ensemble_is_the_mean_of_its_models():
    models = [network(seed) for seed in (1, 2, 3)]
    images = films(2)
    each = [Predictor([model], 32, tta="none").probabilities(images).maps for model in models]
    together = Predictor(models, 32, tta="none").probabilities(images).maps
    assert torch.equal(together, (each[0] + each[1] + each[2]) / 3)


def test_models_of_two_sizes_are_averaged_at_film_size_by_count():
    models = [network(seed) for seed in (1, 2, 3)]
    predictor = Predictor(models, [64, 32, 64])
    assert predictor.sizes == [32, 64]
    assert [predictor.weight(size) for size in predictor.sizes] == [1 / 3, 2 / 3]
    small, large = np.full((32, 32), 0.3, np.float32), np.full((64, 64), 0.9, np.float32)
    mean = mean_film_probability([(1 / 3, small), (2 / 3, large)], 50, 40)
    assert mean.shape == (50, 40) and mean.dtype == np.float32
    np.testing.assert_allclose(mean, 0.7, atol=1e-6)


@pytest.mark.parametrize("shape", [(96, 80), (32, 32), (64, 64), (33, 65), (20, 24)])
def test_film_size_is_bilinear_with_pixel_centres(shape):
    prob = np.random.default_rng(0).random((32, 32), np.float32)
    wanted = torch.nn.functional.interpolate(
        torch.from_numpy(prob)[None, None].double(), shape, mode="bilinear", align_corners=False
    )[0, 0]
    # OpenCV weighs in float32.
    np.testing.assert_allclose(film_probability(prob, *shape), wanted.numpy(), atol=2e-6)


def test_a_model_in_training_mode_is_refused():
    with pytest.raises(ValueError, match="evaluation mode"):
        Predictor([network().train()], 32)


def test_records_are_the_steps_done_by_hand(model, shards):
    cases = read_cases(shards)
    records = predict_records(Predictor([model], 32), cases, shards, 32, 2, THRESHOLDS)
    assert records.ids.tolist() == [case.id for case in cases] and len(cases) == 7
    reader, predictor = ShardReader(shards, 32), Predictor([model], 32)
    for i, case in enumerate(cases):
        image = torch.from_numpy(reader.image(case.shard, case.row))[None, None]
        prob = film_probability(predictor.probabilities(image).maps[0].numpy(), case.rows, case.columns)
        wanted = film_record(prob, decode_rle(case.rle, case.rows, case.columns), THRESHOLDS)
        assert records.top[i] == np.float32(wanted.top)
        assert records.areas[i].tolist() == wanted.areas.tolist() and records.hits[i].tolist() == wanted.hits.tolist()


@pytest.mark.parametrize("batch_size", [1, 2, 3, 16])
def test_1_2_and_3_ranks_give_the_same_bits_at_any_batch_size(model, shards, batch_size, tmp_path):
    cases, wanted = read_cases(shards), None
    for world_size in (1, 2, 3):
        parts = [
            predict_records(Predictor([model], 32), cases, shards, 32, batch_size, THRESHOLDS, rank, world_size)
            for rank in range(world_size)
        ]
        Records.concatenate(parts).save(tmp_path / "records.npz")
        data = (tmp_path / "records.npz").read_bytes()
        wanted = wanted or data
        assert data == wanted


def test_a_stop_leaves_the_rest_out(model, shards):
    stop, seen = StopSignal(), []

    def note(case, prob, truth):
        seen.append(case.id)
        stop.note(15)

    records = predict_records(
        Predictor([model], 32, tta="none"), read_cases(shards), shards, 32, 1, THRESHOLDS, stop=stop, per_film=note
    )
    assert 1 <= len(records) < 7 and sorted(seen) == records.ids.tolist()


def test_predict_takes_paths_and_arrays_and_uses_the_stored_decision(tmp_path):
    rule = Triplet(0.2, 3, 0.4)
    stored = {"top_score": rule.top_score, "min_area": rule.min_area, "mask_threshold": rule.mask_threshold}
    path = write_model(tmp_path / "model.pt", triplet=stored)
    film = write_dicom(tmp_path / "film.dcm", picture(3))
    loaded = pneumo_dist.load_model(path)
    by_path, by_array = pneumo_dist.predict(loaded, [film, picture(3)])
    doubtful = write_dicom(tmp_path / "doubtful.dcm", picture(3), WindowCenter=4000, WindowWidth=100)
    assert len(predict(loaded, doubtful)[0].warnings) == 1 and by_path.warnings == by_array.warnings == ()
    prob = Predictor([loaded[0]], 32).probabilities(torch.from_numpy(to_size(read_film(film).pixels, 32))[None, None])
    wanted = film_probability(prob.maps[0].numpy(), 96, 80)
    for answer in (by_path, by_array, predict(path, film)[0]):
        assert np.array_equal(answer.probability, wanted)
        assert np.array_equal(answer.mask, apply_triplet(wanted, rule))
        assert answer.top_score == wanted.max() and answer.area_px == answer.mask.sum()
        assert answer.positive == bool(answer.mask.any())
    plain = predict(loaded, picture(3), tta="none", triplet=Triplet(0.0, 0, 0.9))[0]
    assert not np.array_equal(plain.probability, wanted)
    assert np.array_equal(plain.mask, plain.probability > np.float32(0.9))


def test_predict_refuses_arrays_that_are_no_films(tmp_path):
    path = write_model(tmp_path / "model.pt")
    with pytest.raises(TypeError, match="uint8"):
        predict(path, np.zeros((32, 32), np.float32))
    with pytest.raises(TypeError, match="two dimensions"):
        predict(path, np.zeros((32, 32, 3), np.uint8))

"""One optimizer step: the learning rate of each step, and a gradient that is not finite."""

import copy

import pytest
import torch

from pneumo_dist import config as configuration
from pneumo_dist.model.resnet import ResNet34Encoder
from pneumo_dist.model.unet import ResNet34UNet
from pneumo_dist.runtime.ranks import Ranks
from pneumo_dist.training.agreement import DelayedRead
from pneumo_dist.training.step import Stepper, TrainBatch

SIZE = 32


@pytest.fixture
def stepper():
    config = configuration.load(
        None, [f"stage1.size={SIZE}", "stage1.batch_size=4", "model.pretrained=none", "train.clip_norm=0.5"]
    )
    torch.set_num_threads(1)
    return Stepper(ResNet34UNet(1, film_head=True), config, config.stage1, Ranks())


@pytest.fixture
def films():
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (4, 1, SIZE, SIZE), dtype=torch.uint8, generator=generator)
    return TrainBatch(images, (images > 200).to(torch.uint8), torch.ones(4), 4, 4)


def test_each_step_takes_the_rate_of_its_own_number_and_the_last_rate_stays(stepper, films):
    stepper.set_rates([0.1, 0.2, 0.3])
    used = [float(stepper.step(films).rate) for _ in range(5)]
    assert used == pytest.approx([0.1, 0.2, 0.3, 0.3, 0.3])
    assert stepper.steps == 5


def test_the_update_is_adams_at_that_rate(stepper, films):
    """The first step of Adam moves every weight by the rate, against the sign of its gradient."""
    stepper.set_rates([0.0078125])  # a power of two: exact in float32
    before = stepper.model.head.weight.detach().clone()
    stepper.step(films)
    moved = (stepper.model.head.weight.detach() - before).abs()
    assert torch.allclose(moved, torch.full_like(moved, 0.0078125), rtol=1e-3)


def test_a_gradient_that_is_not_finite_changes_no_weight_and_does_not_count(stepper, films):
    stepper.set_rates([0.1, 0.2])
    with torch.no_grad():
        stepper.model.head.bias.fill_(float("nan"))
    before = {name: value.clone() for name, value in stepper.model.named_parameters()}
    result = stepper.step(films)
    assert not bool(result.finite) and not bool(result.loss.isfinite())
    assert all(
        torch.equal(value, before[name]) for name, value in stepper.model.named_parameters() if name != "head.bias"
    )
    assert stepper.steps == 0
    with torch.no_grad():
        stepper.model.head.bias.zero_()
    result = stepper.step(films)
    assert bool(result.finite) and float(result.rate) == pytest.approx(0.1) and stepper.steps == 1
    assert {float(state["step"]) for state in stepper.optimizer.state.values()} == {1.0}


def test_an_overflow_of_float16_leaves_the_running_statistics_finite_and_lowers_the_scale(films, monkeypatch):
    monkeypatch.setattr(ResNet34Encoder, "channels", (8, 8, 8, 16, 16))  # a CPU is slow in float16
    monkeypatch.setattr(ResNet34UNet, "widths", (16, 8, 8, 8, 8))
    settings = [f"stage1.size={SIZE}", "stage1.batch_size=4", "model.pretrained=none", "train.amp=fp16"]
    config = configuration.load(None, settings)
    torch.set_num_threads(1)
    stepper = Stepper(ResNet34UNet(1, film_head=True), config, config.stage1, Ranks())
    weight = stepper.model.encoder.layer1[0].conv1.weight
    with torch.no_grad():
        weight *= 1e6  # its feature map does not fit into float16
    scale = stepper.scaler.get_scale()
    assert not bool(stepper.step(films).finite) and stepper.steps == 0
    assert all(bool(buffer.isfinite().all()) for buffer in stepper.model.buffers())
    assert stepper.scaler.get_scale() == scale / 2
    with torch.no_grad():
        weight /= 1e6
    before = stepper.model.encoder.bn1.running_mean.clone()
    assert any(bool(stepper.step(films).finite) for _ in range(16))  # the usual search for a scale that fits
    assert not torch.equal(stepper.model.encoder.bn1.running_mean, before)


def test_state_carries_the_count_of_steps(stepper, films):
    stepper.set_rates([0.1, 0.2])
    stepper.step(films)
    state = {k: v if k == "steps" else {**v} for k, v in stepper.state_dict().items()}
    stepper.step(films)
    stepper.load_state_dict(state)
    assert stepper.steps == 1 and float(stepper.rate) == pytest.approx(0.2)


def test_a_state_from_another_device_is_laid_out_as_the_weights_here(stepper, films):
    stepper.step(films)
    state = copy.deepcopy(stepper.state_dict())
    stepper.step(films)
    wanted = {name: value.clone() for name, value in stepper.model.state_dict().items()}
    for kept in state["optimizer"]["state"].values():  # a GPU keeps every weight channels_last
        for name, value in kept.items():
            if value.dim() == 4:
                kept[name] = value.to(memory_format=torch.channels_last)
    stepper.load_state_dict(state)
    for weight, kept in stepper.optimizer.state.items():
        assert {kept[name].stride() for name in ("exp_avg", "exp_avg_sq")} == {weight.stride()}
    stepper.step(films)
    assert all(torch.equal(value, wanted[name]) for name, value in stepper.model.state_dict().items())


def test_a_delayed_flag_is_read_one_step_later_with_its_context():
    delayed = DelayedRead()
    assert delayed.exchange(torch.tensor(True), "first") == (False, None)
    assert delayed.exchange(torch.tensor(False), "second") == (True, "first")
    assert delayed.exchange(torch.tensor(True), "third") == (False, "second")

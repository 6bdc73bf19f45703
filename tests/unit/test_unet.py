"""The whole network against an independent implementation, its seeded start, and the input normalisation."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from torch import nn

from pneumo_dist.model.pretrained import import_torchvision
from pneumo_dist.model.unet import IMAGENET_MEAN, IMAGENET_STD, ResNet34UNet, normalise


@pytest.fixture(scope="module")
def pair() -> tuple[ResNet34UNet, nn.Module]:
    """Our network and segmentation_models_pytorch's with our weights; measured statistics keep the logits moderate."""
    torch.set_num_threads(1)
    import_torchvision()  # the peer imports torchvision, which fails with a CPU torch otherwise
    smp = pytest.importorskip("segmentation_models_pytorch")
    ours = ResNet34UNet(seed=3)
    generator = torch.Generator().manual_seed(4)
    for module in ours.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.9
            module.weight.data.copy_(0.5 + torch.rand(module.num_features, generator=generator))
            module.bias.data.copy_(0.2 * torch.randn(module.num_features, generator=generator))
    with torch.no_grad():
        ours(torch.randn(2, 3, 64, 64, generator=generator))
    for module in ours.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.1
    theirs = smp.Unet("resnet34", encoder_weights=None, decoder_channels=(256, 128, 64, 32, 16), classes=1)
    theirs.load_state_dict({peer_name(key): value for key, value in ours.state_dict().items()})
    return ours, theirs


def peer_name(key: str) -> str:
    if key.startswith("encoder."):
        return key
    if key.startswith("head."):
        return key.replace("head.", "segmentation_head.0.")
    block, part, i, rest = re.fullmatch(r"decoder\.(\d)\.(conv|bn)(\d)\.(.+)", key).groups()
    return f"decoder.blocks.{block}.conv{i}.{0 if part == 'conv' else 1}.{rest}"


def test_parameter_count_equals_the_peer(pair: tuple[ResNet34UNet, nn.Module]) -> None:
    ours, theirs = pair
    counts = {sum(p.numel() for p in net.parameters()) for net in pair}
    assert counts == {24_436_369}
    assert len(ours.state_dict()) == len(theirs.state_dict())


@pytest.mark.parametrize(("training", "laid_out"), [(False, False), (True, False), (True, True)])
def test_logits_and_gradients_equal_the_peer(
    pair: tuple[ResNet34UNet, nn.Module], training: bool, laid_out: bool
) -> None:
    ours, theirs = (copy.deepcopy(net).train(training) for net in pair)
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(5))
    target = torch.rand(2, 1, 64, 64, generator=torch.Generator().manual_seed(6))
    if laid_out:  # other kernels add in another order: in 64 bits that error is far below any mistake
        ours.lay_out(64)
        ours, theirs, x, target = ours.double(), theirs.double(), x.double(), target.double()
    limit = 1e-12 if laid_out else 1e-5
    outputs, gradients = [], []
    for net in (ours, theirs):
        net.zero_grad()
        logits = net(x)[0] if net is ours else net(x)
        (logits.sigmoid() - target).square().mean().backward()
        outputs.append(logits.detach())
        gradients.append({key: p.grad for key, p in net.named_parameters()})
    assert outputs[0].shape == (2, 1, 64, 64)
    assert (outputs[0] - outputs[1]).abs().max() <= limit
    for key, gradient in gradients[0].items():
        error = (gradient - gradients[1][peer_name(key)]).abs().max()
        assert error <= limit and error <= 10 * limit * gradient.abs().max(), key  # measured in 32 bits: 6e-8 and 4e-6


def test_start_is_a_pure_function_of_the_seed_and_leaves_the_global_generator() -> None:
    torch.manual_seed(11)
    before = torch.get_rng_state()
    first = ResNet34UNet(seed=7).state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(12)
    again, other = ResNet34UNet(seed=7).state_dict(), ResNet34UNet(seed=8).state_dict()
    assert all(torch.equal(first[key], again[key]) for key in first)
    for key, value in first.items():
        if value.dim() == 4:
            assert not torch.equal(value, other[key]), key


def test_a_start_gives_logits_of_moderate_size() -> None:
    torch.set_num_threads(1)
    images = torch.randint(0, 256, (2, 1, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    logits, _ = ResNet34UNet(seed=0)(normalise(images))
    assert torch.isfinite(logits).all() and logits.std() < 3  # sigmoid is not saturated, so gradients flow


def test_channels_last_changes_nothing_but_the_layout() -> None:
    torch.set_num_threads(1)
    net = ResNet34UNet(seed=1).eval()
    x = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        plain, _ = net(x)
        net.lay_out()
        last, _ = net(x)
    assert (last - plain).abs().max() <= 1e-5 * plain.abs().max()  # other kernels, other order of sums


def test_only_the_smallest_maps_on_a_cpu_meet_contiguous_weights() -> None:
    def contiguous(size: int | None) -> set[str]:
        net.lay_out(size)
        kernels = {name: p for name, p in net.named_parameters() if p.dim() == 4 and p.shape[2] > 1}
        found = {name for name, p in kernels.items() if not p.is_contiguous(memory_format=torch.channels_last)}
        assert all(kernels[name].is_contiguous() for name in found)
        return {name.partition(".conv")[0].rpartition(".")[0] or name for name in found}

    net = ResNet34UNet(seed=1)
    assert contiguous(128) == {"encoder.layer3", "encoder.layer4", "decoder"}
    assert contiguous(None) == set()  # as a GPU and inference have it
    assert contiguous(256) == {"encoder.layer4"}
    assert contiguous(512) == set()


def test_normalise_makes_three_imagenet_channels_of_every_grey_value() -> None:
    grey = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    found = normalise(grey)
    mean, std = (torch.tensor(v, dtype=torch.float64).view(1, 3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    wanted = (grey.double() / 255 - mean) / std
    assert found.dtype == torch.float32 and found.shape == (1, 3, 16, 16)
    assert (found.double() - wanted).abs().max() < 1e-6  # float32 keeps 2.6 to 2e-7

"""The encoder against torchvision's resnet34, weight for weight and feature for feature."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from pneumo_dist.model.pretrained import import_torchvision
from pneumo_dist.model.resnet import ResNet34Encoder


@pytest.fixture(scope="module")
def pair() -> tuple[ResNet34Encoder, nn.Module]:
    torch.set_num_threads(1)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        theirs = import_torchvision().resnet34(weights=None)
    for module in theirs.modules():  # away from 0 and 1, where a missing use would not show
        if isinstance(module, nn.BatchNorm2d):
            for value, low, high in (
                (module.running_mean, -0.2, 0.2),
                (module.running_var, 0.5, 2.0),
                (module.weight.data, 0.5, 1.5),
                (module.bias.data, -0.3, 0.3),
            ):
                value.uniform_(low, high)
    ours = ResNet34Encoder()
    ours.load_state_dict({key: value for key, value in theirs.state_dict().items() if not key.startswith("fc.")})
    return ours, theirs


def features(net: nn.Module, x: Tensor) -> list[Tensor]:
    """torchvision's forward, stopped at the five maps."""
    stem = net.relu(net.bn1(net.conv1(x)))
    maps = [stem, net.layer1(net.maxpool(stem))]
    for layer in (net.layer2, net.layer3, net.layer4):
        maps.append(layer(maps[-1]))
    return maps


def test_names_order_and_counts_are_torchvisions(pair: tuple[ResNet34Encoder, nn.Module]) -> None:
    ours, theirs = pair
    wanted = {key: value.shape for key, value in theirs.state_dict().items() if not key.startswith("fc.")}
    assert {key: value.shape for key, value in ours.state_dict().items()} == wanted
    assert list(ours.state_dict()) == list(wanted)
    assert (
        sum(p.numel() for p in ours.parameters()) == 21_797_672 - 513 * 1000
    )  # torchvision's count, less the classifier


@pytest.mark.parametrize("training", [False, True])
def test_features_equal_torchvisions(pair: tuple[ResNet34Encoder, nn.Module], training: bool) -> None:
    ours, theirs = (net.train(training) for net in pair)
    x = torch.randn(2, 3, 96, 96, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        found, wanted = ours(x), features(theirs, x)
    assert [tuple(f.shape[1:]) for f in found] == [(64, 48, 48), (64, 24, 24), (128, 12, 12), (256, 6, 6), (512, 3, 3)]
    for f, w in zip(found, wanted, strict=True):
        assert (f - w).abs().max() <= 1e-6  # the same operations in the same order: in practice bit-equal


def test_random_start_has_torchvisions_spread() -> None:
    encoder = ResNet34Encoder()
    encoder.initialise(torch.Generator().manual_seed(0))
    weight = encoder.layer4[0].conv1.weight
    assert weight.std().item() == pytest.approx((2 / (512 * 9)) ** 0.5, rel=0.01)  # He, fan out; 1.2 million values

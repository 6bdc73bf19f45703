"""The ResNet-34 encoder (He et al., arXiv 1512.03385) without its pooling and classifier.

State-dict keys are those of torchvision, so that its weights load unchanged: never rename a layer in here.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import batch_norm

from pneumo_dist.model.layout import follow


class BatchNorm(nn.BatchNorm2d):
    """Batch norm that leaves `num_batches_tracked` to the training step, which counts for all layers in one launch.

    Only an average without momentum reads the count while training.
    """

    def forward(self, x: Tensor) -> Tensor:
        if self.momentum is None:
            return super().forward(x)
        statistics = (self.running_mean, self.running_var)
        return batch_norm(x, *statistics, self.weight, self.bias, self.training, self.momentum, self.eps)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with a shortcut; with `stride` 2 or another width the shortcut is a 1x1 convolution."""

    def __init__(self, channels_in: int, channels: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False)
        self.bn1 = BatchNorm(channels)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = BatchNorm(channels)
        self.downsample = None
        if stride != 1 or channels_in != channels:
            shortcut = nn.Conv2d(channels_in, channels, 1, stride, bias=False)
            self.downsample = nn.Sequential(shortcut, BatchNorm(channels))

    def forward(self, x: Tensor) -> Tensor:
        x = follow(x, self.conv1.weight)
        shortcut = x if self.downsample is None else self.downsample(x)
        x = self.relu(self.bn1(self.conv1(x)))
        out: Tensor = self.relu(self.bn2(self.conv2(x)) + shortcut)
        return out


def _layer(channels_in: int, channels: int, blocks: int, stride: int) -> nn.Sequential:
    first = BasicBlock(channels_in, channels, stride)
    return nn.Sequential(first, *(BasicBlock(channels, channels) for _ in range(blocks - 1)))


class ResNet34Encoder(nn.Module):
    """The encoder; it returns the five feature maps that a U-Net needs.

    forward: float (N, 3, S, S), normalised, S a multiple of 32 -> stem (64, S/2), layer1 (64, S/4),
    layer2 (128, S/8), layer3 (256, S/16), layer4 (512, S/32).
    """

    channels = (64, 64, 128, 256, 512)

    def __init__(self) -> None:
        super().__init__()
        stem, *widths = self.channels
        self.conv1 = nn.Conv2d(3, stem, 7, 2, 3, bias=False)
        self.bn1 = BatchNorm(stem)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        self.layer1 = _layer(stem, widths[0], 3, 1)
        self.layer2 = _layer(widths[0], widths[1], 4, 2)
        self.layer3 = _layer(widths[1], widths[2], 6, 2)
        self.layer4 = _layer(widths[2], widths[3], 3, 2)

    def forward(self, x: Tensor) -> list[Tensor]:
        maps = [self.relu(self.bn1(self.conv1(follow(x, self.conv1.weight))))]
        x = self.maxpool(maps[0])
        for layer in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = layer(x)
            maps.append(x)
        return maps

    @torch.no_grad()
    def initialise(self, generator: torch.Generator) -> None:
        """Draw every convolution as torchvision does for a random start; batch norms keep weight 1 and bias 0."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu", generator=generator)

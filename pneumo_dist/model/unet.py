"""ResNet34-UNet: the encoder, a five-block decoder and a one-channel head (arXiv 2009.02805, PeerJ CS 7:e607).

Nothing in here reads a file or changes the state of torch's global random generator.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, interpolate

from pneumo_dist.model.layout import follow, layout_at
from pneumo_dist.model.resnet import BatchNorm, ResNet34Encoder

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class DecoderBlock(nn.Module):
    """Double the map by nearest neighbour, join the skip connection, then twice (3x3 convolution, batch norm, ReLU)."""

    def __init__(self, channels_in: int, channels_skip: int, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in + channels_skip, channels, 3, 1, 1, bias=False)
        self.bn1 = BatchNorm(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = BatchNorm(channels)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor, skip: Tensor | None) -> Tensor:
        weight = self.conv1.weight
        with torch.autocast(x.device.type, enabled=False):  # it copies values: autocast's float32 changes no bit
            x = interpolate(follow(x, weight), scale_factor=2.0, mode="nearest")
        if skip is None:
            x = self.conv1(x)
        else:
            # Equals the convolution of the concatenated maps; saves writing these and their gradient to memory.
            of_x, of_skip = weight.split([x.shape[1], skip.shape[1]], dim=1)
            x = conv2d(x, of_x, padding=1) + conv2d(follow(skip, weight), of_skip, padding=1)
        x = self.relu(self.bn1(x))
        out: Tensor = self.relu(self.bn2(self.conv2(x)))
        return out


class ResNet34UNet(nn.Module):
    """The segmentation network, with or without an image-level head (is there a pneumothorax at all).

    Normalised float (N, 3, S, S), S a multiple of 32 -> mask logits float (N, 1, S, S) and, with the head, film logits
    float (N,), else None. The head is a linear layer over the mean of the encoder's last map: this project's choice,
    not part of the papers.
    """

    # The papers do not give decoder widths; these are in common use with this encoder.
    widths = (256, 128, 64, 32, 16)

    def __init__(self, seed: int = 0, film_head: bool = False) -> None:
        """Build the network with random weights that are a pure function of `seed`, with or without the head."""
        super().__init__()
        with torch.random.fork_rng(devices=[]):  # torch's layers draw their defaults from the global generator
            self.encoder = ResNet34Encoder()
            skips = (*ResNet34Encoder.channels[-2::-1], 0)
            inputs = (ResNet34Encoder.channels[-1], *self.widths[:-1])
            self.decoder = nn.ModuleList(DecoderBlock(*sizes) for sizes in zip(inputs, skips, self.widths, strict=True))
            self.head = nn.Conv2d(self.widths[-1], 1, 3, 1, 1)
            self.film_head = nn.Linear(ResNet34Encoder.channels[-1], 1) if film_head else None
        if not self.head.weight.is_meta:
            self._initialise(torch.Generator().manual_seed(seed))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        *skips, x = self.encoder(x)
        film_logits = None if self.film_head is None else self.film_head(x.mean((2, 3))).squeeze(1)
        for block in self.decoder:
            x = block(x, skips.pop() if skips else None)
        return self.head(x), film_logits

    def lay_out(self, size: int | None = None) -> None:
        """Store all weights channels_last; with `size` (px) in the fastest layout for CPU training on such films."""
        encoder = self.encoder
        down = (encoder.conv1, encoder.layer1, encoder.layer2, encoder.layer3, encoder.layer4)
        up = (*self.decoder, self.head)
        for part, scale in zip((*down, *up), (2, 4, 8, 16, 32, 16, 8, 4, 2, 1, 1), strict=True):
            part.to(memory_format=layout_at(size // scale) if size else torch.channels_last)

    @torch.no_grad()
    def _initialise(self, generator: torch.Generator) -> None:
        self.encoder.initialise(generator)
        for module in self.decoder.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_uniform_(module.weight, mode="fan_in", nonlinearity="relu", generator=generator)
        nn.init.xavier_uniform_(self.head.weight, generator=generator)
        nn.init.zeros_(self.head.bias)  # type: ignore[arg-type]
        if self.film_head is not None:
            nn.init.xavier_uniform_(self.film_head.weight, generator=generator)
            nn.init.zeros_(self.film_head.bias)


@cache
def _scale_and_shift(device: torch.device) -> tuple[Tensor, Tensor]:
    mean = torch.tensor(IMAGENET_MEAN, dtype=torch.float64).view(1, 3, 1, 1)
    std = torch.tensor(IMAGENET_STD, dtype=torch.float64).view(1, 3, 1, 1)
    return (1 / (255 * std)).float().to(device), (-mean / std).float().to(device)


def normalise(images: Tensor) -> Tensor:
    """Return uint8 (N, 1, S, S) films as float32 (N, 3, S, S): three equal channels, ImageNet mean and std.

    Computes on the device of `images`, so that only one byte per pixel is copied there.
    """
    scale, shift = _scale_and_shift(images.device)
    return torch.addcmul(shift, images.float(), scale)

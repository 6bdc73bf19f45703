"""The training loops that are compared: this project's step, and what people would write or take instead.

Each maker returns a `Run`: it trains so many steps on one batch that is in memory already, and returns the seconds.
Everything of this project that a benchmark of the step touches is in `ours`.
"""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pneumo_dist import config as configuration
from pneumo_dist.model.pretrained import import_torchvision
from pneumo_dist.model.unet import ResNet34UNet, normalise
from pneumo_dist.runtime.processes import keep_memory
from pneumo_dist.runtime.processor import set_threads
from pneumo_dist.runtime.ranks import Ranks
from pneumo_dist.training.graph import StepGraph
from pneumo_dist.training.step import Stepper, TrainBatch

Run = Callable[[int], float]  # steps -> seconds


@dataclass(frozen=True)
class Case:
    """What is trained: image side in pixels, images a step on this rank, arithmetic ("off" is float32), device."""

    size: int
    batch: int
    amp: str = "off"
    device: str = "cpu"

    @property
    def dtype(self) -> torch.dtype | None:
        """The type of autocast, or None."""
        return {"bf16": torch.bfloat16, "fp16": torch.float16, "off": None}[self.amp]

    def __str__(self) -> str:
        return f"{self.size} px, batch {self.batch}, {'float32' if self.amp == 'off' else self.amp}"


def films(case: Case) -> tuple[Tensor, Tensor]:
    """Return a batch as the loader gives it: uint8 images and masks, (n, 1, S, S), pinned where there is a GPU."""
    generator = torch.Generator().manual_seed(0)
    shape = (case.batch, 1, case.size, case.size)
    images = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    masks = torch.zeros(shape, dtype=torch.uint8)
    masks[::2, :, case.size // 4 : case.size // 2, case.size // 4 : case.size // 2] = 1
    return (images.pin_memory(), masks.pin_memory()) if case.device == "cuda" else (images, masks)


def floats(case: Case) -> tuple[Tensor, Tensor]:
    """Return the same batch as a dataset with the usual transforms gives it: float32, three channels, normalised."""
    images, masks = films(case)
    images, masks = normalise(images).contiguous(), masks.float()
    return (images.pin_memory(), masks.pin_memory()) if case.device == "cuda" else (images, masks)


def wait(device: str) -> None:
    """Return when the device has done what it was given."""
    if device == "cuda":
        torch.cuda.synchronize()


def timed(step: Callable[[], object], device: str) -> Run:
    """Make a `Run` of a function that trains one step; the first step of a turn is not timed.

    It brings back the memory that the process gave up between the turns.
    """

    def run(steps: int) -> float:
        step()
        wait(device)
        begin = time.perf_counter()
        for _ in range(steps):
            step()
        wait(device)
        return time.perf_counter() - begin

    return run


class Ours:
    """This project's step as training calls it: the one place that knows the interface of `Stepper`."""

    def __init__(self, case: Case, ranks: Ranks | None = None, *words: str) -> None:
        """Build the stepper; `case.batch` is this rank's share; `words` are further settings (`key=value`)."""
        ranks = ranks or Ranks()
        words = (
            f"stage1.size={case.size}", f"stage1.batch_size={case.batch * ranks.world_size}", f"train.amp={case.amp}",
            f"train.threads={torch.get_num_threads()}", "model.pretrained=none", *words,
        )  # fmt: skip
        self.config = configuration.load(None, list(words))
        images, masks = films(case)
        labels = masks.flatten(1).any(1).float()
        positives = int(labels.sum()) * ranks.world_size
        self.batch = TrainBatch(images, masks, labels, case.batch * ranks.world_size, positives)
        with self.settings():
            self.stepper = Stepper(ResNet34UNet(0, film_head=True), self.config, self.config.stage1, ranks)
            graph = self.config.train.cuda_graph
            self._step = StepGraph(self.stepper.step, ranks) if graph else self.stepper.step
        self._run = timed(self.step, case.device)

    def settings(self) -> Settings:
        """Switch to the threads and the determinism that training sets, for as long as the context lasts."""
        return Settings(self.config)

    def step(self) -> object:
        """Train one step."""
        return self._step(self.batch)

    def __call__(self, steps: int) -> float:
        with self.settings():
            return self._run(steps)


class Settings:
    """Training's process-wide settings as a context, so that they do not reach a peer's turn."""

    def __init__(self, config: configuration.Config) -> None:
        self.config = config

    def __enter__(self) -> None:
        set_threads(self.config.train)

    def __exit__(self, *_: object) -> None:
        torch.use_deterministic_algorithms(False)
        torch.backends.cudnn.benchmark = False
        keep_memory(32 << 20)  # the most that glibc keeps by itself


def smp_unet() -> nn.Module:
    """The same network from segmentation_models_pytorch: ResNet-34 encoder, its default decoder, random weights."""
    import_torchvision()
    import segmentation_models_pytorch as smp

    return smp.Unet("resnet34", encoder_weights=None)


def smp_loss() -> Callable[[Tensor, Tensor], Tensor]:
    """Binary cross-entropy plus segmentation_models_pytorch's Dice loss."""
    import_torchvision()
    import segmentation_models_pytorch as smp

    dice, bce = smp.losses.DiceLoss("binary"), nn.BCEWithLogitsLoss()
    return lambda logits, masks: dice(logits, masks) + bce(logits, masks)


def plain_loop(case: Case, model: nn.Module, loss_of: Callable[[Tensor, Tensor], Tensor], tuned: bool = False) -> Run:
    """Train as one writes it first: contiguous float32 batches, Adam's defaults; autocast and scaler where asked for.

    tuned: channels_last weights, fused Adam and cudnn.benchmark as well.
    """
    torch.manual_seed(0)
    layout = torch.channels_last if tuned else torch.contiguous_format
    model = model.to(case.device, memory_format=layout).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=tuned or None)
    scaler = torch.amp.GradScaler(case.device, enabled=case.amp == "fp16")
    images, masks = floats(case)

    def step() -> None:
        torch.backends.cudnn.benchmark = tuned
        x = images.to(case.device, non_blocking=True, memory_format=layout)
        y = masks.to(case.device, non_blocking=True)
        optimizer.zero_grad()
        with torch.autocast(case.device, dtype=case.dtype, enabled=case.dtype is not None):
            loss = loss_of(model(x), y)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()

    return timed(step, case.device)


def smp_loop(case: Case) -> Run:
    """segmentation_models_pytorch in a plain loop."""
    return plain_loop(case, smp_unet(), smp_loss())


def smp_tuned(case: Case) -> Run:
    """segmentation_models_pytorch in a plain loop with the settings that its users recommend on a GPU."""
    return plain_loop(case, smp_unet(), smp_loss(), tuned=True)


def monai_loop(case: Case) -> Run:
    """MONAI's U-Net with the same encoder and its Dice + cross-entropy loss, in a plain loop."""
    import_torchvision()
    from monai.losses import DiceCELoss
    from monai.networks.nets import FlexibleUNet

    model = FlexibleUNet(in_channels=3, out_channels=1, backbone="resnet34", pretrained=False)
    return plain_loop(case, model, DiceCELoss(sigmoid=True))


def lightning_loop(case: Case) -> Run:
    """The same network of segmentation_models_pytorch in Lightning's Trainer, without logger, checkpoints and bar."""
    import_torchvision()
    import lightning

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    torch.manual_seed(0)
    loss_of = smp_loss()
    batch = floats(case)

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = smp_unet()

        def training_step(self, batch: Any, _: int) -> Tensor:
            return loss_of(self.model(batch[0]), batch[1])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.Adam(self.parameters(), lr=1e-3)

    class Clock(lightning.Callback):
        """From the end of the first step, which sets up, to the end of the last."""

        def on_train_batch_end(self, *arguments: Any) -> None:
            if arguments[-1] == 0:
                wait(case.device)
                self.begin = time.perf_counter()

        def on_train_end(self, *_: Any) -> None:
            wait(case.device)
            self.seconds = time.perf_counter() - self.begin

    module = Module()
    precision = {"off": "32-true", "bf16": "bf16-mixed", "fp16": "16-mixed"}[case.amp]

    def run(steps: int) -> float:
        clock = Clock()
        trainer = lightning.Trainer(
            accelerator=case.device if case.device == "cpu" else "gpu", devices=1, precision=precision,
            max_steps=steps + 1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, callbacks=[clock],
        )  # fmt: skip
        trainer.fit(module, torch.utils.data.DataLoader([batch] * (steps + 1), batch_size=None))
        return clock.seconds

    return run


OURS = "pneumo_dist"
LOOPS: dict[str, Callable[[Case], Run]] = {
    OURS: Ours,
    "segmentation_models_pytorch, plain loop": smp_loop,
    "the same in Lightning's Trainer": lightning_loop,
    "MONAI FlexibleUNet, plain loop": monai_loop,
}

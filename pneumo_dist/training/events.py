"""TensorBoard events of a training stage: its attempts, steps and epochs. Written by rank 0 only.

Reads the device only when a step is reported, draws no random numbers, and changes nothing in the training.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from pneumo_dist.config import to_yaml
from pneumo_dist.data.cases import Case
from pneumo_dist.data.loaders import split_batch
from pneumo_dist.data.shards import ShardReader
from pneumo_dist.reports import tensorboard
from pneumo_dist.runtime import history
from pneumo_dist.runtime.runlog import RunLog
from pneumo_dist.runtime.task import Task
from pneumo_dist.training.step import Stepper, StepResult
from pneumo_dist.training.validation import Validation

log = logging.getLogger(__name__)

OVERLAYS = 20  # about how many times a stage the fixed films are drawn
ABOUT = """The horizontal axis counts global batches since the stage began, over all attempts.

* `evaluation/`: scores of the validation films at film size with the fixed mask threshold. Stages 1 and 2: after each
  validated epoch, without flips; evaluate: the deployed weights, with the flips of the recipe.
* `loss/train`: mean over an epoch and all ranks. `loss/validation`: mean over the validation films, at film size.
  `loss/step`: mean over the films of one batch on rank 0. `_bce`, `_dice` and `_image`: the terms before weighting.
  `_positive`, `_negative`: mean over the films with and without a pneumothorax. `_above_empty`: the loss of the masks
  less the Dice term of an empty answer: slightly above 0 for a collapsed network, below 0 for one that segments.
* `evaluation/called_empty`: share of the films without a mask. `evaluation/best`: highest score of `train.select`.
* `overlay/`: the same films every time. Blue: annotation; orange: prediction at the fixed threshold.
* `train/`: values of single steps. `speed/`: mean since the epoch began; `speed/epoch_`: mean over the whole epoch.
* `run/attempt`: 1, 2, ...; each restart adds one. Steps that a restart repeats are shown once.
* `threshold/`, `rule/` (evaluate): thresholds in use; scores of the other decision rules."""


class TrainingEvents:
    """The TensorBoard events of one attempt at a training stage."""

    def __init__(self, log: RunLog, task: Task, stepper: Stepper, cases: Sequence[Case], begin: int) -> None:
        """Write what starts. cases: the validation films; begin: global batches done by earlier attempts."""
        self.log, self.task, self.stepper = log, task, stepper
        self.stage = task.config.train_stage(task.stage)
        self.films = tensorboard.fixed_films(cases)
        self.film_ids = {case.id for case in self.films.values()}
        if not task.ranks.first:
            return
        # An epoch is validated after its last checkpoint. An attempt that was lost after the validation has written
        # the epoch's events, and TensorBoard does not hide them, because they lie at the step of the checkpoint.
        self._begin = begin
        self._noted = {row["epoch"] for row in history.read(task.metrics)}
        if log.attempt == 1 or begin == 0:  # the first attempt may have been killed before it wrote this
            cuda = stepper.device.type == "cuda"
            log.text("run/about", ABOUT)
            log.layout(tensorboard.layout(cuda, stepper.scaler.is_enabled()))
            log.hparams(tensorboard.hyperparameters(task.config, task.stage, task.fold))
        ranks = "1 rank" if task.ranks.world_size == 1 else f"{task.ranks.world_size} ranks"
        start = f"attempt {log.attempt} from batch {begin} on, {ranks}, {stepper.device.type}"
        log.text("run/attempts", f"{start}, torch {torch.__version__}", begin)
        log.text("run/config", f"```yaml\n{to_yaml(task.config)}```", begin)
        log.scalars(begin, {"run/attempt": log.attempt})
        log.flush()

    def step(self, step: int, result: StepResult, images_per_s: float, wait_share: float) -> None:
        """Write one step; no other call waits for the device."""
        if not self.task.ranks.first:
            return
        films = len(split_batch(range(self.stage.batch_size), 0, self.task.ranks.world_size))
        on_device = [result.loss, result.bce, result.dice, result.image, result.grad_norm, result.rate[0]]
        loss, bce, dice, image, norm, rate = torch.stack(on_device).tolist()
        factor = self.stage.batch_size / films  # rank 0's share of the global mean -> mean over its own films
        values = {
            "loss/step": loss * factor,
            "loss/step_bce": bce * factor,
            "loss/step_dice": dice * factor,
            "loss/step_image": image * factor,
            "train/lr": rate,
            "train/grad_norm": norm,
            "speed/images_per_s": images_per_s,
            "speed/wait_share": wait_share,
            "run/attempt": self.log.attempt,
        }
        if self.stepper.scaler.is_enabled():
            values["train/amp_scale"] = self.stepper.scaler.get_scale()
        if self.stepper.device.type == "cuda":
            values["speed/gpu_memory_mib"] = torch.cuda.max_memory_allocated(self.stepper.device) / 2**20
        self.log.scalars(step, values)

    def epoch(self, step: int, row: Mapping[str, Any], validation: Validation | None, reader: ShardReader) -> None:
        """Write the end of an epoch, on rank 0; row: as in metrics.jsonl."""
        if step == self._begin and row["epoch"] in self._noted:
            return
        values = {
            "loss/train": row["train_loss"],
            "speed/epoch_images_per_s": row["images_per_s"] or None,
            "speed/epoch_wait_share": row["wait_share"] if row["images_per_s"] else None,
        }
        if validation is not None and validation.records is not None:
            losses = dict(validation.losses)
            highest = losses.pop("highest_probability")
            values |= {name.replace("loss", "loss/validation", 1): value for name, value in losses.items()} | {
                "evaluation/highest_probability": highest,
                "evaluation/called_empty": row["called_empty"],
                "evaluation/best": row["best"],
            }
            threshold = self.task.config.evaluate.threshold
            tensorboard.scores(self.log, step, validation.scores, validation.records, threshold)
            last = row["epoch"] == self.stage.epochs
            if last or row["epoch"] % -(-self.stage.epochs // OVERLAYS) == 0:
                tensorboard.films(self.log, step, self.films, validation.masks, validation.records, reader, threshold)
        self.log.scalars(step, values)
        self.log.flush()


def log_throughput(stage: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Log images/s and the share of time waiting for data over all epochs of a stage and all its attempts."""
    times = [(1 / row["images_per_s"], row["wait_share"]) for row in rows if row["images_per_s"]]
    if times:  # every epoch has the same number of images
        seconds = sum(time for time, _ in times)
        waited = sum(time * share for time, share in times) / seconds
        log.info(
            "stage %s: %.1f images/s, %.1f %% of the time waiting for data", stage, len(times) / seconds, 100 * waited
        )

"""What TensorBoard shows of a training stage: where it starts again, its steps, its epochs. Rank 0 only.

Reads the device only when a step is reported, draws no random number, and changes nothing of the training.
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
from pneumo_dist.reports import tensorboard as board
from pneumo_dist.runtime import history
from pneumo_dist.runtime.runlog import RunLog
from pneumo_dist.runtime.task import Task
from pneumo_dist.training.step import Stepper, StepResult
from pneumo_dist.training.validation import Validation

log = logging.getLogger(__name__)

OVERLAYS = 20  # times in a stage, about, that the fixed films are drawn
ABOUT = """The horizontal axis counts global batches, from the stage's start over all attempts.

* `evaluation/`: scores of the validation films at film size with the fixed mask threshold. Stages 1 and 2: after an
  epoch, without flips; evaluate: the deployed weights, with the recipe's flips.
* `loss/train`: mean over an epoch and all ranks. `loss/validation`: mean over the validation films, at film size.
  `loss/step`: mean over rank 0's films of one batch. `_bce` and `_dice` are the parts before they are weighted.
* `overlay/`: always the same films. Blue: annotation; orange: prediction at the fixed threshold.
* `train/`, `speed/`: of one step; speed counts from the epoch's start, `speed/epoch_` over the whole epoch.
* `run/attempt`: 1, 2, ...; a rise is a restart. What lies behind the checkpoint it started from is hidden.
* `threshold/`, `rule/` (evaluate): thresholds in use; scores of the other decision rules."""


class Board:
    """The events of one attempt at a training stage."""

    def __init__(self, log: RunLog, task: Task, stepper: Stepper, cases: Sequence[Case], begin: int) -> None:
        """Say what starts. cases: the validation films; begin: global batches done by earlier attempts."""
        self.log, self.task, self.stepper = log, task, stepper
        self.stage = task.config.train_stage(task.stage)
        self.shown = board.fixed_films(cases)
        self.ids = {case.id for case in self.shown.values()}
        if not task.ranks.first:
            return
        # The validation of a finished epoch comes after its last checkpoint: an attempt that was lost in between has
        # shown it already, and nothing hides that.
        self.begin = begin
        self._noted = {row["epoch"] for row in history.read(task.metrics)}
        if log.attempt == 1 or begin == 0:  # a first attempt may have been killed before it was written
            cuda = stepper.device.type == "cuda"
            log.text("run/about", ABOUT)
            log.layout(board.layout(cuda, stepper.scaler.is_enabled()))
            log.hparams(board.hyperparameters(task.config, task.stage, task.fold))
        ranks = "1 rank" if task.ranks.world_size == 1 else f"{task.ranks.world_size} ranks"
        start = f"attempt {log.attempt} from batch {begin} on, {ranks}, {stepper.device.type}"
        log.text("run/attempts", f"{start}, torch {torch.__version__}", begin)
        log.text("run/config", f"```yaml\n{to_yaml(task.config)}```", begin)
        log.scalars(begin, {"run/attempt": log.attempt})
        log.flush()

    def step(self, step: int, result: StepResult, images_per_s: float, wait_share: float) -> None:
        """Show one step; here, and only here, the host waits for the device."""
        if not self.task.ranks.first:
            return
        mine = len(split_batch(range(self.stage.batch_size), 0, self.task.ranks.world_size))
        seen = [result.loss, result.bce, result.dice, result.grad_norm, result.rate[0]]
        loss, bce, dice, norm, rate = torch.stack(seen).tolist()
        share = self.stage.batch_size / mine  # from a share of the global batch's mean to rank 0's own mean
        values = {
            "loss/step": loss * share,
            "loss/step_bce": bce * share,
            "loss/step_dice": dice * share,
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

    def epoch(self, step: int, row: Mapping[str, Any], found: Validation | None, reader: ShardReader) -> None:
        """Show the end of an epoch, rank 0 only: `row` as in metrics.jsonl, and what the validation found."""
        if step == self.begin and row["epoch"] in self._noted:
            return
        values = {
            "loss/train": row["train_loss"],
            "speed/epoch_images_per_s": row["images_per_s"] or None,
            "speed/epoch_wait_share": row["wait_share"] if row["images_per_s"] else None,
        }
        if found is not None and found.records is not None:
            values |= {
                "loss/validation": found.loss,
                "loss/validation_bce": found.loss_bce,
                "loss/validation_dice": found.loss_dice,
                "evaluation/best_dice": row["best_dice"],
            }
            threshold = self.task.config.evaluate.threshold
            board.scores(self.log, step, found.scores, found.records, threshold)
            last = row["epoch"] == self.stage.epochs
            if last or row["epoch"] % -(-self.stage.epochs // OVERLAYS) == 0:
                board.films(self.log, step, self.shown, found.masks, found.records, reader, threshold)
        self.log.scalars(step, values)
        self.log.flush()


def say_speed(stage: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Log images/s and the share of time waiting for data over all epochs of a stage, whatever attempt ran them."""
    times = [(1 / row["images_per_s"], row["wait_share"]) for row in rows if row["images_per_s"]]
    if times:  # epochs have equally many images
        seconds = sum(time for time, _ in times)
        waited = sum(time * share for time, share in times) / seconds
        log.info(
            "stage %s: %.1f images/s, %.1f %% of the time waiting for data", stage, len(times) / seconds, 100 * waited
        )

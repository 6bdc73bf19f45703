"""A training stage: epochs of steps, validation, weight averaging, checkpoints, an orderly stop, an exact resume.

Everything that decides the result is a pure function of (settings, seed, step); a save, a validation or a stop at
any step changes no bit of what follows. Batch-norm buffers differ between ranks and only rank 0's are canonical:
they are what is saved and evaluated; training itself never reads them.
"""

from __future__ import annotations

import faulthandler
import logging
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.optim.swa_utils import AveragedModel

from pneumo_dist.config import ConfigError
from pneumo_dist.data.augment import Augmenter
from pneumo_dist.data.cases import read_cases
from pneumo_dist.data.loaders import FilmDataset, TrainBatches, fold_cases, make_loader, stage_shards
from pneumo_dist.data.shards import ShardReader
from pneumo_dist.model.modelfile import save_model
from pneumo_dist.runtime import history
from pneumo_dist.runtime import ranks as ranks_module
from pneumo_dist.runtime.runlog import RunLog
from pneumo_dist.runtime.stopping import Stopped
from pneumo_dist.runtime.task import Task
from pneumo_dist.training.boundary import Boundary, Late, Wishes
from pneumo_dist.training.checkpoint import CheckpointStore
from pneumo_dist.training.events import Board, say_speed
from pneumo_dist.training.machine import set_threads, warn_if_bits_may_differ
from pneumo_dist.training.schedule import Plateau, learning_rate, swa_due
from pneumo_dist.training.start import start_model
from pneumo_dist.training.step import Stepper, StepResult, check_statistics
from pneumo_dist.training.validation import Validation, validate

log = logging.getLogger(__name__)
_GOING_ON = "SIGTERM: state saved at batch %d; going on until SLURM ends the job"


@dataclass
class Progress:
    """Where the training is; `batch` counts within the epoch."""

    epoch: int = 0
    batch: int = 0
    samples: int = 0
    best: float = -1.0
    best_epoch: int = -1


class Trainer:
    """One rank's view of a training stage."""

    def __init__(self, task: Task) -> None:
        """Build data, network and optimizer, then continue from the newest checkpoint where there is one."""
        config, ranks = task.config, task.ranks
        self.task, self.config, self.ranks = task, config, ranks
        self.stage = config.train_stage(task.stage)
        if ranks.world_size > self.stage.batch_size:
            raise ConfigError(
                f"stage{task.stage}.batch_size={self.stage.batch_size} cannot feed {ranks.world_size} ranks: "
                f"use at most {self.stage.batch_size}"
            )
        check_statistics(self.stage, task.stage, ranks)
        self.machine = set_threads(config.train)
        self.shards = self._staged()
        self.train_cases, self.validation_cases = fold_cases(read_cases(task.run.shard_dir), task.fold or 0)
        if len(self.train_cases) < self.stage.batch_size:
            raise ConfigError(
                f"stage{task.stage}.batch_size={self.stage.batch_size} is more than the {len(self.train_cases)} "
                f"training films of fold {task.fold}: lower it"
            )
        self.steps_per_epoch = len(self.train_cases) // self.stage.batch_size
        self.total_steps = self.stage.epochs * self.steps_per_epoch
        self.stepper = Stepper(start_model(task), config, self.stage, ranks)
        self.swa = config.swa if config.averages(task.stage) else None
        self.average = AveragedModel(self.stepper.model) if self.swa else None
        self.plateau = Plateau(self.stage)
        self.progress = Progress()
        self.boundary = Boundary(ranks)
        self.store = CheckpointStore(task.out / "checkpoints", config.train.keep, task.attempt)
        # Of this epoch's steps, this rank's share; float64 on the device, read when somebody asks.
        self._loss_sum = torch.zeros((), dtype=torch.float64, device=self.stepper.device)
        self._resume()
        self._set_rates()
        self.log = RunLog(task.out / "tensorboard", ranks.first, purge_step=self._batches_done + 1)
        self.live = history.Live(task.out, ranks.first)
        self.board = Board(self.log, task, self.stepper, self.validation_cases, self._batches_done)
        self._saved_at = time.monotonic()
        self._bad_steps = 0
        self._bad = Late()
        self._bad_loss = False  # the last step of this rank that is known about
        self._bad_films: list[str] = []
        self._term_wished = False

    def _staged(self) -> Path:
        """Copy the shards to this node where that is asked for; one node's trouble stops all ranks with a word."""
        folder, problem = self.config.data.stage_dir, ""
        if not folder:
            return self.task.run.shard_dir
        staged = self.task.run.shard_dir
        try:
            staged = stage_shards(self.task.run.shard_dir, Path(folder).expanduser(), self.stage.size)
        except ConfigError as error:
            problem = str(error)
        problem = self.ranks.agree(problem)
        if problem:
            raise ConfigError(problem)
        return staged

    # --- checkpoints -------------------------------------------------------------------------------------------

    @property
    def _batches_done(self) -> int:
        return self.progress.epoch * self.steps_per_epoch + self.progress.batch

    def _resume(self) -> None:
        """Load the newest checkpoint: rank 0 chooses, since file systems may show the others an older state."""
        state = self.ranks.broadcast(self.ranks.on_first(self.store.newest))
        if state is None:
            return
        if state["result_hash"] != self.task.result_hash:
            raise ConfigError(
                f"{self.store.folder}: the checkpoints there were made with other settings: "
                "take another name with --run OTHER, or start over with --redo"
            )
        self.stepper.load_state_dict(state)
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        self.plateau.load_state_dict(state["plateau"])
        self.progress = Progress(**state["progress"])
        if state["world_size"] == self.ranks.world_size:
            torch.set_rng_state(state["rng"][self.ranks.rank])
            self._loss_sum.fill_(state["loss_sums"][self.ranks.rank])
        elif self.ranks.first:
            self._loss_sum.fill_(sum(state["loss_sums"]))
        if self.ranks.first:
            log.info(
                "resuming at epoch %d, batch %d of %d",
                self.progress.epoch + 1,
                self.progress.batch,
                self.steps_per_epoch,
            )
            warn_if_bits_may_differ(state["machine"], self.machine, state["world_size"], self.ranks.world_size)

    def _save(self) -> None:
        """Copy the state now and let a thread write it; collective, because every rank gives its random state."""
        self.task.stop.saved = self.task.stop.save
        own = self.ranks.gather((torch.get_rng_state(), float(self._loss_sum)))
        self._saved_at = time.monotonic()
        if not self.ranks.first:
            return
        state = self.stepper.state_dict() | {
            "average": self.average.state_dict() if self.average is not None else {},
            "plateau": self.plateau.state_dict(),
            "progress": asdict(self.progress),
            "rng": [rng for rng, _ in own or []],
            "loss_sums": [loss for _, loss in own or []],
            "world_size": self.ranks.world_size,
            "machine": self.machine,
            "result_hash": self.task.result_hash,
        }
        self.log.flush()  # what a resume from here will not write again
        self.store.save(f"{self._batches_done:010d}", state)

    def _weights_file(self, name: str, weights: dict[str, torch.Tensor]) -> Path:
        path = self.task.out / f"{name}.pt"
        self.task.check_attempt()
        meta = {
            "size": self.stage.size,
            "threshold": self.config.evaluate.threshold,
            "tta": self.config.evaluate.tta,
            "provenance": {
                "stage": self.task.stage,
                "fold": self.task.fold,
                "result_hash": self.task.result_hash,
                "weights": name,
                "step": self.stepper.steps,
            }
            | asdict(self.progress),
        }
        save_model(path, weights, meta)
        return path

    # --- the boundary between two steps ------------------------------------------------------------------------

    def _at_boundary(self) -> None:
        """Agree with the other ranks, then save, stop or give up together."""
        stop = self.task.stop
        due = self.ranks.first and time.monotonic() - self._saved_at >= self.config.train.save_every_s
        if due:
            self._saved_at = time.monotonic()  # wished once, done when it is agreed
        once = stop.save_due and not self._term_wished
        self._term_wished = self._term_wished or once
        agreed = self.boundary.exchange(
            Wishes(leave=stop.leave, save=int(due or once), failed=int(self.store.failed), bad_loss=int(self._bad_loss))
        )
        if agreed.failed:
            self.ranks.on_first(self.store.wait)  # rank 0's error stops all: training on unsaved would be lost work
        self._count_bad(bool(agreed.bad_loss))
        if agreed.leave:
            self._save_and_leave(agreed.leave)
        if agreed.save:
            asked = stop.save_due
            self._save()
            if asked:
                log.info(_GOING_ON, self._batches_done)

    def _save_and_leave(self, signum: int) -> None:
        self._save()
        self.ranks.on_first(self.store.wait)
        self.boundary.settle()
        self.log.close()
        log.info("state saved at epoch %d, batch %d", self.progress.epoch + 1, self.progress.batch)
        raise Stopped(signum)

    def _count_bad(self, bad: bool) -> None:
        self._bad_steps = self._bad_steps + 1 if bad else 0
        if not bad and not self._bad_loss:
            self._bad_films = []
        if self._bad_steps >= self.config.train.max_nonfinite:
            raise FloatingPointError(
                f"stage {self.task.stage}, epoch {self.progress.epoch + 1}, seen at batch {self.progress.batch}: the "
                f"loss was not finite {self._bad_steps} times in a row; this rank's films of "
                f"{' '.join(self._bad_films) or 'these steps: fine'}"
            )

    # --- epochs ------------------------------------------------------------------------------------------------

    def _batches(self) -> Iterator[Any]:
        """One loader over all epochs that are left: its workers start once."""
        share = self.stage.positive_share
        sampler = TrainBatches(
            len(self.train_cases),
            self.stage.batch_size,
            self.config.train.seed,
            self.stage.epochs,
            self.ranks.rank,
            self.ranks.world_size,
            start=(self.progress.epoch, self.progress.batch),
            labels=[case.label for case in self.train_cases] if share else None,
            shares=share or None,
        )
        dataset = FilmDataset(
            self.shards, self.stage.size, self.train_cases, Augmenter(self.config.augment, self.config.train.seed)
        )
        return iter(
            make_loader(
                dataset,
                sampler,
                self.config.train.workers,
                self.config.train.seed,
                self.stepper.device.type == "cuda",
                self.config.train.first_timeout_s,
            )
        )

    def _set_rates(self) -> None:
        """Lay out the learning rate of every step; anew when the plateau rule has lowered it."""
        rates = [
            learning_rate(step, self.total_steps, self.stage, self.swa, self.plateau.lr)
            for step in range(self.total_steps + 1)
        ]
        self.stepper.set_rates(rates)

    def train(self) -> None:
        """Run the epochs that are left."""
        self._epochs()
        self.boundary.settle()
        self.log.close()

    def _epochs(self) -> None:
        batches = self._batches() if self.progress.epoch < self.stage.epochs else iter(())
        first = True
        while self.progress.epoch < self.stage.epochs:
            begin, waited, seen = time.monotonic(), 0.0, 0
            while self.progress.batch < self.steps_per_epoch:
                asked = time.monotonic()
                images, masks, indices = next(batches)
                waited += time.monotonic() - asked
                result = self.stepper.step(images, masks)
                self._after_step(result, indices)
                seen += 1
                took = max(time.monotonic() - begin, 1e-9)
                rate = seen * self.stage.batch_size / took
                self.live.note(
                    epoch=self.progress.epoch + 1,
                    epochs=self.stage.epochs,
                    step=self._batches_done,  # the device is not asked
                    steps=self.total_steps,
                    images_per_s=rate,
                )
                if first:
                    ranks_module.shorten_timeout(self.ranks, self.config.train.timeout_s)
                    first = False
                faulthandler.dump_traceback_later(self.config.train.timeout_s / 2)
                if self._batches_done % self.config.train.log_every == 0:
                    self.board.step(self._batches_done, result, rate, waited / took)
                self._at_boundary()
            self._end_epoch(begin, waited, seen)
            self._loss_sum.zero_()

    def _after_step(self, result: StepResult, indices: torch.Tensor) -> None:
        """Count the step; nothing here waits for it, except where its weights enter the average."""
        self.progress.batch += 1
        self.progress.samples += self.stage.batch_size
        finite_loss = torch.isfinite(result.loss)
        self._loss_sum += torch.where(finite_loss, result.loss, 0.0)
        bad = ~finite_loss if self.stepper.scaler.is_enabled() else ~(finite_loss & result.finite)
        self._bad_loss, about = self._bad.exchange(bad, (self.progress.batch, indices))
        if self._bad_loss:
            batch, films = about
            self._bad_films = [f"batch {batch}:", *(self.train_cases[i].id for i in films.tolist())]
        if self.swa and self.average is not None:
            if swa_due(self._batches_done, self.total_steps, self.steps_per_epoch, self.swa) and bool(result.finite):
                self.average.update_parameters(self.stepper.model)  # a skipped step is not averaged

    def _end_epoch(self, begin: float, waited: float, seen: int) -> None:
        """Validate where it is due, let the plateau rule look, note the epoch, and go to the next one."""
        took = max(time.monotonic() - begin, 1e-9)
        number = self.progress.epoch + 1
        found: Validation | None = None
        if number % self.config.train.eval_every == 0 or number == self.stage.epochs:
            found = self._validated()
            if self.stage.schedule == "plateau":
                self.plateau.step(found.loss)
                self._set_rates()
        losses = self.ranks.gather(float(self._loss_sum) / self.steps_per_epoch)
        better = found is not None and found.dice > self.progress.best
        if found is not None and better:
            self.progress.best, self.progress.best_epoch = found.dice, number
        row: dict[str, Any] = {
            "epoch": number,
            "epochs": self.stage.epochs,
            "step": self.stepper.steps,
            "steps": self.total_steps,
            "lr": float(f"{float(self.stepper.rate):.7g}"),  # float32 on the device
            **history.speed(self.task.metrics, number, seen * self.stage.batch_size, took, waited),
            "train_loss": sum(losses or []),
            "best_dice": self.progress.best,
            "best_epoch": self.progress.best_epoch,
        } | (found.row() if found else {})
        self.ranks.on_first(lambda: self._note_epoch(row, found, better))
        self.progress.epoch, self.progress.batch = number, 0

    def _validated(self) -> Validation:
        """Validate; the end of an epoch is a step boundary too, where signals are obeyed at any film."""
        while (found := validate(self.task, self.stepper, self.validation_cases, self.shards, self.board.ids)) is None:
            leave = self.ranks.maximum([self.task.stop.leave])[0]
            if leave:
                self._save_and_leave(leave)
            self._save()
            log.info(_GOING_ON, self._batches_done)
        return found

    def _note_epoch(self, row: dict[str, Any], found: Validation | None, better: bool) -> None:
        """Rank 0: keep the best weights, and the epoch's numbers where displays and reports look for them."""
        if better:
            self._weights_file("best", self.stepper.model.state_dict())
        self.board.epoch(self._batches_done, row, found, ShardReader(self.shards, self.stage.size))
        history.append(self.task.metrics, row)
        log.info("%s", history.line(row))

    def finish(self) -> dict[str, Path]:
        """Write the weights that later stages start from."""
        return self.ranks.on_first(self._last_files) or {}

    def _last_files(self) -> dict[str, Path]:
        self.store.wait()
        last = self._weights_file("last", self.stepper.model.state_dict())
        outputs = {"best": self.task.out / "best.pt", "last": last}
        if self.average is not None:
            if not int(self.average.n_averaged):  # every step before an averaging point was skipped (fp16)
                self.average.update_parameters(self.stepper.model)
            outputs["swa"] = self._weights_file("swa", self.average.module.state_dict())
        return outputs


def run(task: Task) -> dict[str, Path]:
    """Train one stage of one fold; every rank calls it. Stacks are dumped when nothing moves for half a time-out."""
    faulthandler.dump_traceback_later(task.config.train.first_timeout_s / 2)
    try:
        trainer = Trainer(task)
        trainer.train()
        outputs = trainer.finish()
    finally:
        faulthandler.cancel_dump_traceback_later()
    if task.ranks.first:
        say_speed(task.stage, history.read(task.metrics))
    return outputs

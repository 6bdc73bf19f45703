"""A training stage: epochs of steps, validation, weight averaging, checkpoints, an orderly stop, an exact resume.

The result is a pure function of (settings, seed, step): a save, a validation or a stop at any step changes no bit of
it. Batch-norm buffers differ between ranks; only those of rank 0 are saved and evaluated, and training never reads
them.
"""

from __future__ import annotations

import faulthandler
import logging
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.optim.swa_utils import AveragedModel

from pneumo_dist.config import ConfigError
from pneumo_dist.data.shards import ShardReader
from pneumo_dist.model.modelfile import save_model
from pneumo_dist.model.start import start_model
from pneumo_dist.runtime import history
from pneumo_dist.runtime.processor import set_threads, warn_if_bits_may_differ
from pneumo_dist.runtime.runlog import RunLog
from pneumo_dist.runtime.stopping import Stopped
from pneumo_dist.runtime.task import Task
from pneumo_dist.scoring.alarm import collapse
from pneumo_dist.training.agreement import Agreement, NonFiniteLosses, Requests
from pneumo_dist.training.batches import StageFilms, check_batch
from pneumo_dist.training.checkpoint import CheckpointError, CheckpointStore
from pneumo_dist.training.events import TrainingEvents, log_throughput
from pneumo_dist.training.graph import StepGraph
from pneumo_dist.training.schedule import Plateau, learning_rate, swa_due
from pneumo_dist.training.step import Stepper, StepResult
from pneumo_dist.training.validation import Validation, validate

log = logging.getLogger(__name__)
_SAVED_ON_SIGTERM = "SIGTERM: state saved at batch %d; training continues until SLURM ends the job"


@dataclass
class TrainingState:
    """The position of a training and its best score; `batch` counts within the epoch."""

    epoch: int = 0
    batch: int = 0
    samples: int = 0
    best: float = -1.0
    best_epoch: int = -1


class Trainer:
    """One rank's part of a training stage."""

    def __init__(self, task: Task) -> None:
        """Build data, network and optimizer, then continue from the newest checkpoint if there is one."""
        config, ranks = task.config, task.ranks
        self.task, self.config, self.ranks = task, config, ranks
        self.stage = config.train_stage(task.stage)
        config.loss.check()
        check_batch(self.stage, task.stage, ranks)
        self.machine = set_threads(config.train)
        self.films = StageFilms(task)
        self.steps_per_epoch = self.films.steps_per_epoch
        self.total_steps = self.stage.epochs * self.steps_per_epoch
        self.stepper = Stepper(start_model(task), config, self.stage, ranks)
        self.swa = config.swa if config.averages(task.stage) else None
        self.average = AveragedModel(self.stepper.model) if self.swa else None
        self.plateau = Plateau(self.stage)
        self.state = TrainingState()
        self.agreement = Agreement(ranks)
        self.store = CheckpointStore(task.out / "checkpoints", config.train.keep, task.attempt)
        # This rank's share of the epoch's loss, summed in float64 on the device: reading it at every step would wait.
        self._loss_sum = torch.zeros((), dtype=torch.float64, device=self.stepper.device)
        self._resume()
        self._set_rates()
        self._step = StepGraph(self.stepper.step, ranks) if config.train.cuda_graph else self.stepper.step
        self.log = RunLog(task.out / "tensorboard", ranks.first, purge_step=self._batches_done + 1)
        self.live = history.Live(task.out, ranks.first)
        self.events = TrainingEvents(self.log, task, self.stepper, self.films.validation, self._batches_done)
        self._losses = NonFiniteLosses(config.train.max_nonfinite, self.films.training)
        self._saved_at = time.monotonic()
        self._starting = True  # until the first step of this attempt
        self._sigterm_requested = False  # the save on SIGTERM has been requested from all ranks

    # --- checkpoints -------------------------------------------------------------------------------------------

    @property
    def _batches_done(self) -> int:
        return self.state.epoch * self.steps_per_epoch + self.state.batch

    def _resume(self) -> None:
        """Load the newest checkpoint that rank 0 finds whole.

        Every rank reads the file: sending the state takes time that grows with the ranks, and memory several times.
        """
        newest = self.ranks.broadcast(self.ranks.on_first(self.store.newest))
        if newest is None:
            return
        state, problem = self.store.read(newest, checked=self.ranks.first)
        if problem := self.ranks.agree(problem):
            raise CheckpointError(problem)
        if state["result_hash"] != self.task.result_hash:
            raise ConfigError(
                f"{self.store.folder}: its checkpoints were written with other settings: "
                "take another name with --run OTHER, or start over with --redo"
            )
        self.stepper.load_state_dict(state)
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        self.plateau.load_state_dict(state["plateau"])
        self.state = TrainingState(**state["progress"])
        if state["world_size"] == self.ranks.world_size:
            torch.set_rng_state(state["rng"][self.ranks.rank])
            self._loss_sum.fill_(state["loss_sums"][self.ranks.rank])
        elif self.ranks.first:
            self._loss_sum.fill_(sum(state["loss_sums"]))
        if self.ranks.first:
            at = self.state
            log.info("resuming at epoch %d, batch %d of %d", at.epoch + 1, at.batch, self.steps_per_epoch)
            warn_if_bits_may_differ(state["machine"], self.machine, state["world_size"], self.ranks.world_size)

    def _save(self) -> None:
        """Copy the state now and let a thread write it; collective, because every rank gives its random state."""
        self.task.stop.saved = self.task.stop.save
        of_ranks = self.ranks.gather((torch.get_rng_state().numpy(), float(self._loss_sum)))
        self._saved_at = time.monotonic()
        if of_ranks is None:
            return
        state = self.stepper.state_dict() | {
            "average": self.average.state_dict() if self.average is not None else {},
            "plateau": self.plateau.state_dict(),
            "progress": asdict(self.state),
            "rng": [torch.from_numpy(rng) for rng, _ in of_ranks],
            "loss_sums": [loss for _, loss in of_ranks],
            "world_size": self.ranks.world_size,
            "machine": self.machine,
            "result_hash": self.task.result_hash,
        }
        self.log.flush()  # a resume from this checkpoint does not write the events before it again
        self.store.save(f"{self._batches_done:010d}", state)

    # --- the boundary between two steps ------------------------------------------------------------------------

    def _at_boundary(self) -> None:
        """Agree with the other ranks, then save, stop or give up together."""
        stop = self.task.stop
        due = self.ranks.first and time.monotonic() - self._saved_at >= self.config.train.save_every_s
        if due:
            self._saved_at = time.monotonic()  # request it once: it is agreed a step later
        on_sigterm = stop.save_due and not self._sigterm_requested
        self._sigterm_requested = self._sigterm_requested or on_sigterm
        agreed = self.agreement.exchange(
            Requests(
                leave=stop.leave,
                save=int(due or on_sigterm),
                failed=int(self.store.failed),
                bad_loss=int(self._losses.last),
            )
        )
        if agreed.failed:
            self.ranks.on_first(self.store.wait)  # raises on all ranks: steps that cannot be saved would be lost
        position = f"stage {self.task.stage}, epoch {self.state.epoch + 1}, seen at batch {self.state.batch}"
        self._losses.count(bool(agreed.bad_loss), position)
        if agreed.leave:
            self._save_and_leave(agreed.leave)
        if agreed.save:
            save_due = stop.save_due  # read before the save, which clears it
            self._save()
            if save_due:
                log.info(_SAVED_ON_SIGTERM, self._batches_done)

    def _save_and_leave(self, signum: int) -> None:
        self._save()
        self.ranks.on_first(self.store.wait)
        self.agreement.finish()
        self.log.close()
        log.info("state saved at epoch %d, batch %d", self.state.epoch + 1, self.state.batch)
        raise Stopped(signum)

    # --- steps and epochs --------------------------------------------------------------------------------------

    def _set_rates(self) -> None:
        """Set the learning rate of every step; again whenever the plateau rule has lowered it."""
        rates = [
            learning_rate(step, self.total_steps, self.stage, self.swa, self.plateau.lr)
            for step in range(self.total_steps + 1)
        ]
        self.stepper.set_rates(rates)

    def train(self) -> None:
        """Run the remaining epochs."""
        batches = self.films.batches(self.state.epoch, self.state.batch)
        while self.state.epoch < self.stage.epochs:
            throughput = history.Throughput()
            while self.state.batch < self.steps_per_epoch:
                batch, indices = throughput.next(batches)
                result = self._step(batch)
                throughput.add(self.stage.batch_size)
                self._after_step(result, indices)
                self._report_step(result, throughput)
                self._at_boundary()
            self._end_epoch(throughput.row(self.task.metrics, self.state.epoch + 1))
            self._loss_sum.zero_()
        self.agreement.finish()
        self.log.close()

    def _after_step(self, result: StepResult, indices: torch.Tensor) -> None:
        """Count the step without waiting for it, except where its weights enter the average."""
        self.state.batch += 1
        self.state.samples += self.stage.batch_size
        finite_loss = torch.isfinite(result.loss)
        self._loss_sum += torch.where(finite_loss, result.loss, 0.0)
        # Under a gradient scaler an infinite gradient is normal: it searches for the largest scale that fits.
        bad = ~finite_loss if self.stepper.scaler.is_enabled() else ~(finite_loss & result.finite)
        self._losses.note(bad, self.state.batch, indices)
        due = self.swa and swa_due(self._batches_done, self.total_steps, self.steps_per_epoch, self.swa)
        if self.average is not None and due and bool(result.finite):  # a skipped step is not averaged
            self.average.update_parameters(self.stepper.model)

    def _report_step(self, result: StepResult, throughput: history.Throughput) -> None:
        """Show the step where displays look for it, and give the next one its time-out."""
        images_per_s, wait_share = throughput.speed()
        self.live.note(
            epoch=self.state.epoch + 1,
            epochs=self.stage.epochs,
            step=self._batches_done,  # with skipped steps: their number is on the device, which would have to be read
            steps=self.total_steps,
            images_per_s=images_per_s,
        )
        if self._starting:
            self.ranks.set_timeout(self.config.train.timeout_s)
            self._starting = False
        faulthandler.dump_traceback_later(self.config.train.timeout_s / 2)
        if self._batches_done % self.config.train.log_every == 0:
            self.events.step(self._batches_done, result, images_per_s, wait_share)

    def _end_epoch(self, speed: dict[str, float]) -> None:
        """Validate if it is due, apply the plateau rule, record the epoch, and go to the next one."""
        number = self.state.epoch + 1
        validation: Validation | None = None
        if number % self.config.train.eval_every == 0 or number == self.stage.epochs:
            validation = self._validate()
            if self.stage.schedule == "plateau":
                self.plateau.step(validation.loss)
                self._set_rates()
        losses = self.ranks.gather(float(self._loss_sum) / self.steps_per_epoch)
        score = validation.selection(self.config.train.select) if validation is not None else -1.0
        better = score > self.state.best
        if better:
            self.state.best, self.state.best_epoch = score, number
        row: dict[str, Any] = {
            "epoch": number,
            "epochs": self.stage.epochs,
            "step": self.stepper.steps,
            "steps": self.total_steps,
            "lr": float(f"{float(self.stepper.rate):.7g}"),  # the digits of the float32 on the device
            **speed,
            "train_loss": sum(losses or []),
            "select": self.config.train.select,
            "best": self.state.best,
            "best_epoch": self.state.best_epoch,
        }
        if validation is not None:
            # The first epochs may predict nothing; training that works leaves that state in a quarter of its epochs.
            highest, threshold = validation.losses["highest_probability"], self.config.evaluate.threshold
            alarm = collapse(validation.scores, highest, threshold) if number > self.stage.epochs / 4 else ""
            row |= validation.row() | {"alarm": alarm}
        self.ranks.on_first(lambda: self._note_epoch(row, validation, better))
        self.state.epoch, self.state.batch = number, 0

    def _validate(self) -> Validation:
        """Validate; on a signal during it save, then leave or begin the validation again."""
        shown = self.events.film_ids
        while (
            validation := validate(self.task, self.stepper, self.films.validation, self.films.shard_dir, shown)
        ) is None:
            leave = self.ranks.maximum([self.task.stop.leave])[0]
            if leave:
                self._save_and_leave(leave)
            self._save()
            log.info(_SAVED_ON_SIGTERM, self._batches_done)
        return validation

    def _note_epoch(self, row: dict[str, Any], validation: Validation | None, better: bool) -> None:
        """Write the best weights and the epoch's numbers; on rank 0.

        metrics.jsonl comes last: its row says that the epoch's events are written.
        """
        if better:
            self._weights_file("best", self.stepper.model.state_dict())
        reader = ShardReader(self.films.shard_dir, self.stage.size)
        self.events.epoch(self._batches_done, row, validation, reader)
        history.append(self.task.metrics, row)
        log.info("%s", history.line(row))
        if row.get("alarm"):
            log.warning("%s", row["alarm"])

    # --- model files -------------------------------------------------------------------------------------------

    def _weights_file(self, name: str, weights: dict[str, torch.Tensor]) -> Path:
        path = self.task.out / f"{name}.pt"
        self.task.check_attempt()
        provenance = {
            "stage": self.task.stage,
            "fold": self.task.fold,
            "result_hash": self.task.result_hash,
            "weights": name,
            "step": self.stepper.steps,
        }
        meta = {
            "size": self.stage.size,
            "threshold": self.config.evaluate.threshold,
            "tta": self.config.evaluate.tta,
            "provenance": provenance | asdict(self.state),
        }
        save_model(path, weights, meta)
        return path

    def finish(self) -> dict[str, Path]:
        """Write the weights that later stages start from."""
        return self.ranks.on_first(self._last_files) or {}

    def _last_files(self) -> dict[str, Path]:
        self.store.wait()
        last = self._weights_file("last", self.stepper.model.state_dict())
        outputs = {"best": self.task.out / "best.pt", "last": last}
        if self.average is not None:
            if not int(self.average.n_averaged):  # fp16: every step before an averaging point was skipped
                self.average.update_parameters(self.stepper.model)
            outputs["swa"] = self._weights_file("swa", self.average.module.state_dict())
        return outputs


def run(task: Task) -> dict[str, Path]:
    """Train one stage of one fold; every rank calls it. Without a step for half a time-out the stacks are printed."""
    faulthandler.dump_traceback_later(task.config.train.first_timeout_s / 2)
    try:
        trainer = Trainer(task)
        trainer.train()
        outputs = trainer.finish()
    finally:
        faulthandler.cancel_dump_traceback_later()
    if task.ranks.first:
        log_throughput(task.stage, history.read(task.metrics))
    return outputs

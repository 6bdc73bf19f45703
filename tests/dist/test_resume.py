"""Interrupted equals uninterrupted: the same bits for any number of stops at any step."""

import functools
import signal

import pytest
import torch
from torch.optim.swa_utils import AveragedModel

from pneumo_dist import config as configuration
from pneumo_dist import stages
from pneumo_dist.config import ConfigError
from pneumo_dist.model.resnet import ResNet34Encoder
from pneumo_dist.model.unet import ResNet34UNet
from pneumo_dist.runtime.stopping import Stopped, StopSignal
from pneumo_dist.training import trainer
from pneumo_dist.training.checkpoint import CheckpointStore
from pneumo_dist.training.step import Stepper
from pneumo_dist.training.trainer import Trainer
from tests.dist import small_run
from tests.fake_cuda import cuda_on_cpu


@pytest.fixture(scope="module", autouse=True)
def thin_network():
    channels, widths = ResNet34Encoder.channels, ResNet34UNet.widths
    small_run.thin()
    yield
    ResNet34Encoder.channels, ResNet34UNet.widths = channels, widths


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    return small_run.prepare(tmp_path_factory.mktemp("prepared"))


@pytest.fixture(scope="module")
def undisturbed(prepared, tmp_path_factory):
    run_dir = small_run.copy_of(prepared, tmp_path_factory.mktemp("undisturbed"))
    stages.run_stage("1", run_dir, fold=0)
    return run_dir


def change(run_dir, *words):
    config = configuration.load(run_dir / "config.yaml", list(words))
    (run_dir / "config.yaml").write_text(configuration.to_yaml(config))


class StopAt:
    """Ask to leave after given steps of successive attempts; "e3" means during the validation of epoch 3."""

    def __init__(self, monkeypatch, run_dir, points, stage="1"):
        self.run_dir, self.points, self.stage = run_dir, list(points), stage
        self.stop, self.steps = StopSignal(), 0
        step, validate = Stepper.step, trainer.validate

        def counted(stepper, *arguments):
            result = step(stepper, *arguments)
            self.steps += 1
            if self.points and self.points[0] == self.steps:
                self.stop.leave = signal.SIGUSR2
            return result

        def watched(task, *arguments):
            if self.points and self.points[0] == f"e{self.steps // 2}":
                self.stop.leave = signal.SIGTERM
            return validate(task, *arguments)

        monkeypatch.setattr(Stepper, "step", counted)
        monkeypatch.setattr(trainer, "validate", watched)

    def run(self):
        while self.points:
            with pytest.raises(Stopped):
                stages.run_stage(self.stage, self.run_dir, fold=0, stop=self.stop)
            self.points.pop(0)
            self.stop = StopSignal()
        stages.run_stage(self.stage, self.run_dir, fold=0)
        return self.steps


@pytest.mark.parametrize("points", [[1], [2, 4], ["e1", 3, "e2", 7], [8], ["e4"]])
def test_weights_and_scores_do_not_depend_on_stops(prepared, undisturbed, tmp_path, monkeypatch, points):
    run_dir = small_run.copy_of(prepared, tmp_path)
    steps = StopAt(monkeypatch, run_dir, points).run()
    assert steps == 8  # no step was done twice: an orderly stop loses nothing
    assert small_run.fingerprint(run_dir) == small_run.fingerprint(undisturbed)


def test_slurms_sigterm_during_a_validation_saves_before_the_last_film_and_continues(
    prepared, undisturbed, tmp_path, monkeypatch
):
    run_dir = small_run.copy_of(prepared, tmp_path)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    stop, found = StopSignal(), []
    validate, save = trainer.validate, CheckpointStore.save

    def watched(task, *arguments):
        if not found:
            stop.note(signal.SIGTERM)
        found.append(validate(task, *arguments))
        return found[-1]

    def noted(store, name, state):
        found.append(name)
        save(store, name, state)

    monkeypatch.setattr(trainer, "validate", watched)
    monkeypatch.setattr(CheckpointStore, "save", noted)
    stages.run_stage("1", run_dir, fold=0, stop=stop)
    assert found[:2] == [None, "0000000002"] and None not in found[2:] and len(found) == 6
    assert small_run.fingerprint(run_dir) == small_run.fingerprint(undisturbed)


def test_the_plateau_rule_continues_from_its_state(prepared, tmp_path, monkeypatch):
    found = []
    for name, points in (("calm", []), ("stopped", [3, "e2", 5])):
        run_dir = small_run.copy_of(prepared, tmp_path / name)
        settings = ["stage1.schedule=plateau", "stage1.plateau_patience=1", "stage1.lr=0.5"]  # too high: the loss rises
        change(run_dir, *settings, "loss.dice_over=batch")
        StopAt(monkeypatch, run_dir, points).run()
        monkeypatch.undo()
        found.append(small_run.fingerprint(run_dir))
    rates = [epoch["lr"] for epoch in found[0]["epochs"]]
    assert found[0] == found[1] and rates[-1] < rates[0]


def test_stage_2_and_the_batch_norm_job_continue_with_the_same_bits(undisturbed, tmp_path, monkeypatch):
    found = []
    for name, points in (("calm", []), ("stopped", [2, 5])):
        run_dir = small_run.copy_of(undisturbed, tmp_path / name)
        StopAt(monkeypatch, run_dir, points, "2").run()
        monkeypatch.undo()
        if points:
            stop = StopSignal()
            stop.note(signal.SIGUSR2)  # between two batches: the next attempt measures again from the start
            with pytest.raises(Stopped):
                stages.run_stage("swa", run_dir, fold=0, stop=stop)
            assert not (run_dir / "fold0" / "swa" / "model.pt").exists()
        stages.run_stage("swa", run_dir, fold=0)
        found.append((small_run.fingerprint(run_dir, "2"), small_run.weights(run_dir / "fold0" / "swa" / "model.pt")))
    assert found[0] == found[1]


def test_a_crash_repeats_from_the_last_save_and_ends_the_same(prepared, undisturbed, tmp_path, monkeypatch):
    run_dir = small_run.copy_of(prepared, tmp_path)
    config = (run_dir / "config.yaml").read_text().replace("save_every_s: 1000000.0", "save_every_s: 0.0")
    (run_dir / "config.yaml").write_text(config)  # a save at every step
    step, done = Stepper.step, []

    def crashing(stepper, *arguments):
        if len(done) == 5:
            raise MemoryError("simulated crash")
        done.append(1)
        return step(stepper, *arguments)

    monkeypatch.setattr(Stepper, "step", crashing)
    with pytest.raises(MemoryError):
        stages.run_stage("1", run_dir, fold=0)
    monkeypatch.setattr(Stepper, "step", step)
    newest = sorted((run_dir / "fold0" / "stage1" / "checkpoints").glob("*.pt"))[-1]
    newest.write_bytes(newest.read_bytes()[:1000])  # and the newest checkpoint was cut off
    stages.run_stage("1", run_dir, fold=0)
    assert small_run.fingerprint(run_dir) == small_run.fingerprint(undisturbed)


def test_a_finished_stage_returns_at_once_and_other_settings_are_refused(undisturbed, monkeypatch):
    monkeypatch.setattr(trainer.Trainer, "train", lambda self: pytest.fail("trained again"))
    stages.run_stage("1", undisturbed, fold=0)
    path = undisturbed / "config.yaml"
    before = path.read_text()
    path.write_text(before.replace("clip_norm: 0.0", "clip_norm: 1.0"))
    try:
        with pytest.raises(ConfigError, match=r"train\.clip_norm.*--run OTHER.*--redo"):
            stages.run_stage("1", undisturbed, fold=0)
    finally:
        path.write_text(before)


def test_stage_2_starts_from_the_best_weights_of_stage_1(undisturbed, monkeypatch):
    seen = []

    def look(stepper, *_):
        seen.append({k: v.clone() for k, v in stepper.model.state_dict().items()})
        raise KeyboardInterrupt

    monkeypatch.setattr(Stepper, "step", look)
    with pytest.raises(KeyboardInterrupt):
        stages.run_stage("2", undisturbed, fold=0)
    best = torch.load(undisturbed / "fold0" / "stage1" / "best.pt", weights_only=True)["model"]
    assert all(torch.equal(seen[0][key], best[key]) for key in best)


def test_float16_on_a_device_counts_no_skipped_step_and_neither_stops_nor_a_graph_change_a_bit(prepared, tmp_path, monkeypatch):
    """In real numbers: the scale overflows in steps 2 and 6, so both are skipped; the average begins with step 4."""
    after, average, finite, averaged, stops = Trainer._after_step, AveragedModel.update_parameters, [], [], []

    def watched(training, result, indices):
        finite.append(bool(result.finite))
        after(training, result, indices)
        training.stepper.scaler._scale.fill_(2.0**60 if len(finite) in (1, 5) else 16.0)  # of the next step
        if len(finite) in stops:
            training.task.stop.leave = signal.SIGUSR2

    monkeypatch.setattr(Trainer, "_after_step", watched)
    monkeypatch.setattr(AveragedModel, "update_parameters", lambda *args: (averaged.append(len(finite)), average(*args)))
    monkeypatch.setattr(torch.amp, "GradScaler", functools.partial(torch.amp.GradScaler, init_scale=16.0))
    found = []
    for graph, points in ((False, []), (True, [5])):  # a graph starts with the fourth step after a start or resume
        stops[:] = points
        finite.clear()
        averaged.clear()
        run_dir = small_run.copy_of(prepared, tmp_path / f"{len(found)}")
        config = configuration.load(run_dir / "config.yaml", ["train.amp=fp16", f"train.cuda_graph={graph}"])
        (run_dir / "config.yaml").write_text(configuration.to_yaml(config))
        with cuda_on_cpu():
            for _ in points:
                with pytest.raises(Stopped):
                    stages.run_stage("1", run_dir, fold=0, stop=StopSignal())
            stages.run_stage("1", run_dir, fold=0)
        assert finite == [True, False, True, True, True, False, True, True]
        assert averaged == [4, 5, 7, 8]
        found.append(small_run.fingerprint(run_dir))
    assert found[0] == found[1] and found[0]["epochs"][-1]["step"] == 6

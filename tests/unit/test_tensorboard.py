"""TensorBoard shows every step once, also over interruptions; it names no patient and changes no bit of a training."""

import json
import re
import signal
import time
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout
from tensorboard.plugins.hparams import metadata as hparams_metadata

from pneumo_dist import stages
from pneumo_dist.config import load
from pneumo_dist.data.cases import Case, read_cases
from pneumo_dist.data.films.rle import encode_rle
from pneumo_dist.data.lists import read_patient_map
from pneumo_dist.data.loaders import fold_cases
from pneumo_dist.model.resnet import ResNet34Encoder
from pneumo_dist.model.unet import ResNet34UNet
from pneumo_dist.reports import tensorboard
from pneumo_dist.runtime import history
from pneumo_dist.runtime.runlog import RunLog
from pneumo_dist.runtime.stopping import Stopped, StopSignal
from pneumo_dist.training import trainer
from pneumo_dist.training.events import TrainingEvents, log_throughput
from pneumo_dist.training.step import Stepper, StepResult
from tests.dist import small_run

WORDS = ("stages=1,swa", "stage1.epochs=3", "train.log_every=1", "evaluate.threshold=0.5")
STEPS, EPOCH_ENDS = list(range(1, 7)), [2, 4, 6]  # 10 training films in batches of 4
STEP_TAGS = {"loss/step", "loss/step_bce", "loss/step_dice", "loss/step_image", "train/lr", "train/grad_norm",
             "speed/images_per_s", "speed/wait_share"}  # fmt: skip
SCORE_TAGS = {f"evaluation/{name}" for name in tensorboard.SCORES}
VALIDATION_TAGS = {f"loss/validation{name}" for name in ("", "_bce", "_dice", "_image", "_positive", "_negative",
                                                         "_above_empty")}  # fmt: skip
EPOCH_TAGS = {"loss/train", "evaluation/best", "evaluation/called_empty", "evaluation/highest_probability",
              "threshold/fixed", "speed/epoch_images_per_s", "speed/epoch_wait_share"} | SCORE_TAGS | VALIDATION_TAGS  # fmt: skip


def events(folder):
    """All events of a folder, read by TensorBoard's own Python reader without sampling."""
    return EventAccumulator(
        str(folder / "tensorboard"), size_guidance={"scalars": 0, "images": 0, "tensors": 0}
    ).Reload()


def points(accumulator, tag):
    return {e.step: e.value for e in accumulator.Scalars(tag)}


def stop_at(monkeypatch, run_dir, step):
    """Train until the given step and leave in good order."""
    stop, original, done = StopSignal(), Stepper.step, []

    def counted(stepper, *arguments):
        result = original(stepper, *arguments)
        done.append(1)
        if len(done) == step:
            stop.leave = signal.SIGUSR2
        return result

    with monkeypatch.context() as patch:
        patch.setattr(Stepper, "step", counted)
        with pytest.raises(Stopped):
            stages.run_stage("1", run_dir, fold=0, stop=stop)


@pytest.fixture(scope="module", autouse=True)
def thin_network():
    channels, widths = ResNet34Encoder.channels, ResNet34UNet.widths
    small_run.thin()
    yield
    ResNet34Encoder.channels, ResNet34UNet.widths = channels, widths


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    return small_run.prepare(tmp_path_factory.mktemp("prepared"), *WORDS)


@pytest.fixture(scope="module")
def run_dir(prepared, tmp_path_factory):
    """A run that was stopped after the third of six steps, went on, and was evaluated."""
    run_dir = small_run.copy_of(prepared, tmp_path_factory.mktemp("stopped"))
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, run_dir, 3)
    for stage in ("1", "swa", "evaluate"):
        stages.run_stage(stage, run_dir, fold=0)
    return run_dir


@pytest.fixture(scope="module")
def trained(run_dir):
    return events(run_dir / "fold0" / "stage1")


@pytest.fixture(scope="module")
def evaluated(run_dir):
    return events(run_dir / "fold0" / "evaluate")


def test_every_step_and_epoch_is_shown_once_over_an_interruption(trained):
    assert set(trained.Tags()["scalars"]) == STEP_TAGS | EPOCH_TAGS | {"run/attempt"}
    for tag in STEP_TAGS:
        assert [e.step for e in trained.Scalars(tag)] == STEPS, tag
    for tag in EPOCH_TAGS:
        assert [e.step for e in trained.Scalars(tag)] == EPOCH_ENDS, tag


def test_a_restart_is_visible(trained):
    assert [(e.step, e.value) for e in trained.Scalars("run/attempt")] == [
        (0, 1), (1, 1), (2, 1), (3, 1), (3, 2), (4, 2), (5, 2), (6, 2),
    ]  # fmt: skip
    texts = [t.tensor_proto.string_val[0].decode() for t in trained.Tensors("run/attempts/text_summary")]
    assert [text[:26] for text in texts] == ["attempt 1 from batch 0 on,", "attempt 2 from batch 3 on,"]


def test_the_values_are_those_of_the_training(run_dir, trained):
    config = load(run_dir / "config.yaml")
    rows = history.read(run_dir / "fold0" / "stage1" / "metrics.jsonl")
    assert [row["epoch"] for row in rows] == [1, 2, 3]
    for i, row in enumerate(rows):
        shown = {name: row[name] for name in (*tensorboard.SCORES, "best", "called_empty", "highest_probability")}
        for name, value in shown.items():
            assert points(trained, f"evaluation/{name}")[EPOCH_ENDS[i]] == pytest.approx(value), name
        terms = ("bce", "dice", "image", "positive", "negative", "above_empty")
        tags = {"train": "train_loss", "validation": "loss"} | {f"validation_{name}": f"loss_{name}" for name in terms}
        for tag, name in tags.items():
            assert points(trained, f"loss/{tag}")[EPOCH_ENDS[i]] == pytest.approx(row[name])
        assert row["loss"] == pytest.approx(row["loss_bce"] + row["loss_dice"] + 0.5 * row["loss_image"])
        assert bool(row["alarm"]) == (row["dice_positive"] < 0.05)
        # One rank and every step shown: the epoch's loss is the mean of its steps'.
        steps = [points(trained, "loss/step")[EPOCH_ENDS[i] - k] for k in (0, 1)]
        assert np.mean(steps) == pytest.approx(row["train_loss"])
    loss, bce, dice, image = (points(trained, f"loss/step{name}") for name in ("", "_bce", "_dice", "_image"))
    assert all(loss[s] == pytest.approx(bce[s] + dice[s] + 0.5 * image[s]) for s in STEPS)
    # A batch without a positive film has no Dice term.
    assert all(bce[s] > 0.1 and 0 <= dice[s] < 1 and image[s] > 0.1 for s in STEPS) and max(dice.values()) > 0.1
    rates = points(trained, "train/lr")
    assert rates[1] == pytest.approx(config.stage1.lr) and rates == dict(sorted(rates.items(), key=lambda r: -r[1]))
    assert all(
        value > 0 for tag in ("train/grad_norm", "speed/images_per_s") for value in points(trained, tag).values()
    )
    assert all(0 <= share <= 1 for share in points(trained, "speed/wait_share").values())
    assert set(points(trained, "threshold/fixed").values()) == {0.5}


def test_the_same_films_are_drawn_at_every_epoch_and_at_the_end(run_dir, trained, evaluated):
    _, cases = fold_cases(read_cases(run_dir / "shards"), 0)
    chosen = tensorboard.fixed_films(cases)
    assert {"overlay/mask_1_largest", "overlay/mask_3_median", "overlay/no_mask_1"} <= set(chosen)
    assert set(trained.Tags()["images"]) == set(chosen)
    assert {tag for tag in evaluated.Tags()["images"] if not tag.startswith("worst/")} == set(chosen)
    for tag, case in chosen.items():
        assert [e.step for e in trained.Images(tag)] == EPOCH_ENDS
        shown = trained.Images(tag)[-1]
        picture = cv2.imdecode(np.frombuffer(shown.encoded_image_string, np.uint8), cv2.IMREAD_COLOR)
        assert picture.shape[:2] == (shown.height, shown.width)
        film, truth, _ = np.split(picture[-tensorboard.PANEL_PX :].astype(int), 3, axis=1)
        assert np.abs(film - film[:, :, :1]).max() < 40  # grey: no contour on the film itself (JPEG blurs colours)
        coloured = np.abs(truth - truth[:, :, :1]).max() > 60
        assert coloured == bool(case.label)
    sizes = [len(e.encoded_image_string) for tag in chosen for e in trained.Images(tag)]
    assert max(sizes) < 40_000


def test_the_ranking_of_the_films_is_a_precision_recall_curve(trained, evaluated):
    for accumulator, steps in ((trained, EPOCH_ENDS), (evaluated, [0])):
        curves = accumulator.Tensors("films by highest score")
        assert [c.step for c in curves] == steps
        curve = np.array(
            curves[-1].tensor_proto.float_val or np.frombuffer(curves[-1].tensor_proto.tensor_content, np.float32)
        )
        true_positives, false_positives = curve.reshape(6, -1)[:2]
        assert (true_positives[0], false_positives[0]) == (4, 6)  # at threshold 0 every validation film is positive


def test_no_patient_is_named(run_dir):
    keys = {str(key) for key in read_patient_map(run_dir / "phantom" / "patients.csv").values()}
    written = b"".join(path.read_bytes() for path in run_dir.glob("fold0/*/tensorboard/events.*"))
    assert keys and not [key for key in keys if re.search(rb"\b%s\b" % re.escape(key.encode()), written)]


def test_settings_stand_beside_the_last_scores(trained, evaluated):
    for accumulator, stage in ((trained, "1"), (evaluated, "evaluate")):
        content = accumulator.SummaryMetadata(hparams_metadata.SESSION_START_INFO_TAG).plugin_data.content
        values = hparams_metadata.parse_session_start_info_plugin_data(content).hparams
        assert values["stage"].string_value == stage and values["fold"].string_value == "0"
        assert values["stage1.epochs"].number_value == 3 and values["stages"].string_value == "1,swa"
        assert not [key for key in values if "path" in key or "dir" in key or "weights" in key]


def test_the_configuration_is_there_as_text(run_dir, trained):
    text = trained.Tensors("run/config/text_summary")[0].tensor_proto.string_val[0].decode()
    (run_dir / "shown.yaml").write_text(text.removeprefix("```yaml\n").removesuffix("```"))
    assert load(run_dir / "shown.yaml") == load(run_dir / "config.yaml")


def test_every_chart_of_the_first_page_has_something_to_show(trained):
    layout = Layout.FromString(trained.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0])
    charts = [chart for category in layout.category for chart in category.chart]
    assert len(charts) >= 8
    for chart in charts:
        for pattern in chart.multiline.tag:
            assert any(re.match(pattern, tag) for tag in trained.Tags()["scalars"]), (chart.title, pattern)
    more = tensorboard.layout(cuda=True, scaled=True)["Throughput and stability"].values()
    assert ["speed/gpu_memory_mib"] in more and ["train/amp_scale"] in more


def test_the_evaluation_shows_what_scores_json_says(run_dir, evaluated):
    scores = json.loads((run_dir / "fold0" / "evaluate" / "scores.json").read_text())
    learned = json.loads((run_dir / "fold0" / "evaluate" / "thresholds.json").read_text())["triplet"]
    tags = {tag: points(evaluated, tag)[0] for tag in evaluated.Tags()["scalars"]}
    for name in tensorboard.SCORES:
        assert tags[f"evaluation/{name}"] == pytest.approx(scores["headline"]["fixed"][name])
    assert tags["rule/cross_fitted/dice"] == pytest.approx(scores["headline"]["cross_fitted"]["dice"])
    assert tags["rule/in_sample_optimistic/dice"] == pytest.approx(scores["optimistic"]["in_sample_triplet"]["dice"])
    assert tags["threshold/fixed"] == 0.5 and tags["threshold/tuned_min_area"] == learned["min_area"]
    assert "fixed threshold 0.5" in evaluated.Tensors("summary/text_summary")[0].tensor_proto.string_val[0].decode()


def test_a_lost_attempt_leaves_nothing_twice_and_no_gap(prepared, tmp_path, monkeypatch):
    """Lost after an epoch's end was shown, with the last checkpoint before it, and again with a later epoch lost."""
    run_dir = small_run.copy_of(prepared, tmp_path)
    config = (run_dir / "config.yaml").read_text().replace("save_every_s: 1000000.0", "save_every_s: 0.0")
    (run_dir / "config.yaml").write_text(config)  # a save at every step
    out = run_dir / "fold0" / "stage1"

    def lost(after):
        epochs = []

        def note(self, row, validation, better):
            original(self, row, validation, better)
            epochs.append(row["epoch"])
            if len(epochs) == after:
                self.store.wait()
                raise MemoryError("as if the machine had gone")

        original = trainer.Trainer._note_epoch
        with monkeypatch.context() as patch:
            patch.setattr(trainer.Trainer, "_note_epoch", note)
            with pytest.raises(MemoryError):
                stages.run_stage("1", run_dir, fold=0)

    lost(after=1)
    time.sleep(1.1)  # TensorBoard orders event files by the second in their names
    lost(after=2)
    time.sleep(1.1)
    newest = sorted((out / "checkpoints").glob("*.pt"))[-1]
    newest.write_bytes(b"cut off")  # the one before it is taken: a step and an epoch's end are done again
    stages.run_stage("1", run_dir, fold=0)
    found = events(out)
    for tags, steps in ((STEP_TAGS, STEPS), (EPOCH_TAGS, EPOCH_ENDS)):
        for tag in tags:
            assert [e.step for e in found.Scalars(tag)] == steps, tag
    assert max(points(found, "run/attempt").values()) == 3


def test_the_events_change_no_bit_of_the_training(prepared, run_dir, tmp_path, monkeypatch):
    silent = small_run.copy_of(prepared, tmp_path)
    monkeypatch.setattr(TrainingEvents, "step", lambda *_: None)
    monkeypatch.setattr(TrainingEvents, "epoch", lambda *_: None)
    stages.run_stage("1", silent, fold=0)
    assert small_run.fingerprint(silent) == small_run.fingerprint(run_dir)


def test_a_steps_loss_is_the_mean_of_rank_0s_own_films():
    shown = {}
    ranks = SimpleNamespace(first=True, world_size=4)
    mute = SimpleNamespace(attempt=1, scalars=lambda step, values: shown.update(values))
    stepper = SimpleNamespace(
        scaler=SimpleNamespace(is_enabled=lambda: True, get_scale=lambda: 512.0), device=torch.device("cpu")
    )
    training_events = TrainingEvents.__new__(TrainingEvents)
    training_events.log, training_events.stepper = mute, stepper
    training_events.task, training_events.stage = SimpleNamespace(ranks=ranks), SimpleNamespace(batch_size=14)
    loss, bce, dice, image, norm = torch.tensor([6.5 / 14, 4 / 14, 2 / 14, 1 / 14, 3.0])
    result = StepResult(loss, bce, dice, image, norm, finite=torch.tensor(True), rate=torch.tensor([0.1]))
    training_events.step(7, result, 10.0, 0.5)  # 14 films on 4 ranks: 4 of them on rank 0, with a loss of 1.625 each
    assert shown["loss/step"] == pytest.approx(1.625)
    assert shown["loss/step_bce"] == pytest.approx(1.0) and shown["loss/step_dice"] == pytest.approx(0.5)
    assert shown["loss/step_image"] == pytest.approx(0.25)
    assert shown["train/lr"] == pytest.approx(0.1) and shown["train/grad_norm"] == 3.0
    assert shown["train/amp_scale"] == 512.0 and "speed/gpu_memory_mib" not in shown


def film(name, area):
    mask = np.zeros((32, 32), bool)
    mask.ravel()[:area] = True
    return Case(name, 0, 0, 32, 32, int(area > 0), 0, 0, "", "", encode_rle(mask) if area else "-1")


def test_fixed_films_are_large_median_small_and_empty_ones():
    cases = [film("a", 0), film("b", 5), film("c", 300), film("d", 0), film("e", 40), film("f", 100), film("g", 7)]
    chosen = {tag.removeprefix("overlay/"): case.id for tag, case in tensorboard.fixed_films(cases).items()}
    assert chosen == {"mask_1_largest": "c", "mask_2_second": "f", "mask_3_median": "e", "mask_4_smallest": "b",
                      "no_mask_1": "a", "no_mask_2": "d"}  # fmt: skip
    assert tensorboard.fixed_films(cases[::-1]) == tensorboard.fixed_films(cases)
    for few in ([], [film("a", 0)], [film("b", 5)], [film("b", 5), film("c", 9)], [film("a", 0), film("b", 5)]):
        assert sorted(case.id for case in tensorboard.fixed_films(few).values()) == [case.id for case in few]


def test_other_ranks_write_nothing(tmp_path):
    log = RunLog(tmp_path / "tensorboard", first=False)
    log.scalars(1, {"a": 1.0})
    log.text("b", "c")
    log.image("d", b"", (1, 1), 0)
    log.hparams({"e": 1})
    log.layout({})
    log.pr_curve("g", np.ones(1, bool), np.ones(1), 0)
    log.flush()
    log.close()
    assert not (tmp_path / "tensorboard").exists()


def test_the_share_of_waiting_counts_time_not_epochs(caplog):
    caplog.set_level("INFO")
    log_throughput("1", [{"images_per_s": 10.0, "wait_share": 0.0}, {"images_per_s": 30.0, "wait_share": 0.4}])
    assert "stage 1: 15.0 images/s, 10.0 % of the time waiting" in caplog.text
    log_throughput("1", [])

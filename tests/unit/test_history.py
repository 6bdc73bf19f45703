"""The rows of `metrics.jsonl`: one an epoch, whatever was killed and repeated."""

from pathlib import Path

from pneumo_dist.runtime import history


def test_an_epoch_that_a_resumed_attempt_repeats_replaces_its_row_and_those_after_it(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    for epoch in (1, 2, 3):
        history.append(path, {"epoch": epoch, "attempt": 1})
    history.append(path, {"epoch": 2, "attempt": 2})
    assert history.read(path) == [{"epoch": 1, "attempt": 1}, {"epoch": 2, "attempt": 2}]


def test_an_epoch_without_remaining_images_keeps_the_speed_that_was_noted(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    history.append(path, {"epoch": 1, "images_per_s": 12.5, "wait_share": 0.25})
    throughput = history.Throughput()
    assert throughput.row(path, 1) == {"images_per_s": 12.5, "wait_share": 0.25}
    assert throughput.row(path, 2) == {"images_per_s": 0.0, "wait_share": 0.0}
    assert throughput.next(iter([7])) == 7
    throughput.add(4)
    row = throughput.row(path, 1)
    assert row["images_per_s"] > 12.5 and 0 <= row["wait_share"] <= 1


def test_the_line_of_a_validated_epoch_tells_a_collapse_from_learning() -> None:
    row = {"epoch": 2, "epochs": 9, "train_loss": 0.5, "images_per_s": 12.0, "wait_share": 0.25}
    assert history.line(row) == "epoch 2/9  loss 0.5000  12.0 images/s, 25 % waiting"
    losses = {"loss": 1.25, "loss_positive": 1.5, "loss_negative": 0.0625, "loss_above_empty": 0.25}
    scores = {"dice": 0.75, "dice_positive": 0.125, "auc": None, "called_empty": 0.875, "highest_probability": 0.375}
    assert history.line(row | losses | scores) == (
        "epoch 2/9  loss 0.5000  validation: loss 1.2500 (positive 1.5000, negative 0.0625, "
        "above an empty answer 0.2500), Dice 0.7500, on positives 0.1250, 88 % called empty, highest probability 0.38  "
        "12.0 images/s, 25 % waiting"
    )

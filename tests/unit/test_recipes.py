"""The recipes in configs/ against the papers' table, read through the real loader."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from pneumo_dist.config import Config, ConfigError, TrainStage, load

CONFIGS = Path(__file__).parents[2] / "configs"


def numbers(stage: TrainStage) -> tuple[int, int, int, float]:
    return stage.size, stage.epochs, stage.batch_size, stage.lr


def test_paper_is_256_for_100_epochs_then_512_for_70_cosine_then_swa() -> None:
    config = load(CONFIGS / "paper.yaml")
    assert config.stages == ["1", "2", "swa"]
    assert numbers(config.stage1) == (256, 100, 64, 1e-3)
    assert numbers(config.stage2) == (512, 70, 16, 1e-3)
    assert config.stage1.schedule == config.stage2.schedule == "cosine"
    assert config.model.pretrained == "imagenet" and config.evaluate.tta == "hflip"
    assert config.stage2.init_from is None  # this run's stage 1


def test_paper_spells_out_the_defaults() -> None:
    assert load(CONFIGS / "paper.yaml") == load() == Config()


def test_exp1_is_one_stage_with_plateau_and_threshold_one_half() -> None:
    config = load(CONFIGS / "exp1.yaml")
    assert config.stages == ["1"]
    stage = config.stage1
    assert (stage.schedule, stage.plateau_factor, stage.plateau_patience, stage.lr) == ("plateau", 0.2, 5, 1e-3)
    assert config.evaluate.threshold == 0.5
    assert config.model.pretrained == "imagenet"


def test_exp2_is_256_for_35_epochs_of_batch_40_and_has_no_stage_2() -> None:
    config = load(CONFIGS / "exp2.yaml")
    assert config.stages == ["1"]
    assert numbers(config.stage1) == (256, 35, 40, 1e-3)
    assert config.evaluate.threshold == 0.55
    assert config.model.pretrained == "imagenet"


def test_exp3_is_512_for_10_epochs_of_batch_14_from_given_weights() -> None:
    with pytest.raises(ConfigError, match=r"no stage 1: give its initial weights, stage2.init_from=PATH"):
        load(CONFIGS / "exp3.yaml")
    config = load(CONFIGS / "exp3.yaml", ["stage2.init_from=runs/exp2"])
    assert config.stages == ["2"] and config.sizes == [512]
    assert numbers(config.stage2) == (512, 10, 14, 1e-3)
    assert config.evaluate.threshold == 0.55


def test_exp4_is_256_for_60_epochs_then_512_for_29() -> None:
    config = load(CONFIGS / "exp4.yaml")
    assert config.stages == ["1", "2"]
    assert numbers(config.stage1) == (256, 60, 40, 1e-3)
    assert numbers(config.stage2) == (512, 29, 14, 1e-3)
    assert config.model.pretrained == "imagenet"


@pytest.mark.parametrize(
    ("name", "averaged"), [("exp1", []), ("exp2", []), ("exp3", []), ("exp4", []), ("paper", ["2"]), ("kaggle", ["2"])]
)
def test_weights_are_averaged_in_the_final_training_only(name: str, averaged: list[str]) -> None:
    config = load(CONFIGS / f"{name}.yaml", ["stage2.init_from=runs/exp2"] if name == "exp3" else [])
    assert [stage for stage in config.train_stages if config.averages(stage)] == averaged
    assert ("swa" in config.stages) == bool(averaged)


def test_kaggle_goes_beyond_the_paper() -> None:
    config = load(CONFIGS / "kaggle.yaml")
    assert config.data.folds == 5
    assert config.sizes == [512, 1024]
    assert config.stage1.positive_share[0] == 0.8 and config.stage2.positive_share[1] == 0.2
    assert config.stage1.positive_share[1] == config.stage2.positive_share[0]  # falls without a jump between the stages
    assert config.stage2.lr < config.stage1.lr
    assert 0.3 in config.evaluate.mask_thresholds
    assert {1500, 2000} <= set(config.evaluate.min_areas)


GIVEN = {  # the keys that the paper gives: "stages" in its text, the others in its tables
    "paper": [
        "stages", "model.pretrained", "stage1.size", "stage1.epochs", "stage1.batch_size", "stage1.lr",
        "stage1.schedule", "stage2.size", "stage2.epochs", "stage2.batch_size", "stage2.lr", "stage2.schedule",
    ],
    "exp1": [
        "stages", "stage1.lr", "stage1.schedule", "stage1.plateau_factor", "stage1.plateau_patience",
        "evaluate.threshold",
    ],
    "exp2": ["stages", "stage1.size", "stage1.epochs", "stage1.batch_size", "stage1.lr", "evaluate.threshold"],
    "exp3": ["stages", "stage2.size", "stage2.epochs", "stage2.batch_size", "stage2.lr", "evaluate.threshold"],
    "exp4": [
        "stages", "stage1.size", "stage1.epochs", "stage1.batch_size", "stage1.lr", "stage2.size", "stage2.epochs",
        "stage2.batch_size", "stage2.lr",
    ],
}  # fmt: skip


def leaves(node: yaml.Node, prefix: str = "") -> Iterator[tuple[str, int]]:
    """Yield every dotted key of a YAML mapping with its line."""
    if not isinstance(node, yaml.MappingNode):
        yield prefix[:-1], node.start_mark.line
        return
    for key, value in node.value:
        yield from leaves(value, f"{prefix}{key.value}.")


@pytest.mark.parametrize("name", GIVEN)
def test_every_value_is_the_papers_or_marked_as_a_choice(name: str) -> None:
    text = (CONFIGS / f"{name}.yaml").read_text()
    lines = text.splitlines()
    unmarked = [key for key, line in leaves(yaml.compose(text)) if "# choice" not in lines[line]]
    assert sorted(unmarked) == sorted(GIVEN[name])


def test_small_takes_what_learns_from_few_films() -> None:
    config = load(CONFIGS / "small.yaml")
    assert config.loss.dice_over == "positives" and config.train.select != "dice"
    assert config.augment.affine > 0 and config.stage1.positive_share
    assert [stage for stage in config.train_stages if config.averages(stage)] == [config.train_stages[-1]]


def test_kaggle_says_that_all_its_values_are_choices() -> None:
    assert "All values are this project's choice" in (CONFIGS / "kaggle.yaml").read_text()

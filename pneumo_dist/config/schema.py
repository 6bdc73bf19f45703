"""The whole recipe: its sections, the rules between them, and the list of its keys."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple, get_type_hints

from pneumo_dist.config import sections
from pneumo_dist.config.rules import ConfigError, one_of, require
from pneumo_dist.config.sections import TRAIN_STAGES, TrainStage, key


@dataclass(frozen=True, kw_only=True)
class Config:
    """One recipe."""

    stages: list[str] = key(
        ["1", "2", "swa"], "training stages in order, of 1, 2 and swa; all other stages always exist"
    )
    run_root: str = key("runs", "directory of the run directories")
    phantom: sections.Phantom = field(default_factory=sections.Phantom)
    data: sections.Data = field(default_factory=sections.Data)
    augment: sections.Augment = field(default_factory=sections.Augment)
    model: sections.Model = field(default_factory=sections.Model)
    loss: sections.Loss = field(default_factory=sections.Loss)
    stage1: TrainStage = field(default_factory=TrainStage)
    stage2: TrainStage = field(default_factory=lambda: TrainStage(size=512, epochs=70, batch_size=16))
    swa: sections.Swa = field(default_factory=sections.Swa)
    train: sections.Train = field(default_factory=sections.Train)
    evaluate: sections.Evaluate = field(default_factory=sections.Evaluate)
    infer: sections.Infer = field(default_factory=sections.Infer)

    def __post_init__(self) -> None:
        known = (*TRAIN_STAGES, "swa")
        for name in self.stages:
            one_of("stages", name, known)
        order = [known.index(name) for name in self.stages]
        require(
            bool(self.train_stages) and order == sorted(set(order)),
            f"stages={','.join(self.stages)} must list 1, 2 and swa in this order, each once, "
            "with at least one of 1 and 2",
        )
        for name in self.train_stages:
            self.train_stage(name).check(f"stage{name}")
        require(
            "1" in self.stages or "2" not in self.stages or bool(self.stage2.init_from),
            "this recipe has no stage 1: give its initial weights, stage2.init_from=PATH (a checkpoint or a run)",
        )
        require(
            "swa" not in self.stages or self.averages(self.last_stage),
            f"stages lists swa, but swa.stages does not average stage {self.last_stage}: set swa.stages=last",
        )
        require(
            self.data.on_device != "on" or not self.augment.affine,
            "augment.affine moves pixels, which loader processes do: set data.on_device=auto",
        )
        for name in ("dicom_dir", "rle_csv", "patient_map", "masks"):
            if self.phantom.films and getattr(self.data, name):
                raise ConfigError(f"phantom.films and data.{name} are both set: set phantom.films=0 for real films")

    @property
    def train_stages(self) -> list[str]:
        """The training stages of this recipe in order, of "1" and "2"."""
        return [name for name in self.stages if name in TRAIN_STAGES]

    @property
    def last_stage(self) -> str:
        """The name of the stage whose weights are averaged and evaluated."""
        return self.train_stages[-1]

    @property
    def sizes(self) -> list[int]:
        """The image sizes that preprocessing writes, ascending, in pixels."""
        return sorted({self.train_stage(name).size for name in self.train_stages})

    def train_stage(self, name: str) -> TrainStage:
        """Return the settings of training stage `name` ("1" or "2")."""
        return {"1": self.stage1, "2": self.stage2}[name]

    def averages(self, name: str) -> bool:
        """Tell whether training stage `name` averages weights: swa.stages lists it, or the swa stage follows it."""
        return name in self.swa.stages or ("last" in self.swa.stages and self.stages[-2:] == [name, "swa"])


class Key(NamedTuple):
    """Type, default and meaning of one key."""

    type: Any  # a class, `class | None` or `list[class]`
    default: Any
    meaning: str


@functools.cache  # called for every override; uncached it takes a third of the time of a dry run
def keys() -> dict[str, Key]:
    """Return every dotted leaf key of the schema."""
    return dict(_keys(Config(), ""))


def _keys(section: Any, prefix: str) -> Iterator[tuple[str, Key]]:
    types = get_type_hints(type(section))
    for entry in dataclasses.fields(section):
        name, value = prefix + entry.name, getattr(section, entry.name)
        if dataclasses.is_dataclass(value):
            yield from _keys(value, f"{name}.")
        else:
            yield name, Key(types[entry.name], value, entry.metadata["meaning"])

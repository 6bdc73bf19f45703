"""Model files -> one predictor and one decision rule. Never guesses silently: what was not stored alike is said."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

from pneumo_dist.config import ConfigError
from pneumo_dist.model.modelfile import load_model
from pneumo_dist.prediction.predictor import Predictor
from pneumo_dist.runtime.files import read_json, sha256_file
from pneumo_dist.scoring.records import Triplet

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Ensemble:
    """One or more models that answer together, with the rule that turns their mean into a mask."""

    predictor: Predictor
    triplet: Triplet
    triplet_from: str
    hashes: tuple[str, ...]  # sha256 of the model files

    @property
    def settings(self) -> dict[str, Any]:
        """What determines an answer besides the film, as plain values."""
        return {
            "models": list(self.hashes),
            "sizes": self.predictor.sizes,
            "tta": self.predictor.tta,
            "triplet": asdict(self.triplet),
            "triplet_from": self.triplet_from,
        }


def stored_triplet(meta: dict[str, Any]) -> Triplet:
    """Return the decision stored in a model file: its tuned triplet, else its fixed mask threshold."""
    if meta.get("triplet"):
        tuned = meta["triplet"]
        return Triplet(float(tuned["top_score"]), int(tuned["min_area"]), float(tuned["mask_threshold"]))
    return Triplet(0.0, 0, float(meta["threshold"]))


def load_ensemble(
    paths: Sequence[Path],
    device: torch.device | str = "cpu",
    tta: str | None = None,
    amp: str = "auto",
    pooled: Path | None = None,
    triplet: Triplet | None = None,
) -> Ensemble:
    """Load model files that answer together.

    The triplet is the one given, else the model's own; of several models the pooled one (`pooled`, a thresholds.json
    of their run) where it is there, else the median of each of the three numbers. Flips are those stored in the models.

    Raises:
        ConfigError: a file is no model, or the models were stored with different flips and `tta` is not given.
    """
    device = torch.device(device)
    loaded = [load_model(path, device) for path in paths]
    stored = {meta.get("tta") or "none" for _, meta in loaded}
    if tta is None and len(stored) > 1:
        raise ConfigError(
            "the models were evaluated with different test-time augmentation: give infer.tta=hflip or infer.tta=none"
        )
    chosen = tta or stored.pop()
    if tta is not None and stored != {tta}:
        log.warning(
            "infer.tta=%s is not what the models' thresholds were tuned with (%s)", tta, ", ".join(sorted(stored))
        )
    rules = [stored_triplet(meta) for _, meta in loaded]
    if triplet is not None:
        rule, origin = triplet, "infer.triplet"
        if {triplet} != set(rules):
            log.warning("infer.triplet replaces what the models store: %s", ", ".join(map(str, dict.fromkeys(rules))))
    elif pooled is not None:
        rule, origin = stored_triplet({"triplet": read_json(pooled)["triplet"]}), "pooled out-of-fold evaluation"
    elif len(set(rules)) == 1:
        rule, origin = rules[0], "model file" if len(rules) == 1 else "model files, all alike"
    else:
        rule = Triplet(
            float(median(r.top_score for r in rules)),
            int(median(r.min_area for r in rules)),
            float(median(r.mask_threshold for r in rules)),
        )
        origin = "median over the model files"
        log.warning("the models store different triplets and no pooled evaluation is there: using the median %s", rule)
    models = [model for model, _ in loaded]
    predictor = Predictor(models, [int(meta["size"]) for _, meta in loaded], device, chosen, amp)
    return Ensemble(predictor, rule, origin, tuple(sha256_file(path) for path in paths))

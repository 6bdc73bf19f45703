"""Model files -> one predictor and one decision rule. Where the files disagree, it raises or logs a warning."""

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
from pneumo_dist.scoring.records import HEAD_SCORE, MASK_SCORE, Triplet
from pneumo_dist.scoring.thresholds import NO_FILM

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Ensemble:
    """One or more models whose probabilities are averaged, and the rule that turns the mean into a mask."""

    predictor: Predictor
    triplet: Triplet
    triplet_from: str
    hashes: tuple[str, ...]  # sha256 of the model files

    @property
    def settings(self) -> dict[str, Any]:
        """Everything besides the film that determines a prediction, as JSON values."""
        return {
            "models": list(self.hashes),
            "sizes": self.predictor.sizes,
            "tta": self.predictor.tta,
            "score": HEAD_SCORE if self.predictor.scored else MASK_SCORE,
            "triplet": asdict(self.triplet),
            "triplet_from": self.triplet_from,
        }


def stored_triplet(meta: dict[str, Any]) -> Triplet:
    """Return the decision rule stored in a model file: its tuned triplet, else its fixed mask threshold."""
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
    """Load one or more model files as one ensemble.

    Args:
        tta: "hflip" or "none"; None: the test-time augmentation stored in the models.
        pooled: thresholds.json of the pooled evaluation of these models' run, if there is one.
        triplet: the decision rule; None: the pooled one, else the models' own (see `_choose_rule`).

    Raises:
        ConfigError: a file is no model, or the models store different test-time augmentation and `tta` is None.
    """
    device = torch.device(device)
    loaded = [load_model(path, device) for path in paths]
    metas = [meta for _, meta in loaded]
    tta = _choose_tta(metas, tta)
    predictor = Predictor([model for model, _ in loaded], [int(meta["size"]) for meta in metas], device, tta, amp)
    if not predictor.scored and any(model.film_head is not None for model, _ in loaded) and triplet is None:
        # Their top scores are thresholds on different quantities.
        raise ConfigError("models with and without an image-level head have no common thresholds: give infer.triplet")
    if triplet is None and pooled is not None and (read_json(pooled).get("score") == HEAD_SCORE) != predictor.scored:
        raise ConfigError(
            f"{pooled}: tuned on another kind of film score: evaluate the folds again, or give infer.triplet"
        )
    rule, origin = _choose_rule([stored_triplet(meta) for meta in metas], pooled, triplet)
    return Ensemble(predictor, rule, origin, tuple(sha256_file(path) for path in paths))


def _choose_tta(metas: Sequence[dict[str, Any]], tta: str | None) -> str:
    stored = {meta.get("tta") or "none" for meta in metas}
    if tta is None and len(stored) > 1:
        raise ConfigError(
            "the models were evaluated with different test-time augmentation: give infer.tta=hflip or infer.tta=none"
        )
    if tta is not None and stored != {tta}:
        log.warning(
            "infer.tta=%s is not what the models' thresholds were tuned with (%s)", tta, ", ".join(sorted(stored))
        )
    return tta or stored.pop()


def _choose_rule(stored: Sequence[Triplet], pooled: Path | None, triplet: Triplet | None) -> tuple[Triplet, str]:
    """Return the decision rule and where it comes from, a text that goes into inference.json.

    The first that applies: the triplet given, the pooled one, the one that all models store, the median of each number.
    """
    if triplet is not None:
        if {triplet} != set(stored):
            log.warning("infer.triplet replaces what the models store: %s", ", ".join(map(str, dict.fromkeys(stored))))
        return triplet, "infer.triplet"
    # Tuned on the out-of-fold predictions of every fold: more films than the rule of any single model.
    if pooled is not None:
        return stored_triplet({"triplet": read_json(pooled)["triplet"]}), "pooled out-of-fold evaluation"
    if len(set(stored)) == 1:
        return stored[0], "model file" if len(stored) == 1 else "model files, all alike"
    # A rule that calls every film empty has no numbers to average.
    rules = [t for t in stored if t.top_score < NO_FILM] or stored
    rule = Triplet(
        float(median(t.top_score for t in rules)),
        int(median(t.min_area for t in rules)),
        float(median(t.mask_threshold for t in rules)),
    )
    log.warning("the models store different triplets and their run has no pooled evaluation: using the median %s", rule)
    left_out = len(stored) - len(rules)
    return rule, "median over the model files" + (
        f", without {left_out} that call every film empty" if left_out else ""
    )

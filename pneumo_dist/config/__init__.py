"""The configuration: schema, defaults, rules, loading. `python -m pneumo_dist.config` lists every key.

This package imports no torch, so that `submit.py` starts quickly.
"""

from pneumo_dist.config.loading import flatten, load, to_yaml, word
from pneumo_dist.config.rules import ConfigError
from pneumo_dist.config.schema import Config, keys
from pneumo_dist.config.sections import (
    TRAIN_STAGES,
    Augment,
    Data,
    Evaluate,
    Infer,
    Loss,
    Model,
    Phantom,
    Swa,
    Train,
    TrainStage,
)

__all__ = [
    "TRAIN_STAGES",
    "Augment",
    "Config",
    "ConfigError",
    "Data",
    "Evaluate",
    "Infer",
    "Loss",
    "Model",
    "Phantom",
    "Swa",
    "Train",
    "TrainStage",
    "flatten",
    "keys",
    "load",
    "to_yaml",
    "word",
]

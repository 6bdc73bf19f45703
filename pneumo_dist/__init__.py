"""Distributed training for pneumothorax segmentation (2ST-UNet) on SLURM clusters.

Importing this package imports neither torch nor numpy: `load_model` and `predict` are imported on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pneumo_dist.model.modelfile import load_model
    from pneumo_dist.prediction.forward import predict

__version__ = "1.0.0"
__all__ = ["__version__", "load_model", "predict"]

_LAZY = {"load_model": "pneumo_dist.model.modelfile", "predict": "pneumo_dist.prediction.forward"}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)

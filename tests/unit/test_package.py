"""The package exports two functions; they are imported on first use, and nothing heavy before."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import pneumo_dist

ROOT = Path(__file__).parents[2]


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = (
        "import sys, pneumo_dist, pneumo_dist.config; pneumo_dist.__version__; dir(pneumo_dist);"
        "print(sorted({'torch', 'numpy', 'cv2', 'torchvision', 'albumentations'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.strip() == "[]"


def test_the_two_functions_are_imported_on_use() -> None:
    from pneumo_dist.model.modelfile import load_model
    from pneumo_dist.prediction.forward import predict

    assert pneumo_dist.load_model is load_model
    assert pneumo_dist.predict is predict
    assert {"load_model", "predict", "__version__"} <= set(dir(pneumo_dist))


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="'pneumo_dist' has no attribute 'predcit'"):
        pneumo_dist.predcit  # noqa: B018

"""`python -m pneumo_dist.config`: every key with type, default and meaning."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from pneumo_dist.config import Config, ConfigError, flatten, keys, load
from pneumo_dist.config.__main__ import main

ROOT = Path(__file__).parents[2]


def rows(text: str) -> dict[str, str]:
    """The printed rows by key; a meaning on a line of its own belongs to the key above."""
    listed: dict[str, str] = {}
    for line in text.splitlines():
        if line.startswith(" " * 20):
            listed[list(listed)[-1]] += f"  {line.strip()}"
        elif line.startswith("  "):
            listed[line.split()[0]] = line.strip()
    return listed


def test_every_key_of_the_configuration_has_a_meaning() -> None:
    assert list(keys()) == list(flatten(Config()))
    assert [name for name, key in keys().items() if not key.meaning.strip()] == []


def test_the_listing_has_every_key_with_type_default_and_meaning(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    listed = rows(capsys.readouterr().out)
    assert list(listed) == list(keys())
    for name, key in keys().items():
        assert listed[name].endswith(f"  {key.meaning}"), name
    columns = {name: [part.strip() for part in row.split("  ") if part.strip()][1:3] for name, row in listed.items()}
    assert columns["stage1.epochs"] == ["int", "100"] and columns["stage2.epochs"] == ["int", "70"]
    assert columns["data.dicom_dir"] == ["str or null", "null"]
    assert columns["train.deterministic"] == ["bool", "true"]
    assert columns["stages"] == ["list of str", "1,2,swa"] and columns["infer.models"] == ["list of str", "[]"]
    grid = "0.2,0.25,0.3,0.35,0.4,0.45,0.5,0.55,0.6,0.65,0.7,0.75,0.8"
    assert columns["evaluate.mask_thresholds"] == ["list of float", grid]
    words = [f"{name}={default.replace('[]', '')}" for name, (_, default) in columns.items()]
    assert load(None, words) == Config()  # the printed defaults are those of the schema


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("loss.", ["loss.bce", "loss.dice", "loss.dice_over", "loss.smooth", "loss.image"]),
        ("POSITIVE_share", ["stage1.positive_share", "stage2.positive_share"]),
        ("horizontal flip", ["augment.hflip"]),
    ],
)
def test_a_word_filters_by_key_or_meaning(word: str, expected: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([word]) == 0
    assert list(rows(capsys.readouterr().out)) == expected


@pytest.mark.parametrize(
    ("word", "hint"), [("loss.bec", "did you mean loss.bce?"), ("qqq", "python -m pneumo_dist.config lists every key")]
)
def test_an_unknown_word_is_one_line_and_status_2(word: str, hint: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pneumo_dist.config", word], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"error: no key has {word!r} in its name or meaning; {hint}\n"


def test_an_unknown_key_of_a_recipe_names_the_listing() -> None:
    with pytest.raises(ConfigError, match=r"^unknown key 'qqq'; python -m pneumo_dist.config lists every key$"):
        load(None, ["qqq=1"])


def test_each_configuration_has_lists_of_its_own() -> None:
    assert Config().evaluate.mask_thresholds is not Config().evaluate.mask_thresholds

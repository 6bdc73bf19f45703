"""The jobs of each stage of the command line, and their dependencies."""

import pytest

from pneumo_dist import config as configuration
from pneumo_dist.chain import jobs_of
from pneumo_dist.config import ConfigError

PAPER = configuration.load()


def _names(config, stage, folds):
    return [node.key for node in jobs_of(config, stage, folds)]


def test_all_is_the_whole_chain_in_order():
    assert _names(PAPER, "all", [0]) == [
        "preprocess", "finalize", "stage1-fold0", "stage2-fold0", "swa-fold0", "evaluate-fold0", "infer", "merge",
    ]  # fmt: skip


def test_each_fold_is_a_separate_chain_and_one_job_pools_them():
    nodes = {node.key: node.after for node in jobs_of(PAPER, "all", [1, 3])}
    assert nodes["stage2-fold3"] == (("finalize", None), ("1", 3))
    assert nodes["evaluate-fold1"] == (("finalize", None), ("swa", 1))
    assert nodes["pool"] == (("evaluate", 1), ("evaluate", 3))
    assert nodes["infer"] == (*nodes["pool"], ("pool", None))  # the pooled triplet decides for all folds' models


def test_phantom_films_come_first_where_they_are_configured():
    config = configuration.load(None, ["phantom.films=20"])
    assert _names(config, "all", [0])[:2] == ["phantom", "preprocess"]


@pytest.mark.parametrize(
    ("words", "stage", "message"),
    [
        (["stages=1,swa"], "2", "this recipe has no stage 2"),
        (["stages=2,swa", "stage2.init_from=x.pt"], "1", "this recipe has no stage 1"),
        (["stages=1"], "swa", "this recipe has no swa"),
    ],
)
def test_a_stage_that_the_recipe_does_not_list_is_refused(words, stage, message):
    with pytest.raises(ConfigError, match=message):
        jobs_of(configuration.load(None, words), stage, [0])


def test_a_fold_that_does_not_exist_is_refused():
    with pytest.raises(ConfigError, match=r"--folds 5: data\.folds=5 makes folds 0 to 4"):
        jobs_of(PAPER, "1", [5])


def test_without_swa_the_last_stage_is_evaluated():
    config = configuration.load(None, ["stages=1"])
    assert jobs_of(config, "evaluate", [0])[0].after == (("finalize", None), ("1", 0))

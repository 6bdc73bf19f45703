"""The benchmarks' arithmetic: turns, ratios, the model of N nodes, the paper's schedule. Nothing is timed in here."""

import importlib
import json
from dataclasses import asdict, replace

import pytest

from pneumo_dist.data.cases import Case, read_cases, write_cases
from pneumo_dist.data.loaders import fold_cases
from tests.benchmarks import frame, gpu, paper_model, real_films, whole_schedule
from tests.benchmarks.paper_model import Link, Step

STEP = Step(fixed_s=0.01, image_s=0.02, gradient_bytes=100e6)


def test_turns_alternate_in_both_directions():
    order = []
    contestants = {name: lambda name=name: order.append(name) or float(len(order)) for name in "abc"}
    values = frame.in_turns(contestants, 2)
    assert order == ["a", "b", "c", "c", "b", "a"]
    assert values == {"a": [1.0, 6.0], "b": [2.0, 5.0], "c": [3.0, 4.0]}


def test_a_disturbed_round_does_not_change_the_ratio():
    ours, theirs = [3.0, 0.3, 3.0], [2.0, 0.2, 2.0]
    assert frame.ratio(ours, theirs) == pytest.approx(1.5)


def test_table_of_speeds_relates_everything_to_the_base():
    table = frame.speed_table("t", "images/s", {"ours": [2.0], "peer": [1.0]}, "ours", "ours over it")
    assert [row[-1] for row in table.rows] == [1.0, 2.0]
    assert "| peer | 1 " in table.markdown()


def test_ring_sends_the_gradient_once_on_two_nodes_and_nearly_twice_on_many():
    link = Link(bytes_s=100e6, latency_s=0)
    assert paper_model.ring_seconds(2, 100e6, link) == pytest.approx(1)
    assert paper_model.ring_seconds(1000, 100e6, link) == pytest.approx(2, rel=1e-2)


def test_one_node_exchanges_nothing():
    assert paper_model.step_seconds(STEP, 1, 64, Link(1e6)) == pytest.approx(0.01 + 64 * 0.02)


def test_what_the_backward_pass_covers_costs_nothing_but_the_last_bucket():
    link = Link(bytes_s=1e9, latency_s=0)
    last = paper_model.ring_seconds(2, STEP.bucket_bytes, link)
    assert paper_model.exposed_seconds(STEP, 2, 64, link) == pytest.approx(last)
    slow = Link(bytes_s=1e8, latency_s=0)
    assert paper_model.exposed_seconds(STEP, 2, 64, slow) == pytest.approx(1 - 32 * 0.02 * 2 / 3)


def test_communication_shows_later_on_a_faster_link_and_with_compression():
    slow, fast = Link(0.125e9), Link(1.25e9)
    at_slow, at_fast = paper_model.shows_at(STEP, 64, slow), paper_model.shows_at(STEP, 64, fast)
    assert at_slow is not None and at_fast is not None and at_slow < at_fast
    compressed = paper_model.shows_at(STEP, 64, fast, compression=2)
    assert compressed is None or compressed > at_fast
    assert paper_model.shows_at(replace(STEP, gradient_bytes=1.0), 64, Link(1e12, 0)) is None


def test_line_through_two_measured_steps():
    step = Step.through((2, 6), (0.05, 0.13), 1.0)
    assert (step.fixed_s, step.image_s) == (pytest.approx(0.01), pytest.approx(0.02))


def test_schedule_counts_whole_batches_of_both_stages():
    # 10,800 films: 168 whole batches of 64 for 100 epochs, 675 of 16 for 70 epochs.
    minutes = whole_schedule.schedule_minutes({256: 64.0, 512: 16.0}, {256: 64, 512: 16})
    assert minutes == pytest.approx((100 * 168 + 70 * 675) / 60)


def test_operations_grow_with_the_area():
    assert whole_schedule.operations(128) == pytest.approx(4 * whole_schedule.operations(64))


def test_phases_measured_on_a_gpu_are_merged_once_and_again(tmp_path):
    results = tmp_path / "RESULTS.md"
    results.write_text(f"before\n{gpu.BEGIN}\nold\n{gpu.END}\nafter\n")
    table = asdict(frame.Table("Facts", ["", "found"], [["a", 1.5]]))
    found = {"machine": {"gpu": "NVIDIA X"}, "versions": {"torch": "1"}, "tables": [table]}
    (tmp_path / "facts.json").write_text(json.dumps(found))
    for _ in range(2):
        gpu.merge(tmp_path, results)
        text = results.read_text()
        assert text.startswith("before\n") and text.endswith(f"{gpu.END}\nafter\n") and "old" not in text
        assert text.count("#### Facts") == 1 and "gpu NVIDIA X, torch 1" in text
        assert "Phase `step256`: not measured." in text


def test_every_phase_names_a_benchmark_and_fits_its_limit():
    for phase in gpu.PHASES.values():
        assert callable(importlib.import_module(f"tests.benchmarks.{phase.benchmark}").main)
        assert phase.minutes * 60 < gpu.LIMIT_S


def test_fewer_training_films_are_whole_patients_and_part_of_more(tmp_path):
    cases = [Case(f"f{i:03}", 0, i, 9, 9, i % 2, i % 7 % 3, i % 7, "", "", "-1") for i in range(100)]
    write_cases(tmp_path / "shards", cases)
    few, more = (
        fold_cases(read_cases(real_films.part_of(tmp_path / "shards", n, seed=0, fold=1)), 1) for n in (20, 40)
    )
    train, validation = fold_cases(cases, 1)
    assert few[1] == more[1] == validation
    assert 20 <= len(few[0]) < 40 <= len(more[0]) < len(train) and set(few[0]) < set(more[0]) < set(train)
    assert {c.group for c in few[0]}.isdisjoint(c.group for c in train if c not in few[0])

"""Annotation lists in every dialect, patient maps, cases.csv."""

from __future__ import annotations

import gzip
import os
from pathlib import Path

import pytest

from pneumo_dist.config import ConfigError
from pneumo_dist.data.cases import (
    Case,
    read_cases,
    write_cases,
)
from pneumo_dist.data.lists import read_annotations, read_ids, read_patient_map
from pneumo_dist.data.preprocess.audit import describe

REAL = Path(os.environ.get("PNEUMO_REAL_DATA", Path(__file__).resolve().parents[3] / "shared" / "data"))
needs_real_films = pytest.mark.skipif(not REAL.is_dir(), reason=f"no real films in {REAL} (PNEUMO_REAL_DATA)")


def annotations(tmp_path: Path, text: str | bytes):
    path = tmp_path / "train-rle.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return read_annotations(path)


@pytest.mark.parametrize(
    "text",
    [
        "ImageId, EncodedPixels\na, -1\nb, 1 2\n",
        "ImageId,EncodedPixels\na,-1\nb,1 2\n",
        "\ufeffImageId,EncodedPixels\r\na, -1\r\nb,1 2\r\n",
        '"ImageId"," EncodedPixels "\n a ,"-1"\n b ," 1 2 "\n\n',
        "imageid,encodedpixels\nb,1 2\na,-1",
        "ImageId;EncodedPixels\r\na;-1\r\nb;1 2\r\n",
        'ImageId\t"EncodedPixels"\n"a"\t-1\nb\t 1 2\n',
        "ImageId,EncodedPixels\ra,-1\rb,1 2\r",
        ",EncodedPixels,view,ImageId\n0,-1,PA,a\n1,1 2,,b\n",
        "ImageId;EncodedPixels\r\na;-1\r\nb;1 2\r\n".encode("utf-16"),
        "ImageId\tEncodedPixels\na\t-1\nb\t1 2\n".encode("utf-16-le"),
        "ImageId,EncodedPixels\na,-1\nb,1 2\n".encode("utf-16-be"),
    ],
)
def test_every_dialect_reads_the_same(tmp_path, text):
    notes = annotations(tmp_path, text)
    assert notes.texts("a") == ["-1"] and notes.texts("b") == ["1 2"]
    assert not notes.problems


def test_unusable_rows_are_reported_with_file_and_line_and_break_their_film_only(tmp_path):
    notes = annotations(tmp_path, "ImageId,EncodedPixels\na,1 2\nb,\nc,1 2 3\n,5 5\nd,1 2,3\na,9 x\ne,-1\nf\n")
    assert [problem.split(": ")[0] for problem in notes.problems] == [
        f"train-rle.csv:{line}" for line in (3, 4, 5, 6, 7, 9)
    ]
    assert set(notes.broken) == {"a", "b", "c", "d", "f"}
    assert "empty cell" in notes.broken["b"] and "odd number" in notes.broken["c"]
    assert notes.where("a") == ["train-rle.csv:2", "train-rle.csv:7"]
    assert set(notes.rows) == {"a", "b", "c", "d", "e", "f"}


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "is empty"),
        (b"ImageId,EncodedPixels\n", "has no rows"),
        (b"id,mask\na,-1\n", "starts with 'id,mask', not with ImageId,EncodedPixels"),
        (b"ImageId|EncodedPixels\na|-1\n", "not with ImageId,EncodedPixels"),
        (b"\xff\xfeI\0m\0", "starts with 'Im'"),
        (b"\xff\xfeI\0m", "not UTF-16"),
        (b"ImageId,EncodedPixels\na,\xff\n", "not UTF-8"),
        (b"ImageId,EncodedPixels\na," + b"1 2 " * 5_000_000 + b"\n", "cannot be read as csv"),
    ],
)
def test_a_list_that_is_none_is_one_line(tmp_path, content, reason):
    with pytest.raises(ConfigError, match=reason) as caught:
        annotations(tmp_path, content)
    assert "\n" not in str(caught.value) and "train-rle.csv" in str(caught.value)


def test_a_missing_list_names_its_path(tmp_path):
    with pytest.raises(ConfigError, match=r"absent\.csv: cannot read the annotation list \(No such file"):
        read_annotations(tmp_path / "absent.csv")


def test_a_compressed_list_is_read_and_a_damaged_one_refused(tmp_path):
    path = tmp_path / "list.csv.gz"
    path.write_bytes(gzip.compress(b"ImageId,EncodedPixels\na,-1\n"))
    assert read_annotations(path).texts("a") == ["-1"]
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ConfigError, match="cannot read the annotation list"):
        read_annotations(path)


def test_patient_maps_and_id_lists(tmp_path):
    path = tmp_path / "patients.csv"
    path.write_text("ImageId,PatientKey\na,P1\nb,P1\na,P1\n")
    assert read_patient_map(path) == {"a": "P1", "b": "P1"}
    path.write_text("ImageId,PatientKey\na,P1\na,P2\n")
    with pytest.raises(ConfigError, match=r"patients\.csv:3: image a has two different patient keys"):
        read_patient_map(path)
    path.write_text("ImageId,PatientKey\na,\n")
    with pytest.raises(ConfigError, match=r"patients\.csv:2"):
        read_patient_map(path)
    path.write_text("# kept\n a \n\nb\n")
    assert read_ids(path) == ["a", "b"]
    path.write_bytes("a\r\nb\r\n".encode("utf-16"))
    assert read_ids(path) == ["a", "b"]
    path.write_bytes("PatientKey;ImageId\r\nP1;a\r\n".encode("utf-16"))
    assert read_patient_map(path) == {"a": "P1"}


def case(name: str, **changes) -> Case:
    fields = {
        "id": name,
        "shard": 0,
        "row": 1,
        "rows": 9,
        "columns": 8,
        "label": 1,
        "fold": -1,
        "group": 3,
        "view": "PA",
        "sex": "",
        "rle": "1 2",
    }
    return Case(**(fields | changes))


def test_cases_survive_the_file_sorted_by_id(tmp_path):
    cases = [case("b"), case('a,"x"', rle="-1"), case("c\nd", rle="7 " * 100_000 + "1")]
    write_cases(tmp_path, cases)
    assert read_cases(tmp_path) == sorted(cases, key=lambda one: one.id)


def test_a_missing_or_foreign_case_list_is_one_line(tmp_path):
    with pytest.raises(ConfigError, match="run --stage preprocess first"):
        read_cases(tmp_path)
    (tmp_path / "cases.csv").write_text("id,shard\na,x\n")
    with pytest.raises(ConfigError, match="preprocess again"):
        read_cases(tmp_path)


def test_the_audit_counts_rows_and_overlaps(tmp_path):
    notes = annotations(tmp_path, "ImageId,EncodedPixels\na,-1\nb,1 2\nb,2 2\nc,1 2\nc,5 2\nd,-1\nd,3 3\ne,1\n")
    assert describe(notes) == {
        "images": 5,
        "rows": 8,
        "positive": 3,
        "rows_per_image": {"1": 2, "2": 3},
        "several_rows": 3,
        "overlapping_rows": 1,
        "mask_and_empty_row": 1,
        "problems": ["train-rle.csv:9: odd number of values (1): runs are pairs of offset and length"],
    }


@needs_real_films
def test_the_full_competition_list_has_its_known_counts():
    counts = describe(read_annotations(REAL / "siim-pneumothorax-train-rle.csv.gz"))
    values = [counts[key] for key in ("images", "rows", "positive", "several_rows", "overlapping_rows")]
    assert values == [12_047, 12_954, 2_669, 624, 183]
    assert not counts["problems"]

"""Lists of annotations: the convention of their offsets, and the films that their names mean."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pneumo_dist.config import ConfigError
from pneumo_dist.data.films.rle import decode_rle, relative_text
from pneumo_dist.data.lists import FilmNames, by_film, check_folders, read_annotations, read_patient_map

REAL = Path(os.environ.get("PNEUMO_REAL_DATA", Path(__file__).resolve().parents[3] / "shared" / "data"))
needs_real_films = pytest.mark.skipif(not REAL.is_dir(), reason=f"no real films in {REAL} (PNEUMO_REAL_DATA)")


def listed(folder: Path, *rows: str) -> Path:
    path = folder / "list.csv"
    path.write_text("\n".join(["ImageId,EncodedPixels", *rows, ""]))
    return path


def test_three_short_absolute_runs_are_refused_until_their_convention_is_named(tmp_path):
    path = listed(tmp_path, "a,-1", "b,5 2 9 2 13 2")
    with pytest.raises(ConfigError, match=r"2 of 2 offsets ascend .* data.rle=absolute .*, absolute0 .*, or siim"):
        read_annotations(path)
    texts = {rle: read_annotations(path, rle).texts("b") for rle in ("siim", "absolute", "absolute0")}
    assert texts == {"siim": ["5 2 9 2 13 2"], "absolute": ["4 2 2 2 2 2"], "absolute0": ["5 2 2 2 2 2"]}
    assert read_annotations(path, "absolute").texts("a") == ["-1"]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("b,900 2 5 2 1 2", "data.rle=absolute, but only 0 of 2 offsets ascend as positions do: set data.rle=siim"),
        ("b,0 2 9 2 13 2", "data.rle=absolute counts from 1, but a run is at 0: set data.rle=absolute0"),
    ],
)
def test_a_list_that_contradicts_the_named_convention_is_refused(tmp_path, row, reason):
    with pytest.raises(ConfigError, match=reason):
        read_annotations(listed(tmp_path, "a,-1", row), "absolute")


@pytest.mark.parametrize(
    ("row", "others", "rle", "reason"),
    [
        ("5 2 9 2 13 2", "300 9 40 9 30 9 20 9 10 9", None, "unlike in other rows, the offsets ascend as absolute"),
        ("5 2 6 2", "300 9 400 9 500 9", "absolute", "the positions do not ascend"),
        ("1 2 " * 8191 + "1 2", "300 9 40 9", None, "32767 characters: cut off by a spreadsheet"),
    ],
)
def test_a_row_unlike_the_others_breaks_its_film_only(tmp_path, row, others, rle, reason):
    notes = read_annotations(listed(tmp_path, f"a,{others}", f"b,{row}"), rle)
    assert set(notes.broken) == {"b"} and reason in notes.broken["b"]


@needs_real_films
def test_no_film_of_the_competition_looks_absolute_not_even_alone(tmp_path):
    rows = read_annotations(REAL / "siim-pneumothorax-train-rle.csv.gz").rows
    positive = [texts for texts in rows.values() if texts[0][1] != "-1"]
    for texts in positive[::40]:
        assert not read_annotations(listed(tmp_path, *(f"a,{text}" for _, text in texts))).problems
        absolute = [positions(text) for _, text in texts]
        path = listed(tmp_path, *(f"a,{text}" for text in absolute))
        assert read_annotations(path, "absolute").texts("a") == [text for _, text in texts]
        with pytest.raises(ConfigError, match="ascend as absolute positions do"):
            read_annotations(path)


def positions(text: str) -> str:
    """Return a row of the competition as positions that count from 1."""
    at, tokens = 1, [int(token) for token in text.split()]
    out = []
    for offset, length in zip(tokens[::2], tokens[1::2], strict=True):
        out += [at + offset, length]
        at += offset + length
    return " ".join(map(str, out))


def test_positions_go_down_the_columns_and_the_first_pixel_has_the_named_number():
    assert decode_rle(relative_text("2 2 7 1", 1), 4, 3).T.astype(int).tolist() == [[0, 1, 1, 0], [0, 0, 1, 0], [0] * 4]
    assert relative_text("0 12", 0) == "0 12" and relative_text(" -1 ", 1) == "-1"


FILMS = [
    ("a/x.dcm", "a/x.dcm"),
    ("b/x.dcm", "b/x.dcm"),
    ("y", "s/y.DCM"),
    ("1.2.840.10.7", "s/1.2.840.10.7"),
    ("z", "z"),
]


@pytest.mark.parametrize(
    ("name", "film"),
    [
        ("y", "y"),
        ("y.dcm", "y"),
        ("y.png", "y"),
        ("y.dcm.png", "y"),
        ("/data/s/y.dcm", "y"),
        ("..\\s\\y.dcm", "y"),
        ("t/y.dcm", None),  # in another folder: another film
        ("b/c/x", None),
        ("t/z.png", "z"),  # a path that starts outside the folder of the films
        ("t/1.2.840.10.7", "1.2.840.10.7"),  # a UID is of one image only
        ("./s/y", "y"),
        ("a/x", "a/x.dcm"),
        ("b/x.dcm", "b/x.dcm"),
        ("train/b/x.png", "b/x.dcm"),
        ("1.2.840.10.7", "1.2.840.10.7"),
        ("1.2.840.10.7.dcm", "1.2.840.10.7"),
        ("1.2.840.10.8", "z"),  # by the header
        ("pacs/1.2.840.10.8.dcm", "z"),
        ("1.2.840.10", None),
        ("10.7", None),
        ("Y", None),
        ("", None),
    ],
)
def test_a_name_means_a_film_with_an_extension_or_a_path_or_by_its_header(name, film):
    opened = []
    uids = {"z": "1.2.840.10.8", "s/y.DCM": "1.2.840.10.7"}
    names = FilmNames(FILMS, lambda path: opened.append(path) or uids.get(path, ""))
    assert names.match({name: (name,)}, "list.csv") == ({name: film} if film else {})
    assert not opened or name.endswith(("1.2.840.10.8", "1.2.840.10.8.dcm", "1.2.840.10"))


def test_a_name_of_several_films_is_refused():
    with pytest.raises(ConfigError, match=r"list.csv: x may be a/x.dcm or b/x.dcm: remove one .* by its path"):
        FilmNames(FILMS).match({"x": ("x",)}, "list.csv")
    with pytest.raises(ConfigError, match=r"1\.2\.3\.4\.5 may be s/y.DCM or s/1.2.840.10.7: remove one"):
        FilmNames(FILMS[2:], lambda path: "1.2.3.4.5").match({"1.2.3.4.5": ("1.2.3.4.5",)}, "list.csv")
    with pytest.raises(ConfigError, match="p/y and q/y both have the name of film y"):
        check_folders({"p/y": "y", "q/y": "y"}, "list.csv")


def test_a_row_of_another_folder_never_takes_the_place_of_a_films_own():
    names = FilmNames([("img1", "patient1/img1.png")])
    rows = ("patient2/img1", "patient1/img1")
    assert names.match({row: (row,) for row in rows}, "list.csv") == {"patient1/img1": "img1"}
    keys = {"patient2/img1.png": "B", "patient1/img1.png": "A"}
    assert by_film(keys, names, Path("patients.csv")) == {"img1": "A"}


def test_a_patient_map_without_header_is_refused_without_a_quotation(tmp_path):
    (tmp_path / "map.csv").write_text("img1,DOE^JOHN 1970\nimg2,ROE^JANE 1980\n")
    with pytest.raises(ConfigError, match="map.csv:1: the patient map .*, not with ImageId,PatientKey") as caught:
        read_patient_map(tmp_path / "map.csv")
    assert "DOE" not in str(caught.value) and "img1" not in str(caught.value)

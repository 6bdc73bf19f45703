"""Synthetic films: the layout of the real ones, the same bytes every time, and a sign that is there to be seen."""

from __future__ import annotations

import csv

import numpy as np
import pydicom

from pneumo_dist.data.films.dicom import read_film
from pneumo_dist.data.films.listing import find_films
from pneumo_dist.data.films.rle import area_px, decode_union, runs
from pneumo_dist.data.lists import read_annotations, read_patient_map
from pneumo_dist.data.phantom import NOTICE, draw_film, make_phantom


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(tmp_path):
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        make_phantom(tmp_path / name, 9, 64, seed)

    def content(name):
        return {p.relative_to(tmp_path / name): p.read_bytes() for p in (tmp_path / name).rglob("*") if p.is_file()}

    assert content("a") == content("b")
    assert not set(content("a").values()) & set(content("c").values())


def test_the_set_looks_like_the_competitions(tmp_path):
    make_phantom(tmp_path, 30, 96)
    films, ignored = find_films(tmp_path / "dicom-images-train")
    notes = read_annotations(tmp_path / "train-rle.csv")
    assert len(films) == 30 and not ignored and not notes.problems
    assert len(set(dict(films)) - set(notes.rows)) == 1  # one film without annotation
    assert all(path.split("/")[2] == f"{name}.dcm" and path.count("/") == 2 for name, path in films)
    with open(tmp_path / "train-rle.csv", newline="") as handle:
        rows = list(csv.reader(handle))
    assert rows[0] == ["ImageId", " EncodedPixels"] and any(row[1] == " -1" for row in rows)
    several = [name for name, texts in notes.rows.items() if len(texts) > 1]
    assert several and all(area_px([*map(runs, notes.texts(name))])[1] for name in several)
    patients = read_patient_map(tmp_path / "patients.csv")
    assert set(patients) == set(dict(films)) and len(set(patients.values())) < 30


def test_films_are_jpeg_baseline_secondary_capture_and_say_that_they_are_synthetic(tmp_path):
    make_phantom(tmp_path, 2, 64)
    films, _ = find_films(tmp_path)
    for name, path in films:
        header = pydicom.dcmread(tmp_path / path)
        assert header.file_meta.TransferSyntaxUID == "1.2.840.10008.1.2.4.50"
        assert header.SOPClassUID == "1.2.840.10008.5.1.4.1.1.7" and header.Modality == "CR"
        assert header.PhotometricInterpretation == "MONOCHROME2" and header.SOPInstanceUID == name
        assert header.ImageComments == NOTICE and "SYNTHETIC" in header.SeriesDescription
        film = read_film(tmp_path / path)
        assert film.pixels.shape == (64, 64) and film.sop_uid == name


def test_a_pneumothorax_is_dark_smooth_and_large_enough():
    dark, smooth = [], []
    for number in range(12):
        pixels, mask = draw_film(256, 0, number, True)
        assert 0.01 < mask.mean() < 0.2
        healthy, none = draw_film(256, 0, number, False)
        assert not none.any()
        dark.append(float(pixels[mask].mean()) - float(healthy[mask].mean()))
        smooth.append(float(pixels[mask].std()) / float(healthy[mask].std()))
    assert np.mean(dark) < -5 and np.mean(smooth) < 1.1


def test_annotations_cover_the_drawn_mask(tmp_path):
    make_phantom(tmp_path, 8, 96, seed=1)
    notes = read_annotations(tmp_path / "train-rle.csv")
    areas = sorted(int(decode_union(notes.texts(name), 96, 96).sum()) for name in notes.rows)
    drawn = sum(area > 0 for area in areas)
    assert drawn >= 2 and areas[-1] > 100

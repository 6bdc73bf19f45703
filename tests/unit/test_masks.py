"""Every form of annotation that people have gives the masks of the competition's list, or one line that says why not."""

from __future__ import annotations

import csv
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import cv2
import highdicom
import numpy as np
import pydicom
import pytest
from PIL import Image

from pneumo_dist import config as configuration
from pneumo_dist.config import ConfigError
from pneumo_dist.data.cases import read_cases
from pneumo_dist.data.films.dicom import FilmError, read_film
from pneumo_dist.data.films.masks import MaskFile, read_mask, seg_references, sop_uid
from pneumo_dist.data.films.rle import decode_union
from pneumo_dist.data.lists import read_annotations
from pneumo_dist.data.preprocess import preprocess
from pneumo_dist.data.preprocess.decoding import decode_film
from pneumo_dist.data.preprocess.finalize import finalize
from pneumo_dist.data.preprocess.manifest import verify
from pneumo_dist.data.preprocess.source import check_source, read_source
from pneumo_dist.data.preprocess.truth import notes
from pneumo_dist.done import inputs_of
from pneumo_dist.inference.dicomseg import SegJob, seg_bytes
from pneumo_dist.run import Run
from pneumo_dist.runtime.task import Task
from tests.film_files import overrides, small_set, write_png

SIZE = 64
Settings = dict[str, str]
pytestmark = pytest.mark.filterwarnings("ignore:The string:UserWarning")  # highdicom on the name of a phantom patient


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> tuple[Settings, dict[str, np.ndarray]]:
    """A set in the form of the competition with its last film not annotated, and the masks by film."""
    settings = small_set(tmp_path_factory.mktemp("films"), size=SIZE)
    notes = read_annotations(Path(settings["data.rle_csv"]))
    return settings, {name: decode_union(notes.texts(name), SIZE, SIZE) for name in notes.rows}


def run_of(settings: Settings, *more: str, folder: Path = Path("/nowhere")) -> Run:
    small = ["data.shards=2", "data.folds=2", "data.workers=1", "stage1.size=32", "stages=1"]
    return Run(folder, configuration.load(None, [*overrides(settings), *small, *more]))


def masks_read(settings: Settings, *more: str) -> dict[str, tuple[int, str]]:
    """Return {id: (label, mask)} as preprocessing reads them; a film that it cannot use has its reason as mask."""
    source, read = read_source(run_of(settings, *more)), {}
    for job in (job for shard in source.jobs for job in shard):
        try:
            if job.broken:
                raise FilmError(job.broken)
            facts, _ = decode_film(job, source.folder, 10**6, {32: np.empty((32, 32), np.uint8)})
            read[facts["id"]] = facts["label"], facts["rle"]
        except FilmError as error:
            read[job.id] = -1, str(error)
    return read


def films_of(settings: Settings) -> dict[str, Path]:
    return {path.stem: path for path in sorted(Path(settings["data.dicom_dir"]).rglob("*.dcm"))}


def write_list(path: Path, rows: list[tuple[str, str]], header: str = "ImageId,EncodedPixels") -> str:
    path.write_text("\n".join([header, *map(",".join, rows), ""]))
    return str(path)


def rows_of(settings: Settings) -> list[tuple[str, str]]:
    notes = read_annotations(Path(settings["data.rle_csv"]))
    return [(name, text) for name in notes.rows for text in notes.texts(name)]


def seg_of(film: Path, mask: np.ndarray) -> bytes:
    return seg_bytes(film, mask, SegJob(film.stem, "", "", *mask.shape, b"", "label", "answer", ("ab" * 32,), 0))


def spread_over_mask_files(settings: Settings, masks: dict[str, np.ndarray], to: Path) -> Settings:
    """One to three PNG files a film: any grey above 0, any bit depth."""
    for i, (name, mask) in enumerate(masks.items()):
        if i % 3 == 0:
            write_png(to / "masks" / f"{name}.png", mask)
        elif i % 3 == 1:
            write_png(to / "masks" / f"{name}_mask.png", mask * np.uint16(1))
        else:
            upper = np.arange(SIZE)[:, None] < SIZE // 2
            write_png(to / "masks" / f"{name}_mask1.png", mask & upper)
            write_png(to / "masks" / f"{name}_Mask_2.PNG", (mask & ~upper) * np.uint8(7))
            write_png(to / "masks" / f"{name}-mask3.png", np.repeat((mask & upper)[..., None], 3, 2) * np.uint8(200))
    return {"data.masks": str(to / "masks")}


def as_segmentations(settings: Settings, masks: dict[str, np.ndarray], to: Path) -> Settings:
    (to / "seg").mkdir()
    for i, (name, mask) in enumerate(masks.items()):
        (to / "seg" / f"{i}{'.dcm' if i % 2 else ''}").write_bytes(seg_of(films_of(settings)[name], mask))
    return {"data.masks": str(to / "seg")}


def with_pacs_names(settings: Settings, masks: dict[str, np.ndarray], to: Path) -> Settings:
    for i, path in enumerate(films_of(settings).values()):
        (to / "DICOM" / f"ST{i % 2}").mkdir(parents=True, exist_ok=True)
        shutil.copy(path, to / "DICOM" / f"ST{i % 2}" / f"IM{i:06d}")
    return {"data.dicom_dir": str(to / "DICOM"), "data.rle_csv": settings["data.rle_csv"]}


def with_pacs_names_and_segmentations(settings: Settings, masks: dict[str, np.ndarray], to: Path) -> Settings:
    """The films keep their PACS names as ids, since no list gives them others."""
    return as_segmentations(settings, masks, to) | {
        "data.dicom_dir": with_pacs_names(settings, masks, to)["data.dicom_dir"]
    }


def with_names(change: Callable[[str], str]) -> Callable[..., Settings]:
    def form(settings: Settings, masks: dict[str, np.ndarray], to: Path) -> Settings:
        rows = [(change(name), text) for name, text in rows_of(settings)]
        return {"data.rle_csv": write_list(to / "list.csv", rows)}

    return form


def as_positions(rle: str, first: int) -> Callable[..., Settings]:
    def form(settings: Settings, masks: dict[str, np.ndarray], to: Path) -> Settings:
        rows = []
        for name, mask in masks.items():
            edges = np.flatnonzero(np.diff(np.pad(mask.T.ravel().astype(int), 1)))
            pairs = zip(edges[::2] + first, edges[1::2] - edges[::2], strict=True)
            rows.append((name, " ".join(f"{start} {length}" for start, length in pairs) or "-1"))
        return {"data.rle_csv": write_list(to / "list.csv", rows), "data.rle": rle}

    return form


def as_png_release(settings: Settings, masks: dict[str, np.ndarray], to: Path) -> Settings:
    """Pictures and masks under one name in two folders, and a csv with the ids; the last film is not in it."""
    rows = []
    for i, (name, path) in enumerate(films_of(settings).items()):
        mask = masks.get(name, np.ones((SIZE, SIZE), bool))
        write_png(to / "png_images" / f"{i}_train_.png", read_film(path).pixels)
        write_png(to / "png_masks" / f"{i}_train_.png", mask)
        rows += [(f"{i}_train_.png", name, str(int(mask.any())))] if name in masks else []
    path = write_list(to / "stage_1_train_images.csv", rows, "new_filename,ImageId,has_pneumo")
    return {"data.dicom_dir": str(to / "png_images"), "data.masks": str(to / "png_masks"), "data.rle_csv": path}


FORMS = {
    "mask files": spread_over_mask_files,
    "SEG": as_segmentations,
    "PACS names": with_pacs_names,
    "positions from 1": as_positions("absolute", 1),
    "positions from 0": as_positions("absolute0", 0),
    "PNG release": as_png_release,
    "names with .dcm": with_names(lambda name: f"{name}.dcm"),
    "names with .png": with_names(lambda name: f"{name}.dcm.PNG"),
    "names with a path": with_names(lambda name: f"/data/siim/train/{name}.dcm"),
    "names with a Windows path": with_names(lambda name: f"D:\\siim\\{name}.png"),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_masks_of_the_list(original, tmp_path, form):
    settings, masks = original
    expected = masks_read(settings)
    assert len(expected) == 11 and {label for label, _ in expected.values()} == {0, 1}
    films = {"data.dicom_dir": settings["data.dicom_dir"]}
    assert masks_read(films | FORMS[form](settings, masks, tmp_path)) == expected


def test_segmentations_find_films_with_pacs_names(original, tmp_path):
    settings, masks = original
    read = masks_read(with_pacs_names_and_segmentations(settings, masks, tmp_path))
    assert all(name.startswith("IM") for name in read)
    assert sorted(read.values()) == sorted(masks_read(settings).values())


def test_patient_maps_and_holdouts_may_use_either_name_of_a_film(original, tmp_path):
    settings, masks = original
    renamed = as_png_release(settings, masks, tmp_path)
    names = list(masks)
    (tmp_path / "holdout.txt").write_text(f"{names[0]}\n1_train_.png\n")
    rows = [(name, f"P{i // 2}") for i, name in enumerate(names)]
    more = [f"data.patient_map={write_list(tmp_path / 'patients.csv', rows, 'ImageId,PatientKey')}"]
    run = run_of(renamed, *more, f"data.holdout_ids={tmp_path / 'holdout.txt'}", folder=tmp_path / "run")
    preprocess.write_shards(Task(run=run, stage="preprocess"))
    finalize(Task(run=run, stage="finalize"))
    cases = {case.id: case for case in read_cases(run.shard_dir)}
    assert cases.keys() == masks.keys()
    groups = [cases[name].group for name in names]
    assert groups[0] == groups[1] != groups[2] == groups[3]
    held = {name for name in names if cases[name].fold == -1}
    assert set(names[:2]) <= held
    assert not verify(run.shard_dir)


def test_the_hash_of_the_masks_is_recorded_and_a_changed_mask_is_noticed(original, tmp_path):
    settings, masks = original
    files = spread_over_mask_files(settings, masks, tmp_path) | {"data.dicom_dir": settings["data.dicom_dir"]}
    run = run_of(files, folder=tmp_path / "run")
    before = inputs_of(run, "preprocess", None)["masks"]
    for function in (preprocess.write_shards, finalize):
        function(Task(run=run, stage="preprocess"))
    audit, manifest = (json.loads((run.shard_dir / name).read_text()) for name in ("audit.json", "manifest.json"))
    assert audit["masks"] | {"unused": []} == {
        "folder": "masks", "sha256": before, "files": 17, "films": 11, "several_files": 3, "unused": [],
    }  # fmt: skip
    assert manifest["settings"]["masks_sha256"] == before and str(tmp_path) not in json.dumps(manifest)
    assert "Masks        masks: 17 files of 11 films" in (run.shard_dir / "audit.txt").read_text()
    path = next((tmp_path / "masks").glob("*_Mask_2.PNG"))
    pixels = np.asarray(Image.open(path)).copy()
    pixels[3, 3] ^= 1
    write_png(path, pixels)
    assert inputs_of(run, "preprocess", None)["masks"] != before
    for function in (preprocess.write_shards, finalize):
        with pytest.raises(ConfigError, match="annotation.* changed since its shards were written"):
            function(Task(run=run, stage="preprocess"))


def picture(mask: np.ndarray, mode: str) -> Image.Image:
    return Image.fromarray(mask * np.uint8(255)).convert(mode)


def transparent(mask: np.ndarray) -> Image.Image:
    image = picture(np.zeros_like(mask), "RGBA")
    image.putalpha(Image.fromarray(mask * np.uint8(255)))
    return image


def palette(mask: np.ndarray) -> Image.Image:
    image = Image.fromarray(mask.astype(np.uint8), "P")
    image.putpalette([0, 0, 0, 255, 255, 255])
    return image


@pytest.mark.parametrize(
    "make", [*(lambda m, mode=mode: picture(m, mode) for mode in ("1", "L", "LA", "RGB", "RGBA")), palette]
)
def test_pixels_above_0_are_inside_in_any_mode(original, tmp_path, make):
    mask = next(mask for mask in original[1].values() if mask.any())
    make(mask).save(tmp_path / "x.png")
    read, warned = read_mask(MaskFile("x.png", str(tmp_path / "x.png"), ""), "", mask.shape, 10**6)
    assert np.array_equal(read, mask) and read.dtype == bool and not warned


def test_a_mask_that_is_none_excludes_its_film_with_the_reason(original, tmp_path):
    settings, masks = original
    names, mask = list(films_of(settings)), next(mask for mask in masks.values() if mask.any())
    folder = tmp_path / "masks"
    write_png(folder / f"{names[0]}_mask.png", np.kron(mask, np.ones((2, 2), bool)))
    transparent(mask).save(folder / f"{names[1]}.png")
    write_png(folder / f"{names[2]}.png", np.stack([mask, mask, ~mask], 2) * np.uint8(255))
    write_png(folder / f"{names[3]}.png", ~mask)
    picture(mask, "L").save(folder / f"{names[4]}.png", "JPEG")
    (folder / f"{names[5]}.png").write_bytes(b"")
    shutil.copy(films_of(settings)[names[6]], folder / f"{names[6]}.png")
    write_png(folder / f"{names[7]}_mask1.png", mask)
    read = masks_read({"data.dicom_dir": settings["data.dicom_dir"], "data.masks": str(folder)})
    reasons = [
        f"mask {names[0]}_mask.png: 128 x 128 pixels, but its film has 64 x 64: export it at the film's size",
        "transparent pixels",
        "colour picture",
        "% of the film: it is inverted, or no mask",
        "not a PNG file",
        "not a PNG file",
        "not a PNG file",
    ]
    for name, reason in zip(names, reasons, strict=False):
        assert read[name][0] == -1 and reason in read[name][1]
    assert read[names[7]][0] == 1


def segmentation(film: Path, labels: list[str], masks: list[np.ndarray], fractional: bool = False) -> bytes:
    """Return a SEG of another program, with one segment for each label."""
    from highdicom.sr.coding import CodedConcept

    descriptions = [
        highdicom.seg.SegmentDescription(
            number,
            label,
            CodedConcept("85756007", "SCT", "Tissue"),
            CodedConcept("85756007", "SCT", "Tissue"),
            "MANUAL",
        )
        for number, label in enumerate(labels, 1)
    ]
    source = pydicom.dcmread(film)
    source.StudyID, source.StudyTime = "", "000000"
    seg = highdicom.seg.Segmentation(
        [source], np.stack(masks, -1)[None].astype(np.float32 if fractional else np.uint8),
        "FRACTIONAL" if fractional else "BINARY", descriptions, highdicom.UID(), 1, highdicom.UID(), 1, "x", "x", "1", "1",
    )  # fmt: skip
    path = film.with_suffix(".seg")
    seg.save_as(path)
    data = path.read_bytes()
    path.unlink()
    return data


def test_the_segments_called_pneumothorax_are_taken_and_ambiguous_ones_refused(original, tmp_path):
    settings, masks = original
    name, mask = next(item for item in masks.items() if item[1].any())
    film, lung = films_of(settings)[name], np.zeros((SIZE, SIZE), bool)
    lung[10:50, 5:30] = True
    left = mask & (np.arange(SIZE) < SIZE // 2)

    def read(*arguments, uid=name, film_uid=name, **options) -> tuple[np.ndarray, tuple[str, ...]]:
        path = tmp_path / "seg.dcm"
        path.write_bytes(segmentation(film, *arguments, **options))
        return read_mask(MaskFile("seg.dcm", str(path), "", uid), film_uid, (SIZE, SIZE), 10**6)

    taken, warned = read(["Lung", "Pneumothorax left", "PNEUMOTHORAX R"], [lung, left, mask & ~left])
    assert np.array_equal(taken, mask) and warned == ("DICOM SEG: segments called pneumothorax taken, others not",)
    taken, warned = read(["finding"], [mask])
    assert np.array_equal(taken, mask) and "only segment is not called pneumothorax" in warned[0]
    for arguments, options, reason in (
        ((["Lung", "finding"], [lung, mask]), {}, "seg.dcm: none of its 2 segments is called pneumothorax"),
        ((["pneumothorax"], [mask]), {"fractional": True}, "a fractional segmentation"),
        (
            (["pneumothorax"], [mask]),
            {"film_uid": "1.2.3"},
            "another SOP Instance UID than the one in the film's header",
        ),
        ((["pneumothorax"], [mask]), {"uid": "1.2.3", "film_uid": "1.2.3"}, "none of its frames refers to the film"),
    ):
        with pytest.raises(FilmError, match=reason):
            read(*arguments, **options)
    (tmp_path / "seg.dcm").write_bytes(segmentation(film, ["pneumothorax"], [mask])[:-200])
    with pytest.raises(FilmError, match="mask seg.dcm: "):
        read_mask(MaskFile("seg.dcm", str(tmp_path / "seg.dcm"), "", name), name, (SIZE, SIZE), 10**6)
    with pytest.raises(FilmError, match="64 x 64 pixels, but its film has 32 x 32"):
        read_mask(MaskFile("seg.dcm", str(tmp_path / "seg.dcm"), "", name), name, (32, 32), 10**6)


def test_masks_that_contradict_the_list_exclude_their_film(original, tmp_path):
    settings, masks = original
    release = as_png_release(settings, masks, tmp_path)
    path = Path(release["data.rle_csv"])
    rows = list(csv.reader(path.open()))
    positive = next(i for i, row in enumerate(rows) if row[2] == "1")
    empty = next(i for i, row in enumerate(rows) if row[2] == "0")
    gone = next(i for i, row in enumerate(rows) if row[2] == "1" and i != positive)
    odd = next(i for i, row in enumerate(rows) if row[2] == "0" and i != empty)
    rows[positive][2], rows[empty][2], rows[odd][2] = "0", "1", "yes"
    (tmp_path / "png_masks" / rows[gone][0]).unlink()
    with path.open("w") as file:
        csv.writer(file).writerows(rows)
    read = masks_read(release)
    for row, reason in (
        (positive, "has_pneumo=0, but the mask has"),
        (empty, "has_pneumo=1, but the mask is empty"),
        (gone, "has_pneumo=1, but the mask is missing"),
        (odd, "has_pneumo is 'yes', not 0 or 1"),
    ):
        assert read[rows[row][1]][0] == -1 and f"stage_1_train_images.csv:{row + 1}: {reason}" in read[rows[row][1]][1]


def test_submit_learns_beforehand_which_masks_cannot_work(original, tmp_path):
    settings, masks = original
    films = {"data.dicom_dir": settings["data.dicom_dir"]}
    release = as_png_release(settings, masks, tmp_path)
    name = next(iter(masks))
    for folder in ("empty", "other", "twice/heart", "twice/lung", "jpeg"):
        (tmp_path / folder).mkdir(parents=True)
    write_png(tmp_path / "other" / "scan7_seg.png", masks[name])
    write_png(tmp_path / "twice" / "heart" / f"{name}.png", masks[name])
    write_png(tmp_path / "twice" / "lung" / f"{name}.png", masks[name])
    picture(masks[name], "L").save(tmp_path / "jpeg" / f"{name}.jpg")
    picture(masks[name], "L").save(tmp_path / "jpeg" / f"{name}_mask.tif")
    write_png(tmp_path / "jpeg" / "1.png", masks[name])
    cases = [
        ({"data.masks": "/nowhere"}, "data.masks=/nowhere: no such folder"),
        ({"data.masks": "empty"}, r"no mask of the 12 films \(first: .*\.dcm\) among no files"),
        ({"data.masks": "other"}, r"first: .*\.dcm\) among its 1 files \(first: scan7_seg.png: no film has its name\)"),
        (
            {"data.masks": "jpeg"},
            r"among its 3 files \(first: .*\.jpg: JPEG blurs the edge of a mask: save it as PNG\)",
        ),
        ({"data.masks": "twice"}, "heart/.* and lung/.* both have the name of film .*: keep one"),
        ({"data.masks": films["data.dicom_dir"]}, "overlap, so masks would count as films"),
        ({"data.masks": str(Path(films["data.dicom_dir"]).parent)}, "overlap"),
        ({"data.masks": "png_masks", "data.rle_csv": settings["data.rle_csv"]}, "both hold masks: give one of them"),
        ({"data.rle_csv": release["data.rle_csv"]}, "no column EncodedPixels: .* data.masks=DIR"),
        (
            release | {"data.unannotated": "negative"},
            r"1 masks would be lost \(first: .*\) and their films count as neg",
        ),
    ]
    for change, reason in cases:
        changed = {key: str(tmp_path / value) if key == "data.masks" else value for key, value in change.items()}
        with pytest.raises(ConfigError, match=reason) as caught:
            check_source(run_of(films | changed))
        assert "\n" not in str(caught.value)


def test_what_is_not_used_is_said_before_anything_starts(original, tmp_path):
    settings, masks = original

    def said(settings: Settings, *more: str) -> str:
        run = run_of(settings, *more)
        source = read_source(run)
        return "\n".join(notes(source.truth, source.unannotated, run.config))

    assert said(settings) == (
        "1 films without annotation are dropped (data.unannotated=drop); if they have no pneumothorax, set "
        "data.unannotated=negative"
    )
    positives = [row for row in rows_of(settings) if row[1] != "-1"]
    listed = settings | {"data.rle_csv": write_list(tmp_path / "positives.csv", [*positives, ("other", "5 5")])}
    text = said(listed)
    assert (
        "8 films without annotation are dropped" in text and "1 rows belong to no film (first: positives.csv:" in text
    )
    assert (
        "positives.csv lists positive films only: without a negative film a fold has no specificity and no AUC" in text
    )
    assert "positive films only" not in said(listed, "data.unannotated=negative")
    release = as_png_release(settings, masks, tmp_path)
    write_png(tmp_path / "png_masks" / "99_train_.png", masks[positives[0][0]])
    picture(masks[positives[0][0]], "L").save(tmp_path / "png_masks" / "2_train__mask.tif")
    text = said(release)
    assert "1 films have a mask, but no row in stage_1_train_images.csv (first: " in text
    assert "2 files of png_masks are not used (first: 2_train__mask.tif: TIFF picture: convert it to PNG)" in text


def test_a_film_listed_without_mask_and_label_is_not_annotated(original, tmp_path):
    settings, masks = original
    release = as_png_release(settings, masks, tmp_path)
    path = Path(release["data.rle_csv"])
    path.write_text("\n".join(line.rpartition(",")[0] for line in path.read_text().splitlines()))
    first = next(line.partition(",") for line in path.read_text().splitlines()[1:])
    (tmp_path / "png_masks" / first[0]).unlink()
    assert masks_read(release) == {k: v for k, v in masks_read(settings).items() if k != first[2]}
    # No listed film has its mask, and a film that is not listed has one.
    write_png(tmp_path / "png_masks" / "other.png", np.ones((4, 4), bool))
    (tmp_path / "png_images" / "other.png").write_bytes((tmp_path / "png_images" / first[0]).read_bytes())
    path.write_text(f"new_filename,ImageId\n{first[0]},{first[2]}\n")
    with pytest.raises(ConfigError, match=r"no row belongs to any of the .* films .*a listed film has no mask"):
        check_source(run_of(release))


def two_labels(first: int, second: int) -> Callable[[np.ndarray], Image.Image]:
    def make(mask: np.ndarray) -> Image.Image:
        image = palette(mask)
        image.putpalette([first] * 3 + [second] * 3)
        return image

    return make


def in_blue(label: int, deep: bool = False) -> Callable[[np.ndarray], Image.Image | bytes]:
    def make(mask: np.ndarray) -> Image.Image | bytes:
        pixels = np.stack([mask, mask, mask] if deep else [0 * mask, 0 * mask, mask], 2) * label
        if deep:  # Pillow reads the upper 8 bits only
            return cv2.imencode(".png", pixels.astype(np.uint16))[1].tobytes()
        return Image.fromarray(pixels.astype(np.uint8))

    return make


@pytest.mark.parametrize("make", [in_blue(1), in_blue(2), in_blue(1, deep=True), two_labels(0, 0), two_labels(1, 1)])
def test_a_low_label_in_colours_is_refused_and_never_lost(original, tmp_path, make):
    mask = next(mask for mask in original[1].values() if mask.any())
    image = make(mask)
    (tmp_path / "x.png").write_bytes(image) if isinstance(image, bytes) else image.save(tmp_path / "x.png")
    with pytest.raises(FilmError, match="mask x.png: colour picture, or a palette with one colour for several labels"):
        read_mask(MaskFile("x.png", str(tmp_path / "x.png"), ""), "", mask.shape, 10**6)


def deflated(data: bytes) -> bytes:
    film = pydicom.dcmread(io.BytesIO(data))
    film.file_meta.TransferSyntaxUID = pydicom.uid.DeflatedExplicitVRLittleEndian
    out = io.BytesIO()
    film.save_as(out, enforce_file_format=True)
    return out.getvalue()


def test_deflated_films_and_segmentations_find_each_other_within_a_bound(original, tmp_path):
    settings, masks = original
    name, mask = next(item for item in masks.items() if item[1].any())
    (tmp_path / "films").mkdir()
    (tmp_path / "films" / "IM000001").write_bytes(deflated(films_of(settings)[name].read_bytes()))
    film = {"data.dicom_dir": str(tmp_path / "films")}
    expected = masks_read(settings)[name]
    assert masks_read(film | {"data.rle_csv": settings["data.rle_csv"]}) == {name: expected}
    (tmp_path / "seg").mkdir()
    path = tmp_path / "seg" / "1.dcm"
    path.write_bytes(deflated(seg_of(films_of(settings)[name], mask)))
    assert masks_read(film | {"data.masks": str(tmp_path / "seg")}) == {"IM000001": expected}
    seg = pydicom.dcmread(io.BytesIO(seg_of(films_of(settings)[name], mask)))
    seg.NumberOfFrames = 10_000
    seg.save_as(path)
    with pytest.raises(FilmError, match=r"10000 frames, more than 8 films of data.max_pixels: write one per film"):
        read_mask(MaskFile("1.dcm", str(path), "", name), name, mask.shape, 10**6)
    bomb = pydicom.dcmread(io.BytesIO(seg_of(films_of(settings)[name], mask)))
    bomb.PixelData = bytes(50_000_000)
    buffer = io.BytesIO()
    bomb.save_as(buffer)
    path.write_bytes(deflated(buffer.getvalue()))
    with pytest.raises(FilmError, match="cut-off deflated data, or more than a film within data.max_pixels can have"):
        read_mask(MaskFile("1.dcm", str(path), "", name), name, mask.shape, 10**6)


def test_headers_are_read_of_dicom_files_only(original, tmp_path):
    name, path = next(iter(films_of(original[0]).items()))
    film = pydicom.dcmread(path)
    write_png(tmp_path / "x.png", np.zeros((8, 8), np.uint8))
    (tmp_path / "text").write_text("no film" * 100)
    assert sop_uid(path) == film.SOPInstanceUID == name and seg_references(path) is None
    assert [sop_uid(tmp_path / other) for other in ("x.png", "text", "gone")] == [""] * 3

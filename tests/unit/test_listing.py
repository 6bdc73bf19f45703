"""Folders of films: ids, links, and every file that is no film named with the true reason."""

from __future__ import annotations

import io
import os
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pydicom.uid import DeflatedExplicitVRLittleEndian, ExplicitVRBigEndian, ImplicitVRLittleEndian

from pneumo_dist.data.films import listing
from pneumo_dist.data.films.dicom import FilmError, NotAnImage, parse_film
from pneumo_dist.data.films.listing import film_stem, find_films
from tests.film_files import dataset, film_bytes, grey, written

PIXELS = grey(20, 16)
DICOMDIR, PDF, SEG, REPORT = (
    "1.2.840.10008.1.3.10", "1.2.840.10008.5.1.4.1.1.104.1", "1.2.840.10008.5.1.4.1.1.66.4", "1.2.840.10008.5.1.4.1.1.88.11",
)  # fmt: skip


def listed(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"")
    return folder


def names(folder: Path, **options: bool) -> list[str]:
    return [name for name, _ in find_films(folder, **options)[0]]


def other_object(sop_class: str, **tags: object) -> bytes:
    """Return a DICOM object without an image."""
    no_pixels = dict.fromkeys(("PixelData", "Rows", "Columns", "BitsAllocated"))
    film = dataset(PIXELS, SOPClassUID=sop_class, **(no_pixels | tags))
    film.file_meta.MediaStorageSOPClassUID = sop_class
    return written(film)


def picture(kind: str) -> bytes:
    out = io.BytesIO()
    Image.fromarray(PIXELS).save(out, kind)
    return out.getvalue()


def test_both_layouts_give_stems_as_ids(tmp_path):
    deep = listed(tmp_path / "train", "s1/s2/1.2.9.dcm", "s3/s4/1.2.10.dcm", "s3/s4/notes.txt")
    films = [("1.2.10", "s3/s4/1.2.10.dcm"), ("1.2.9", "s1/s2/1.2.9.dcm")]
    assert find_films(deep) == (films, [("s3/s4/notes.txt", "empty file")])
    flat = listed(tmp_path / "test", "ID_0001.dcm", "ID_0002.DCM", ".DS_Store", "._ID_0001.dcm")
    films = [("ID_0001", "ID_0001.dcm"), ("ID_0002", "ID_0002.DCM")]
    assert find_films(flat) == (films, [(".DS_Store", "hidden"), ("._ID_0001.dcm", "hidden")])


def test_repeated_stems_become_relative_paths_and_ids_stay_unique(tmp_path):
    folder = listed(tmp_path, "a/x.dcm", "b/x.dcm", "b/y.dcm", "x.dcm.png", "x.dcm")
    assert names(folder) == ["a/x.dcm", "b/x.dcm", "x.dcm", "x.dcm.png", "y"]


def test_stems_lose_film_extensions_only():
    stems = [film_stem(name) for name in ("a/1.2.3.dcm", "1.2.3", "x.PNG", "y.tar.gz")]
    assert stems == ["1.2.3", "1.2.3", "x", "y.tar.gz"]


def test_links_out_of_the_folder_are_followed_on_request_and_loops_end(tmp_path):
    folder = listed(tmp_path / "films", "a/x.dcm")
    other = listed(tmp_path / "other", "y.dcm")
    listed(tmp_path, "z.dcm")
    (folder / "linked").symlink_to(other)
    (folder / "z.dcm").symlink_to(tmp_path / "z.dcm")
    (folder / "a" / "loop").symlink_to(folder)
    (folder / "inside.dcm").symlink_to(folder / "a" / "x.dcm")
    assert names(folder) == ["inside", "x", "y", "z"]
    films, ignored = find_films(folder, follow_links=False)
    assert [name for name, _ in films] == ["inside", "x"]
    assert [path for path, reason in ignored if "infer.follow_links=true" in reason] == ["linked", "z.dcm"]
    (tmp_path / "entry").symlink_to(folder)  # the folder itself may be a link
    assert find_films(tmp_path / "entry", follow_links=False) == (films, ignored)


def test_every_other_file_is_named_with_its_reason(tmp_path):
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("a.dcm", b"x")
    files = {
        "film.dcm.gz": (b"\x1f\x8b\x08\0", "compressed file or archive"),
        "export.zip": (archive.getvalue(), "compressed file or archive"),
        "scan.tif": (picture("TIFF"), "TIFF picture: convert it to PNG"),
        "scan.bmp": (picture("BMP"), "BMP picture: convert it to PNG"),
        "scan.gif": (picture("GIF"), "GIF picture: convert it to PNG"),
        "png_without": (picture("PNG"), "without the extension .png"),
        "jpeg_without": (picture("JPEG"), "without the extension .jpg"),
        "notes.txt": (b"BMI, not a bitmap", "not DICOM, PNG or JPEG"),
        "numbers": (np.arange(8, 600, dtype="<u2").tobytes(), "not DICOM, PNG or JPEG"),
        "void": (b"", "empty file"),
        ".hidden.dcm": (b"x", "hidden"),
        ".trash/film.dcm": (b"x", "hidden"),
        "DICOMDIR": (other_object(DICOMDIR), "not an image (Media Storage Directory Storage)"),
        "IM0001": (other_object(REPORT), "not an image (Basic Text SR Storage)"),
    }
    for name, (content, _) in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    listed(tmp_path, "odd\nname.dcm", "fine.dcm", "odd\x1bfolder/film.dcm")
    (tmp_path / os.fsdecode(b"latin-\xe9.dcm")).write_bytes(b"")
    (tmp_path / "gone.dcm").symlink_to(tmp_path / "nowhere")
    (tmp_path / "itself.dcm").symlink_to(tmp_path / "itself.dcm")
    os.mkfifo(tmp_path / "pipe.dcm")
    films, ignored = find_films(tmp_path)
    assert films == [("fine", "fine.dcm")]
    reasons = dict(ignored)
    for name, (_, reason) in files.items():
        assert reason in reasons.pop(name.split("/")[0])
    odd = ("odd\\nname.dcm", "odd\\x1bfolder", "latin-\\udce9.dcm")
    assert all("rename it" in reasons.pop(name) for name in odd)
    assert "No such file" in reasons.pop("gone.dcm") and "levels of symbolic links" in reasons.pop("itself.dcm")
    assert reasons == {"pipe.dcm": "not a regular file"}


def test_folders_and_files_without_permission_are_named(tmp_path, monkeypatch):
    listed(tmp_path, "closed/film.dcm", "film.dcm", "IM0001")
    scandir = os.scandir

    def refuse(path, *_rest, **_more):
        if str(path).endswith(("closed/", "IM0001")):
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    monkeypatch.setattr(listing, "open", refuse, raising=False)
    films, ignored = find_films(tmp_path)
    assert films == [("film", "film.dcm")]
    reasons = {
        "IM0001": "cannot be read (Permission denied)",
        "closed/": "the folder cannot be read (Permission denied)",
    }
    assert dict(ignored) == reasons


def test_a_film_extension_decides_without_opening_the_file(tmp_path, monkeypatch):
    listed(tmp_path, *(f"film.{end}" for end in ("dcm", "DICOM", "png", "jpg", "jpeg")))
    monkeypatch.setattr(listing, "open", None, raising=False)  # calling it raises
    assert len(find_films(tmp_path)[0]) == 5


@pytest.mark.parametrize("syntax", [ImplicitVRLittleEndian, ExplicitVRBigEndian, None])
@pytest.mark.parametrize("tags", [{}, {"ImageType": ["ORIGINAL", "PRIMARY"], "SpecificCharacterSet": "ISO_IR 100"}])
def test_films_without_preamble_or_extension_are_read(tmp_path, syntax, tags):
    film = dataset(PIXELS, **tags) if syntax is None else dataset(PIXELS, syntax=syntax, **tags)
    (tmp_path / "IM0001").write_bytes(written(film, preamble=False))
    (tmp_path / "1.2.3").write_bytes(film_bytes(PIXELS)[132:])  # the file meta information, but no preamble
    assert names(tmp_path) == ["1.2.3", "IM0001"]
    for name in names(tmp_path):
        assert np.array_equal(parse_film((tmp_path / name).read_bytes(), 10_000).pixels, PIXELS)


@pytest.mark.parametrize("sop_class", [DICOMDIR, PDF, SEG, REPORT])
def test_objects_without_an_image_are_no_unreadable_films(sop_class):
    for tags in ({}, {"Rows": 20, "Columns": 16, "BitsAllocated": 1}):
        with pytest.raises(NotAnImage, match=r"not an image \(.* Storage\)"):
            parse_film(other_object(sop_class, **tags), 10_000)
    bare = dataset(PIXELS, SOPClassUID=sop_class, PixelData=None, ImageType="DERIVED")
    with pytest.raises(NotAnImage):
        parse_film(written(bare, preamble=False), 10_000)
    deflated = dataset(PIXELS, syntax=DeflatedExplicitVRLittleEndian, SOPClassUID=sop_class)
    deflated.file_meta.MediaStorageSOPClassUID = sop_class
    with pytest.raises(NotAnImage):
        parse_film(written(deflated), 10_000)


def test_a_private_object_is_no_image_only_without_a_pixel_matrix():
    with pytest.raises(NotAnImage, match="private DICOM object"):
        parse_film(other_object("1.3.12.2.1107.5.9.1"), 10_000)
    assert parse_film(film_bytes(PIXELS, SOPClassUID="1.3.12.2.1107.5.9.1"), 10_000).pixels.shape == (20, 16)


def test_a_truncated_film_stays_unreadable():
    bare = written(dataset(PIXELS, PixelData=None, Rows=None, SOPClassUID=None), preamble=False)
    for data in (bare, *map(other_object, ("1.2.840.10008.5.1.4.1.1.7", "1.2.840.10008.5.1.4.1.1.1.1"))):
        with pytest.raises(FilmError, match="no pixel matrix") as caught:
            parse_film(data, 10_000)
        assert not isinstance(caught.value, NotAnImage)

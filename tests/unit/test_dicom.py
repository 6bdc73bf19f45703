"""Reading one film: every transfer syntax and pixel format, and what is refused by name."""

from __future__ import annotations

import io
import os
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pydicom.pixels import get_encoder
from pydicom.uid import (
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEGBaseline8Bit,
)

from pneumo_dist.data.films import codecs, dicom
from pneumo_dist.data.films.dicom import FilmError, parse_film, read_film
from tests.film_files import COMPRESSED, dataset, film_bytes, grey, jpeg, lut, written

LIMIT = 64_000_000
REAL = Path(os.environ.get("PNEUMO_REAL_DATA", Path(__file__).resolve().parents[3] / "shared" / "data"))
needs_real_films = pytest.mark.skipif(not REAL.is_dir(), reason=f"no real films in {REAL} (PNEUMO_REAL_DATA)")

# Decoders are part of the program, encoders are not: pylibjpeg-openjpeg, for JPEG 2000, may be missing.
ENCODABLE = [
    pytest.param(uid, marks=pytest.mark.skipif(not get_encoder(uid).is_available, reason=f"no encoder for {name}"))
    for name, uid in COMPRESSED.items()
]


def stretched(values: np.ndarray) -> np.ndarray:
    values = values.astype(np.float64)
    return np.floor((values - values.min()) / (values.max() - values.min()) * 255 + 0.5).astype(np.uint8)


@pytest.mark.parametrize("syntax", [ImplicitVRLittleEndian, ExplicitVRLittleEndian, *ENCODABLE])
@pytest.mark.parametrize("shape", [(64, 64), (48, 80), (65, 33)])
def test_eight_bits_come_back_as_stored_from_every_lossless_syntax(syntax, shape):
    pixels = grey(*shape)
    film = parse_film(film_bytes(pixels, syntax=syntax), LIMIT)
    assert np.array_equal(film.pixels, pixels)
    assert (film.sop_uid, film.view, film.sex) == ("1.2.3.4", "PA", "F")


@pytest.mark.parametrize("syntax", [ImplicitVRLittleEndian, ExplicitVRLittleEndian, *ENCODABLE])
@pytest.mark.parametrize(("bits", "signed"), [(10, False), (12, False), (16, False), (12, True), (16, True)])
def test_more_bits_are_spread_from_the_darkest_to_the_brightest_value(syntax, bits, signed):
    pixels = grey(40, 56, bits, signed)
    film = parse_film(film_bytes(pixels, bits, syntax), LIMIT)
    assert np.array_equal(film.pixels, stretched(pixels))


@pytest.mark.parametrize("bits", [8, 12, 16])
def test_big_endian_is_read(bits):
    pixels = grey(20, 30, bits)
    swapped = pixels.astype(pixels.dtype.newbyteorder(">"))
    film = dataset(pixels, bits)
    film.PixelData = swapped.tobytes()
    film["PixelData"].VR = "OB" if bits == 8 else "OW"
    film.file_meta.TransferSyntaxUID = ExplicitVRBigEndian
    out = io.BytesIO()
    film.save_as(out, implicit_vr=False, little_endian=False, enforce_file_format=True)
    assert np.array_equal(parse_film(out.getvalue(), LIMIT).pixels, pixels if bits == 8 else stretched(pixels))


def test_jpeg_baseline_gives_the_pixels_of_the_decoder_alone():
    pixels = grey(70, 90)
    film = parse_film(film_bytes(pixels, syntax=JPEGBaseline8Bit), LIMIT)
    assert np.array_equal(film.pixels, np.asarray(Image.open(io.BytesIO(jpeg(pixels)))))


def test_opencv_decodes_to_the_same_pixels_where_simplejpeg_is_missing(monkeypatch):
    stream = jpeg(grey(70, 90))
    one, first = codecs.decode(codecs.stream_of(stream))
    monkeypatch.setitem(__import__("sys").modules, "simplejpeg", None)
    other, second = codecs.decode(codecs.stream_of(stream))
    assert np.array_equal(one, other) and first.startswith("simplejpeg") and second.startswith("opencv")


@pytest.mark.parametrize("change", ["none", "monochrome1", "private", "two fragments"])
def test_the_short_way_through_a_plain_header_equals_pydicoms(change):
    film = dataset(grey(50, 60), syntax=JPEGBaseline8Bit)
    if change == "monochrome1":
        film.PhotometricInterpretation = "MONOCHROME1"
    if change == "private":
        film.add_new(0x00091001, "LO", "x")
    if change == "two fragments":
        from pydicom.encaps import encapsulate

        stream = jpeg(grey(50, 60))
        film.PixelData = encapsulate([stream], fragments_per_frame=2)
    data = written(film)
    short, long = dicom._read_plain(data, LIMIT, "x"), dicom._read_dicom(data, LIMIT, "x")
    assert short is not None
    assert np.array_equal(short.pixels, long.pixels)
    assert (short.sop_uid, short.view, short.sex, short.decoder) == (long.sop_uid, long.view, long.sex, long.decoder)


def test_monochrome1_is_the_exact_inverse():
    pixels = grey(40, 40)
    for syntax in (ExplicitVRLittleEndian, JPEGBaseline8Bit):
        twin = parse_film(film_bytes(pixels, syntax=syntax), LIMIT)
        film = parse_film(film_bytes(pixels, syntax=syntax, PhotometricInterpretation="MONOCHROME1"), LIMIT)
        assert np.array_equal(film.pixels, 255 - twin.pixels)


def test_the_first_window_is_applied_as_the_standard_says():
    pixels = grey(32, 32, 12)
    film = parse_film(film_bytes(pixels, 12, WindowCenter=[2048, 1], WindowWidth=[1000, 2]), LIMIT)
    x = pixels.astype(np.float64)
    wanted = np.clip((x - 2047.5) / 999 + 0.5, 0, 1)
    assert np.array_equal(film.pixels, np.floor(wanted * 255 + 0.5).astype(np.uint8))
    assert film.pixels.min() == 0 and film.pixels.max() == 255


@pytest.mark.parametrize(("function", "middle"), [("LINEAR_EXACT", 0.5), ("SIGMOID", 0.5)])
def test_other_voi_functions_meet_at_the_centre(function, middle):
    pixels = np.full((8, 8), 300, np.uint16)
    pixels[0, 0] = 0
    film = parse_film(film_bytes(pixels, 12, WindowCenter=300, WindowWidth=200, VOILUTFunction=function), LIMIT)
    assert film.pixels[4, 4] == 128 and film.pixels[0, 0] <= 1


def test_an_eight_bit_window_over_the_whole_range_changes_nothing():
    pixels = grey(32, 32)
    assert np.array_equal(parse_film(film_bytes(pixels, WindowCenter=128, WindowWidth=256), LIMIT).pixels, pixels)


def test_rescale_comes_before_the_window():
    pixels = grey(32, 32, 12)
    plain = parse_film(film_bytes(pixels, 12, WindowCenter=2000, WindowWidth=800), LIMIT)
    scaled = parse_film(
        film_bytes(pixels, 12, RescaleSlope=2, RescaleIntercept=-1000, WindowCenter=3000.5, WindowWidth=1599), LIMIT
    )
    assert np.abs(plain.pixels.astype(int) - scaled.pixels).max() <= 1  # rounding of the two window formulae


def test_a_negative_slope_inverts():
    pixels = grey(32, 32)
    film = parse_film(film_bytes(pixels, RescaleSlope=-1, RescaleIntercept=255), LIMIT)
    assert np.array_equal(film.pixels, 255 - pixels)


def test_signed_eight_bits_keep_their_order():
    pixels = grey(32, 32, 8, signed=True)
    assert np.array_equal(parse_film(film_bytes(pixels), LIMIT).pixels, (pixels.astype(int) + 128).astype(np.uint8))


def test_voi_and_modality_luts_are_applied():
    pixels = np.array([[0, 1, 2, 3, 4, 5]], np.uint8)
    film = parse_film(film_bytes(pixels, VOILUTSequence=lut([0, 0x8000, 0xFFFF], 1, 16)), LIMIT)
    assert film.pixels.tolist() == [[0, 0, 128, 255, 255, 255]]
    item = lut([10, 8, 6, 4, 2, 0], 0, 16)
    item[0].ModalityLUTType = "US"
    film = parse_film(film_bytes(pixels, ModalityLUTSequence=item), LIMIT)
    assert film.pixels.tolist() == [[255, 204, 153, 102, 51, 0]]


def test_bits_beyond_the_stored_ones_are_not_pixels():
    pixels = grey(16, 16, 12)
    film = dataset(pixels, 12)
    film.PixelData = (pixels | np.uint16(0x8000)).tobytes()  # an overlay in the highest bit, as old films have it
    assert np.array_equal(parse_film(written(film), LIMIT).pixels, stretched(pixels))
    high = dataset(pixels, 12, HighBit=15)
    high.PixelData = (pixels << 4).tobytes()
    assert np.array_equal(parse_film(written(high), LIMIT).pixels, stretched(pixels))


def test_padding_does_not_darken_the_film():
    pixels = np.full((8, 8), 1000, np.uint16)
    pixels[2:] = 2000
    pixels[:, 0] = 0
    film = parse_film(film_bytes(pixels, 12, PixelPaddingValue=0), LIMIT)
    assert (film.pixels[0, 1], film.pixels[7, 7], film.pixels[0, 0]) == (0, 255, 0)


def test_a_file_without_preamble_is_read_where_its_name_says_dicom(tmp_path):
    pixels = grey(20, 20)
    for syntax in (ImplicitVRLittleEndian, ExplicitVRLittleEndian):
        path = tmp_path / "film.dcm"
        path.write_bytes(written(dataset(pixels, syntax=syntax), preamble=False))
        assert np.array_equal(read_film(path).pixels, pixels)


@pytest.mark.parametrize(
    ("tags", "reason"),
    [
        ({"NumberOfFrames": 2}, "multi-frame image .2 frames"),
        ({"PhotometricInterpretation": "RGB"}, "colour image .*RGB"),
        ({"PhotometricInterpretation": "YBR_PARTIAL_420", "SamplesPerPixel": 3}, "colour image .*YBR_PARTIAL_420"),
        ({"PhotometricInterpretation": "PALETTE COLOR"}, "colour image .*PALETTE COLOR"),
        ({"Rows": 0}, "empty matrix"),
        ({"Rows": 60000, "Columns": 60000}, "more than data.max_pixels"),
        ({"Rows": None}, "Rows is missing"),
        ({"BitsAllocated": 32, "BitsStored": 32, "HighBit": 31}, "32 bits allocated"),
        ({"BitsStored": 17, "HighBit": 16}, "17 stored"),
        ({"PixelData": None}, "no pixel data"),
        ({"PixelData": b"\0" * 10}, "damaged .* pixel data"),
        ({"RescaleSlope": "1", "RescaleIntercept": "nan"}, "finite number|unusable rescale"),
    ],
)
def test_what_is_no_film_is_refused_by_name(tags, reason):
    with pytest.raises(FilmError, match=reason) as caught:
        parse_film(film_bytes(grey(16, 16), **tags), LIMIT)
    assert "SECRET" not in str(caught.value)


def test_a_colour_jpeg_declared_grey_is_refused():
    film = dataset(grey(16, 16), syntax=JPEGBaseline8Bit)
    from pydicom.encaps import encapsulate

    film.PixelData = encapsulate([jpeg(np.zeros((16, 16, 3), np.uint8))])
    with pytest.raises(FilmError, match="3 components"):
        parse_film(written(film), LIMIT)


@pytest.mark.parametrize("syntax", [JPEGBaseline8Bit, *ENCODABLE[:2]])
def test_the_compressed_size_must_be_the_headers_and_is_checked_before_decoding(syntax, monkeypatch):
    monkeypatch.setattr(codecs, "decode", lambda *_: pytest.fail("decoded before the check"))
    data = film_bytes(grey(32, 48), syntax=syntax, Rows=33)
    with pytest.raises(FilmError, match="header says 33 x 48, the compressed image is 32 x 48"):
        parse_film(data, LIMIT)
    with pytest.raises(FilmError, match="more than data.max_pixels=1000"):
        parse_film(film_bytes(grey(32, 48), syntax=syntax, Rows=10, Columns=10), 1000)


def test_a_jpeg_2000_stream_of_too_many_tiles_is_refused():
    sizes = struct.pack(">8I", 60000, 60000, 0, 0, 1, 1, 0, 0)
    stream = b"\xff\x4f\xff\x51" + struct.pack(">HH", 41, 0) + sizes + struct.pack(">H", 1) + b"\x07\x01\x01"
    with pytest.raises(FilmError, match="number of tiles"):
        codecs.stream_of(stream)


def test_a_large_file_is_refused_unread(tmp_path):
    path = tmp_path / "large.dcm"
    with open(path, "wb") as handle:
        handle.truncate(2 * 10_000 + dicom.HEADER_BYTES + 1)  # a sparse file
    with pytest.raises(FilmError, match="more than a film of data.max_pixels=10000"):
        read_film(path, max_pixels=10_000)


def png(pixels: np.ndarray, mode: str | None = None) -> bytes:
    out = io.BytesIO()
    image = Image.fromarray(pixels)
    (image.convert(mode) if mode else image).save(out, "PNG")
    return out.getvalue()


def test_png_and_jpeg_films_are_read():
    pixels = grey(30, 50)
    for mode in (None, "RGB", "RGBA", "LA"):
        assert np.array_equal(parse_film(png(pixels, mode), LIMIT).pixels, pixels)
    deep = grey(30, 50, 16)
    assert np.array_equal(parse_film(png(deep), LIMIT).pixels, stretched(deep.astype(np.float32)))
    assert parse_film(jpeg(pixels), LIMIT).pixels.shape == (30, 50)
    same = jpeg(np.dstack([pixels] * 3))
    assert parse_film(same, LIMIT).pixels.shape == (30, 50)


def test_colour_damaged_and_oversized_pictures_are_refused():
    colour = np.zeros((20, 20, 3), np.uint8)
    colour[..., 0] = 9
    for data, reason in (
        (png(colour), "colour picture"),
        (png(grey(20, 20))[:-40], "damaged picture"),
        (png(grey(30, 30)), "more than data.max_pixels"),
        (b"", "empty file"),
        (b"hello", "neither DICOM, PNG nor JPEG"),
    ):
        with pytest.raises(FilmError, match=reason):
            parse_film(data, 600)


@needs_real_films
def test_the_film_declared_monochrome1_is_the_inverse_of_its_twin():
    folder = REAL / "other-dicom"
    film, twin = (read_film(folder / f"siim-{name}.dcm") for name in ("declared-monochrome1", "monochrome2-twin"))
    assert film.pixels.shape == (1024, 1024) and np.array_equal(film.pixels, 255 - twin.pixels)


@needs_real_films
def test_the_uncompressed_implicit_nih_film_is_read():
    film = read_film(REAL / "other-dicom" / "nih-implicit-vr-uncompressed.dcm")
    assert film.pixels.shape == (1024, 1024) and film.pixels.std() > 20


@needs_real_films
def test_real_films_go_the_short_way_and_equal_pydicoms():
    paths = sorted((REAL / "siim-sample").rglob("*.dcm"))[::24]
    assert paths
    for path in paths:
        data = path.read_bytes()
        short, long = dicom._read_plain(data, LIMIT, ""), dicom._read_dicom(data, LIMIT, "")
        assert short is not None and np.array_equal(short.pixels, long.pixels)
        assert (
            (short.sop_uid, short.view, short.sex)
            == (long.sop_uid, long.view, long.sex)
            == (path.stem, long.view, long.sex)
        )

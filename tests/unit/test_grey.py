"""Grey of films whose headers are as archives have them: right, or full range with a warning, or refused; never black."""

from __future__ import annotations

import io
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pydicom.dataset import Dataset
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
)

from pneumo_dist.data.films import codecs
from pneumo_dist.data.films.dicom import FilmError, parse_film
from pneumo_dist.inference.reading import ReadJob, read_job
from tests.film_files import dataset, film_bytes, grey, lut, written

LIMIT = 1_000_000
ENCODINGS = [ImplicitVRLittleEndian, ExplicitVRLittleEndian, ExplicitVRBigEndian, DeflatedExplicitVRLittleEndian]
DEPTHS = [(bits, signed) for bits in range(8, 17) for signed in (False, True)]
IGNORED_WINDOW = "window that does not fit the film's values ignored"


def encoded(film: Dataset, syntax: str) -> bytes:
    """Return the bytes of an uncompressed film in an encoding."""
    if syntax != ExplicitVRBigEndian:
        film.file_meta.TransferSyntaxUID = syntax
        return written(film)
    film.file_meta.TransferSyntaxUID = syntax
    width = film.BitsAllocated // 8
    film.PixelData = np.frombuffer(film.PixelData, f"<u{width}").astype(f">u{width}").tobytes()
    for name in ("VOILUTSequence", "ModalityLUTSequence"):
        for item in film.get(name, []):
            if isinstance(item.LUTData, bytes):
                item["LUTData"].value = np.frombuffer(item.LUTData, "<u2").astype(">u2").tobytes()
    out = io.BytesIO()
    film.save_as(out, implicit_vr=False, little_endian=False, enforce_file_format=True)
    return out.getvalue()


def shown(fractions: np.ndarray) -> np.ndarray:
    return np.floor(np.clip(fractions, 0, 1) * 255 + 0.5).astype(np.uint8)


def spread(values: np.ndarray, low: float | None = None, high: float | None = None) -> np.ndarray:
    low, high = float(values.min() if low is None else low), float(values.max() if high is None else high)
    return shown((values.astype(float) - low) / (high - low))


def windowed(values: np.ndarray, centre: float, width: float) -> np.ndarray:
    return shown((values - (centre - 0.5)) / (width - 1) + 0.5)


def read(pixels: np.ndarray, bits: int | None = None, **tags: object):
    return parse_film(film_bytes(pixels, bits, **tags), LIMIT)


def right(film: object, wanted: np.ndarray) -> bool:
    return bool(np.abs(film.pixels.astype(int) - wanted).max() <= 1)


@pytest.mark.parametrize("syntax", ENCODINGS)
@pytest.mark.parametrize(("bits", "signed"), DEPTHS)
def test_a_window_in_every_encoding_and_depth(syntax, bits, signed):
    pixels = grey(20, 24, bits, signed)
    centre = 0.4 * 2**bits - (2 ** (bits - 1) if signed else 0)
    film = dataset(pixels, bits, WindowCenter=round(centre), WindowWidth=round(0.7 * 2**bits))
    result = parse_film(encoded(film, syntax), LIMIT)
    assert right(result, windowed(pixels.astype(float), round(centre), round(0.7 * 2**bits))) and not result.warnings


@pytest.mark.parametrize("syntax", ENCODINGS)
@pytest.mark.parametrize("words", [False, True])
@pytest.mark.parametrize(
    ("depth", "declared"), [(8, 8), (10, 10), (12, 12), (14, 14), (16, 16), (10, 16), (11, 16), (12, 16)]
)
@pytest.mark.parametrize("kind", ["VOI", "Modality"])
def test_look_up_tables_of_every_depth(kind, syntax, words, depth, declared):
    pixels = grey(20, 24, 12)
    entries = np.round((2**depth - 1) * (np.arange(4096) / 4095) ** 0.6).astype(int)
    film = dataset(pixels, 12)
    setattr(film, f"{kind}LUTSequence", lut(entries, 0, declared, words))
    wanted = shown(entries[pixels] / (2**depth - 1))
    if kind == "Modality":
        film.ModalityLUTSequence[0].ModalityLUTType = "US"
        film.WindowCenter, film.WindowWidth = 2 ** (depth - 1), 2**depth
    assert right(parse_film(encoded(film, syntax), LIMIT), wanted)


@pytest.mark.parametrize(("bits", "signed"), [(12, False), (12, True), (16, True)])
@pytest.mark.parametrize(("start", "count"), [(0, 4096), (0.25, 1000), (0.5, 500)])
@pytest.mark.parametrize("slope", [1, 0.5])
def test_values_beyond_a_look_up_table_take_its_ends(bits, signed, start, count, slope):
    pixels = grey(20, 24, bits, signed)
    values = np.rint(pixels.astype(int) * slope)
    first = int(values.min() + start * (values.max() - values.min()))
    entries = np.linspace(0, 65535, count).astype(int)
    sign = "SS" if values.min() < 0 else "US"
    film = dataset(
        pixels, bits, RescaleSlope=slope, RescaleIntercept=0, VOILUTSequence=lut(entries, first, 16, vr=sign)
    )
    wanted = shown(entries[np.clip(values - first, 0, count - 1).astype(int)] / 65535)
    result = parse_film(written(film), LIMIT)
    assert right(result, wanted) or (result.warnings and right(result, spread(pixels)))


def test_a_look_up_table_that_never_reaches_its_top_is_scaled_as_declared():
    pixels = grey(20, 24, 12)
    for top in (65535, 40000, 33000, 17000):
        entries = np.linspace(0, top, 4096).astype(int)
        assert right(read(pixels, 12, VOILUTSequence=lut(entries, 0, 16)), shown(entries[pixels] / 65535))


@pytest.mark.parametrize(
    ("top", "depth", "warning", "shown_by"),
    [
        (4095, 12, None, 4095),
        (1023, 12, None, 4095),
        (511, 12, "most of the film has few grey levels in its VOI LUT", 4095),
        (32767, 16, None, 65535),
        (16380, 16, None, 65535),
        (150, 12, "VOI LUT that does not fit the film's values ignored", None),
        (4095, 16, "LUT entries have 12 bits, the header says 16", 4095),
        (1023, 16, "LUT entries have 10 bits, the header says 16", 1023),
        (4095, 10, "LUT entries have 12 bits, the header says 10", 4095),
    ],
)
def test_entries_are_scaled_as_declared_or_with_a_warning(top, depth, warning, shown_by):
    pixels, entries = grey(80, 100, 12), np.linspace(0, top, 4096).astype(int)
    film = read(pixels, 12, VOILUTSequence=lut(entries, 0, depth))
    assert film.warnings == ((warning,) if warning else ())
    assert right(film, shown(entries[pixels] / shown_by) if shown_by else spread(pixels))


@pytest.mark.parametrize("kept", [4000, 2500])
def test_a_table_shorter_than_declared_ends_where_its_data_end(kept):
    pixels, entries = grey(20, 24, 12), np.arange(4096)
    sequence = lut(entries, 0, 12, words=True)
    sequence[0].LUTData = sequence[0].LUTData[: 2 * kept]
    wanted = shown(np.minimum(pixels, kept - 1) / 4095)
    assert right(read(pixels, 12, VOILUTSequence=sequence), wanted)


def test_look_up_tables_without_data_give_way_to_the_window_and_rescale():
    pixels, empty = grey(20, 24, 12), [Dataset()]
    empty[0].LUTExplanation = "NORMAL"
    film = read(pixels, 12, VOILUTSequence=empty, WindowCenter=2000, WindowWidth=3000)
    assert right(film, windowed(pixels, 2000, 3000)) and film.warnings == ("VOI LUT without data ignored",)
    film = read(pixels, 12, ModalityLUTSequence=empty, RescaleSlope=2, WindowCenter=4000, WindowWidth=6000)
    assert right(film, windowed(2 * pixels.astype(int), 4000, 6000))


@pytest.mark.parametrize("slope", [None, "", 1, 2, -1])
@pytest.mark.parametrize("intercept", [None, "", 0, -1024])
def test_rescale_values_may_be_missing_or_empty(slope, intercept):
    pixels = grey(20, 24, 12)
    values = pixels.astype(int) * (slope or 1) + (intercept or 0)
    film = dataset(pixels, 12, WindowCenter=float(values.mean()), WindowWidth=4000)
    for name, value in (("RescaleSlope", slope), ("RescaleIntercept", intercept)):
        if value is not None:
            setattr(film, name, value or None)
            if value == 0:
                setattr(film, name, 0)
    result = parse_film(written(film), LIMIT)
    assert right(result, windowed(values, float(values.mean()), 4000)) and not result.warnings


def test_numbers_with_a_decimal_comma_are_read():
    pixels = grey(20, 24, 12)
    data = film_bytes(
        pixels, 12, WindowCenter="2000.5", WindowWidth="3000.5", RescaleSlope="1.5", RescaleIntercept="0.5"
    )
    for text in (b"2000.5", b"3000.5", b"1.5", b"0.5"):
        data = data.replace(text, text.replace(b".", b","))
    assert right(parse_film(data, LIMIT), windowed(pixels * 1.5 + 0.5, 2000.5, 3000.5))


@pytest.mark.parametrize(("bits", "deeper"), [(8, 12), (8, 16), (10, 14), (12, 16)])
def test_the_window_of_a_deeper_original_is_not_applied(bits, deeper):
    pixels = grey(40, 50, bits)
    film = read(pixels, bits, WindowCenter=2 ** (deeper - 1), WindowWidth=2**deeper)
    assert film.warnings == (IGNORED_WINDOW,) and right(film, spread(pixels, 0, 2**bits - 1))


@pytest.mark.parametrize("bits", [8, 12, 16])
@pytest.mark.parametrize("centre", [-0.5, 1.5])
def test_the_next_window_serves_where_the_first_misses_the_film(bits, centre):
    pixels = grey(40, 50, bits)
    beside, fits = round(centre * 2**bits), 2 ** (bits - 1)
    film = read(pixels, bits, WindowCenter=[beside, fits], WindowWidth=[2**bits // 4, 2**bits])
    assert film.warnings == (IGNORED_WINDOW,) and right(film, windowed(pixels, fits, 2**bits))
    film = read(pixels, bits, WindowCenter=beside, WindowWidth=2**bits // 4)
    assert film.warnings == (IGNORED_WINDOW,) and right(film, spread(pixels))
    film = read(
        pixels,
        bits,
        VOILUTSequence=lut([0, 0, 1, 1], min(beside, 65500), 8, vr="US" if beside > 0 else "SS"),
        WindowCenter=fits,
        WindowWidth=2**bits,
    )
    assert film.warnings == ("VOI LUT that does not fit the film's values ignored",)
    assert right(film, windowed(pixels, fits, 2**bits))


@pytest.mark.parametrize("width", [1, 2, 10, 33, 60])
@pytest.mark.parametrize("part", [0.3, 0.5, 0.8])
def test_a_window_too_narrow_for_grey_levels_is_not_applied(width, part):
    pixels = grey(80, 100, 12)
    film = read(pixels, 12, WindowCenter=round(part * 4095), WindowWidth=width)
    assert film.warnings == (IGNORED_WINDOW,) and right(film, spread(pixels))


@pytest.mark.parametrize("share", [0, 0.5, 0.88])
@pytest.mark.parametrize("width", [1000, 1500, 3800])
def test_a_window_that_clips_little_is_kept_whatever_the_background_and_the_contrast(share, width):
    pixels = (2000 + (grey(100, 200, 12) / 4095 - 0.5) ** 3 * 4000).astype(np.uint16)  # most values are near 2000
    pixels[:, : round(200 * share)] = 1500
    film = read(pixels, 12, WindowCenter=2000, WindowWidth=width)
    assert right(film, windowed(pixels, 2000, width))
    assert film.warnings in ((), ("most of the film has few grey levels in its window",))
    assert bool(film.warnings) == (width == 3800)


@settings(max_examples=60, deadline=None)
@given(
    bits=st.sampled_from([8, 10, 12, 16]),
    signed=st.booleans(),
    centre=st.floats(-3, 3),
    width=st.floats(0, 20),
    slope=st.sampled_from([1.0, -1.0, 0.01, 40.0]),
)
def test_no_window_makes_a_film_dark_without_a_warning(bits, signed, centre, width, slope):
    pixels = grey(32, 40, bits, signed)
    window = {"WindowCenter": float(f"{centre * 2**bits:.4e}"), "WindowWidth": float(f"{width * 2**bits:.4e}")}
    film = read(pixels, bits, RescaleSlope=slope, RescaleIntercept=0, **window)
    dark, bright = np.percentile(film.pixels, [5, 95])
    assert bright - dark >= (20 if film.warnings else 31)
    if not film.warnings:
        assert right(film, windowed(pixels * slope, window["WindowCenter"], window["WindowWidth"]))


@pytest.mark.parametrize("limit", [None, 3900, 4095])
@pytest.mark.parametrize("signed", [False, True])
def test_padding_is_left_out_of_the_range(limit, signed):
    shift = 2048 if signed else 0
    pixels = (1000 + np.arange(2000).reshape(40, 50) - shift).astype(np.int16 if signed else np.uint16)
    film = pixels.copy()
    film[:, :5] = 4095 - shift
    if limit is not None:
        film[:, 5:8] = (limit + 4095) // 2 - shift
    tags = {"PixelPaddingValue": 4095 - shift} | ({} if limit is None else {"PixelPaddingRangeLimit": limit - shift})
    result = read(film, 12, **tags)
    inner = film[:, 8:].astype(int)
    assert right(result, spread(film.astype(int), inner.min(), inner.max()))
    # In two's complement of 16 bits as well: the header's VR may be that of unsigned values.
    assert np.array_equal(read(film, 12, **{name: value & 0xFFFF for name, value in tags.items()}).pixels if signed is False else result.pixels, result.pixels)  # fmt: skip


@pytest.mark.parametrize("marker", [(4095, 30), (0, 30), (4095, 1), (4095, 900)])
def test_a_marker_far_from_all_other_values_does_not_darken_the_film(marker):
    value, pixels = marker
    film = (1500 + np.arange(4000) // 4).astype(np.uint16).reshape(50, 80)
    film.flat[:pixels] = value
    lung = spread(film.astype(int), film[film != value].min(), film[film != value].max())
    result = read(film, 12)
    assert (
        right(result, np.where(film == value, 255 if value else 0, lung)) and "marker or border" in result.warnings[0]
    )


def test_few_values_far_from_all_others_are_told_where_they_set_the_range():
    film = (1500 + np.arange(4000) % 100).astype(np.uint16).reshape(50, 80)
    film.flat[:8] = np.linspace(0, 65535, 8)
    assert "few grey levels" in read(film, 16).warnings[0]


@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2", "MONOCHROME 2", None])
@pytest.mark.parametrize("shape", [None, "IDENTITY", "INVERSE"])
@pytest.mark.parametrize("bits", [8, 12])
def test_what_is_white(photometric, shape, bits):
    pixels = grey(20, 24, bits)
    tags = {"PhotometricInterpretation": photometric} | ({"PresentationLUTShape": shape} if shape else {})
    film = read(pixels, bits, **tags)
    plain = spread(pixels)
    assert right(film, 255 - plain if photometric == "MONOCHROME1" or shape == "INVERSE" else plain)
    contradiction = shape == "INVERSE" and photometric != "MONOCHROME1"
    assert any("inverse presentation LUT" in text for text in film.warnings) == contradiction
    assert any("no photometric interpretation" in text for text in film.warnings) == (photometric is None)


@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
@pytest.mark.parametrize("sign", [None, 1, -1])
def test_a_raw_image_shows_what_absorbs_as_white_and_says_so_in_every_output(photometric, sign, tmp_path):
    pixels = grey(20, 24, 12)
    tags = {"PhotometricInterpretation": photometric, "PresentationIntentType": "FOR PROCESSING"}
    path = tmp_path / "raw.dcm"
    path.write_bytes(film_bytes(pixels, 12, **tags, **({"PixelIntensityRelationshipSign": sign} if sign else {})))
    film = parse_film(path.read_bytes(), LIMIT)
    inverted = sign == 1 if sign else photometric == "MONOCHROME1"
    assert right(film, 255 - spread(pixels) if inverted else spread(pixels))
    answer = read_job(ReadJob(str(path), (32,), 64, LIMIT))
    assert answer.warnings == film.warnings and "FOR PROCESSING" in film.warnings[0]


@pytest.mark.parametrize("bits", [8, 12])
@pytest.mark.parametrize(
    "tags", [{}, {"WindowCenter": 100, "WindowWidth": 50}, {"PhotometricInterpretation": "MONOCHROME1"}]
)
def test_a_blank_film_is_unreadable(bits, tags):
    pixels = np.full((20, 24), 100, np.uint8 if bits == 8 else np.uint16)
    with pytest.raises(FilmError, match="blank image: every pixel is"):
        read(pixels, bits, **tags)


def palette(entries: list[np.ndarray], bits: int) -> dict[str, object]:
    tags: dict[str, object] = {"PhotometricInterpretation": "PALETTE COLOR"}
    for colour, values in zip(("Red", "Green", "Blue"), entries, strict=True):
        tags[f"{colour}PaletteColorLookupTableDescriptor"] = [len(values) % 65536, 0, bits]
        tags[f"{colour}PaletteColorLookupTableData"] = values.astype("<u2" if bits > 8 else np.uint8).tobytes()
    return tags


def test_a_grey_palette_is_read_and_a_coloured_one_refused():
    pixels, ramp = grey(20, 24), np.arange(256)
    for bits, entries in ((8, ramp[::-1]), (16, ramp * 257), (16, ramp)):
        film = read(pixels, **palette([entries] * 3, bits))
        assert right(film, shown(entries[pixels] / entries.max()))
    red = ramp.copy()
    red[90:] = 255
    with pytest.raises(FilmError, match="colour image .PALETTE COLOR.: films"):
        read(pixels, **palette([red, ramp, ramp], 8))
    assert right(read(pixels // 3, **palette([red, ramp, ramp], 8)), pixels // 3)  # no pixel has a colour
    few = read(pixels, **palette([ramp // 32 + 250 * (ramp == 255)] * 3, 8))
    assert few.warnings == ("most of the film has few grey levels in its palette",)
    with pytest.raises(FilmError, match="without its look-up tables"):
        read(pixels, PhotometricInterpretation="PALETTE COLOR")


@pytest.mark.parametrize("kind", ["PNG", "RGB", "YBR_FULL"])
def test_sixteen_bits_of_a_picture_or_of_colour_channels_are_mapped_as_those_of_a_film(kind):
    pixels = (grey(40, 50, 10) + 100).astype(np.uint16)
    pixels[0, 0] = 65535
    if kind == "PNG":
        out = io.BytesIO()
        Image.fromarray(pixels).save(out, "PNG")
        film = parse_film(out.getvalue(), LIMIT)
    else:
        others = pixels if kind == "RGB" else np.full_like(pixels, 32768)
        film = read(
            np.stack([pixels, others, others], axis=-1),
            SamplesPerPixel=3,
            PlanarConfiguration=0,
            PhotometricInterpretation=kind,
        )
    assert right(film, spread(pixels.astype(int), 100, 1123)) and "marker or border" in film.warnings[0]


@pytest.mark.parametrize("kind", ["RGB", "PALETTE COLOR"])
def test_a_window_of_colours_is_left_out_with_a_warning(kind):
    pixels = grey(20, 24)
    if kind == "RGB":
        tags = {"SamplesPerPixel": 3, "PlanarConfiguration": 0, "PhotometricInterpretation": kind}
    else:
        tags = palette([np.arange(256)] * 3, 8)
    film = read(np.dstack([pixels] * 3) if kind == "RGB" else pixels, WindowCenter=60, WindowWidth=80, **tags)
    assert np.array_equal(film.pixels, pixels) and "of a colour image ignored" in film.warnings[0]


@pytest.mark.parametrize(
    "missing", [("BitsStored", "HighBit"), ("HighBit",), ("PixelRepresentation",), ("SamplesPerPixel",)]
)
def test_missing_bits_have_their_usual_values(missing):
    pixels = grey(20, 24, 12)
    film = read(pixels, 12, WindowCenter=2048, WindowWidth=4096, **dict.fromkeys(missing))
    assert right(film, windowed(pixels, 2048, 4096))


def test_values_of_more_bits_than_declared_are_kept_unless_an_overlay_is_declared_there():
    pixels = grey(20, 24, 12)
    film = dataset(pixels, 10, WindowCenter=2048, WindowWidth=4096)
    result = parse_film(written(film), LIMIT)
    assert right(result, windowed(pixels, 2048, 4096)) and result.warnings == (
        "values have 12 bits, the header says 10",
    )
    film.add_new(0x60000102, "US", 10)
    result = parse_film(written(film), LIMIT)
    assert right(result, windowed(pixels & 1023, 2048, 4096)) and not result.warnings


@pytest.mark.parametrize("frames", [0, 1, ""])
def test_a_film_is_one_frame_whatever_the_header_counts(frames):
    pixels = grey(20, 24)
    assert np.array_equal(read(pixels, NumberOfFrames=frames).pixels, pixels)


def test_inflating_is_limited_and_a_mentioned_syntax_is_not_one():
    pixels = grey(20, 24)
    data = film_bytes(pixels, AvailableTransferSyntaxUID=DeflatedExplicitVRLittleEndian)
    assert np.array_equal(parse_film(data, LIMIT).pixels, pixels)
    for start in (data.index(b"DICM") + 4, data.index(b"\x08\0\x16\0UI")):  # without preamble, without group 0002
        assert np.array_equal(parse_film(data[start:], LIMIT, "film.dcm").pixels, pixels)
    whole = film_bytes(pixels, syntax=DeflatedExplicitVRLittleEndian)
    assert np.array_equal(parse_film(whole[whole.index(b"DICM") + 4 :], LIMIT, "film.dcm").pixels, pixels)
    for share in (0.95, 0.7):
        with pytest.raises(FilmError, match="cut-off deflated data|damaged"):
            parse_film(whole[: int(len(whole) * share)], LIMIT)
    film = dataset(pixels, syntax=DeflatedExplicitVRLittleEndian)
    bomb = written(film)[:400]
    start = bomb.index(b"1.2.840.10008.1.2.1.99") + 22
    deflater = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    bomb = bomb[:start] + b"".join(deflater.compress(bytes(1 << 24)) for _ in range(4)) + deflater.flush()
    with pytest.raises(FilmError, match="more than a film within data.max_pixels can have|damaged"):
        parse_film(bomb, 10_000)


def test_uncompressed_pixels_under_the_name_of_compressed_ones_are_read():
    pixels = grey(20, 24, 12)
    data = film_bytes(pixels, 12)
    old = b"UI\x14\x001.2.840.10008.1.2.1\0"
    for uid in (b"1.2.840.10008.1.2.4.70", b"1.2.840.10008.1.2.5\0"):
        named = data.replace(old, b"UI" + bytes([len(uid), 0]) + uid)
        assert named != data and right(parse_film(named, LIMIT), spread(pixels))
    with pytest.raises(FilmError, match="transfer syntax .* is not supported"):
        parse_film(data.replace(old, b"UI\x10\x001.2.840.113619\0\0"), LIMIT)


def test_the_tolerance_of_channels_is_that_of_rounding():
    pixels = np.repeat(grey(20, 24)[..., None], 3, axis=2)
    pixels[3, 4, 1] ^= 2
    assert codecs.one_channel(pixels).shape == (20, 24)
    pixels[3, 4, 1] ^= 4
    with pytest.raises(FilmError, match="channels differ"):
        codecs.one_channel(pixels)

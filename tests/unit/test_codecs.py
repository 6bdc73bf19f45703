"""Compressed pixel data of every codec: read exactly, whatever the header calls them, and refused if they are cut off."""

from __future__ import annotations

import os
import struct

import numpy as np
import pytest
from pydicom.encaps import encapsulate, get_frame
from pydicom.uid import JPEG2000Lossless, JPEGBaseline8Bit, JPEGLSLossless, RLELossless

from pneumo_dist.data.films import codecs
from pneumo_dist.data.films.dicom import FilmError, parse_film
from tests.film_files import ENCODERS, dataset, film_bytes, grey, jpeg, streamed_bytes, written
from tests.streams import extended_jpeg, lossless_jpeg

LIMIT = 1_000_000
FAMILY = "1.2.840.10008.1.2.4."


def encoded(pixels: np.ndarray, bits: int, syntax: str) -> bytes:
    """Return the stream that pydicom's encoder makes."""
    return bytes(get_frame(dataset(pixels, bits, syntax).PixelData, 0, number_of_frames=1))


def j2k(pixels: np.ndarray, bits: int) -> bytes:
    return encoded(pixels, bits, JPEG2000Lossless).rstrip(b"\0")


def without_length(stream: bytes) -> bytes:
    """Return a JPEG 2000 stream whose tile-part has length 0 (Psot): it extends to the end marker."""
    at = stream.index(b"\xff\x90") + 6
    return stream[:at] + bytes(4) + stream[at + 4 :]


def boxed(stream: bytes) -> bytes:
    """Return a JPEG 2000 stream in the boxes of a JP2 file."""
    boxes = [(b"jP  ", b"\r\n\x87\n"), (b"ftyp", b"jp2 \0\0\0\0jp2 "), (b"jp2h", bytes(8)), (b"jp2c", stream)]
    return b"".join(struct.pack(">I", len(content) + 8) + kind + content for kind, content in boxes)


def streams(pixels: np.ndarray, bits: int) -> dict[str, bytes]:
    """Return the pixels in every codec that keeps them exactly."""
    return {
        "lossless JPEG": lossless_jpeg(pixels, bits),
        "JPEG-LS": encoded(pixels, bits, JPEGLSLossless),
        "JPEG 2000": j2k(pixels, bits),
        "JPEG 2000 without length": without_length(j2k(pixels, bits)),
        "JPEG 2000 in JP2 boxes": boxed(j2k(pixels, bits)),
    }


def same_grey(data: bytes, pixels: np.ndarray, bits: int, **tags: object) -> bool:
    return np.array_equal(parse_film(data, LIMIT).pixels, parse_film(film_bytes(pixels, bits, **tags), LIMIT).pixels)


@pytest.mark.parametrize("bits", range(8, 17))
@pytest.mark.parametrize("predictor", range(1, 8))
def test_lossless_jpeg_of_every_precision_and_predictor(bits, predictor):
    pixels = grey(11, 13, bits)
    data = streamed_bytes(
        pixels, lossless_jpeg(pixels, bits, predictor), FAMILY + ("70" if predictor == 1 else "57"), bits
    )
    assert same_grey(data, pixels, bits)


def test_twelve_bit_jpeg_is_within_one_level_of_the_pixels():
    pixels = grey(40, 56, 12)
    stream = codecs.stream_of(extended_jpeg(pixels))
    decoded, name = codecs.decode(stream)
    assert stream.codec == codecs.JPEG_12 and name.startswith("python-gdcm")
    assert np.abs(decoded.astype(int) - pixels).max() <= 1
    film = parse_film(streamed_bytes(pixels, stream.data, FAMILY + "51", 12), LIMIT)
    assert np.abs(film.pixels.astype(int) - parse_film(film_bytes(pixels, 12), LIMIT).pixels).max() <= 1


@pytest.mark.parametrize("named", ["50", "51", "57", "70", "80", "81", "90", "91", ""])
def test_the_stream_decides_and_not_the_transfer_syntax(named):
    pixels = grey(40, 44, 12)
    uid = FAMILY + named if named else "1.2.840.10008.1.2.1"
    for name, stream in streams(pixels, 12).items():
        assert same_grey(streamed_bytes(pixels, stream, uid, 12), pixels, 12), name
    eight = grey(40, 44)
    film = parse_film(streamed_bytes(eight, jpeg(eight), uid), LIMIT)
    assert np.array_equal(film.pixels, parse_film(film_bytes(eight, syntax=JPEGBaseline8Bit), LIMIT).pixels)


@pytest.mark.parametrize(("bits", "signed"), [(10, False), (12, True), (16, False), (16, True)])
def test_values_keep_their_sign_in_every_codec(bits, signed):
    pixels = grey(40, 44, bits, signed)
    patterns = pixels.view(np.uint16) & np.uint16((1 << bits) - 1)
    made = streams(patterns, bits) | {"signed stream": j2k(pixels, bits)}
    for name, stream in made.items():
        assert same_grey(streamed_bytes(pixels, stream, FAMILY + "90", bits), pixels, bits), name


def test_a_stream_of_16_bits_holds_12_and_one_of_8_bits_may_be_declared_as_12():
    pixels = grey(40, 44, 12)
    for name, stream in streams(pixels, 16).items():
        assert same_grey(streamed_bytes(pixels, stream, FAMILY + "70", 12), pixels, 12), name
    eight = grey(40, 44).astype(np.uint16)
    for stream in (jpeg(eight.astype(np.uint8), 100), j2k(eight.astype(np.uint8), 8)):
        for bits in (8, 12):
            film = parse_film(streamed_bytes(eight, stream, FAMILY + "50", bits), LIMIT)
            assert np.abs(film.pixels.astype(int) - eight).max() <= 1
            assert bool(film.warnings) == (bits == 12)


def test_padding_after_the_end_marker_is_no_damage():
    pixels = grey(40, 44, 12)
    for name, stream in streams(pixels, 12).items():
        for padding in (b"\0", b"\0\0\0", b"\xff"):
            assert np.array_equal(codecs.decode(codecs.stream_of(stream + padding))[0], pixels), name


def cut_streams():
    eight, twelve = grey(40, 56), grey(40, 56, 12)
    yield "JPEG", eight, 8, jpeg(eight)
    yield "12-bit JPEG", twelve, 12, extended_jpeg(twelve)
    for name, stream in streams(twelve, 12).items():
        yield name, twelve, 12, stream


@pytest.mark.parametrize(
    ("name", "pixels", "bits", "stream"), list(cut_streams()), ids=lambda value: value if isinstance(value, str) else ""
)
def test_a_cut_off_stream_is_refused_with_and_without_an_end_marker(name, pixels, bits, stream):
    for share in (0.99, 0.95, 0.9, 0.7, 0.5, 0.3):
        cut = stream[: int(len(stream) * share)] if share < 0.99 else stream.rstrip(b"\0")[:-2]
        for end in (b"", codecs.END) if share < 0.95 else (b"",):
            with pytest.raises(FilmError, match="cut-off|damaged|no image"):
                parse_film(streamed_bytes(pixels, cut + end, FAMILY + "70", bits), LIMIT)


def test_cut_off_run_lengths_and_uncompressed_pixels_are_refused():
    pixels = grey(40, 56, 12)
    runs = encoded(pixels, 12, RLELossless)
    for share in (0.99, 0.9, 0.5, 0.1):
        with pytest.raises(FilmError, match="damaged RLE"):
            parse_film(streamed_bytes(pixels, runs[: int(len(runs) * share)], RLELossless, 12), LIMIT)
        film = dataset(pixels, 12)
        film.PixelData = film.PixelData[: int(len(film.PixelData) * share) // 2 * 2]
        with pytest.raises(FilmError, match="damaged uncompressed pixel data .* instead of 4480"):
            parse_film(written(film), LIMIT)


def test_decoders_are_asked_in_turn(monkeypatch):
    stream = codecs.stream_of(j2k(grey(40, 44, 12), 12))
    first, second = codecs.DECODERS[codecs.JPEG_2000]
    asked = []

    def broken(error):
        def decoder(_):
            asked.append(error)
            raise error

        return "first-package", decoder

    def use(*decoders):
        monkeypatch.setitem(codecs.DECODERS, codecs.JPEG_2000, decoders)

    for error in (ImportError(), RuntimeError("it fails")):
        use(broken(error), second)
        pixels, name = codecs.decode(stream)
        assert np.array_equal(pixels, first[1](stream)) and name.startswith("opencv")
    use(broken(FilmError("certainly damaged")), second)
    with pytest.raises(FilmError, match="certainly damaged"):
        codecs.decode(stream)
    use(broken(ImportError()), broken(RuntimeError("it fails 0x12")))
    with pytest.raises(FilmError, match="damaged JPEG 2000 data .it fails.$"):
        codecs.decode(stream)
    use(broken(ImportError()))
    with pytest.raises(FilmError, match="no decoder for JPEG 2000: install first-package"):
        codecs.decode(stream)


def test_the_installed_decoders_are_listed_by_name(monkeypatch):
    assert codecs.installed() == ["opencv-python-headless", "pylibjpeg-openjpeg", "python-gdcm", "simplejpeg"]
    monkeypatch.setattr(codecs, "versioned", lambda name: name if name == "python-gdcm" else f"{name} 1.0")
    assert "python-gdcm" not in codecs.installed()


def test_what_the_stream_declares_is_checked_before_it_is_decoded():
    pixels = grey(40, 44, 12)
    stream = lossless_jpeg(pixels, 12)
    at = stream.index(b"\xff\xc3") + 4
    for change, reason in (
        (stream[: at + 1] + struct.pack(">HH", 60000, 60000) + stream[at + 5 :], "more than data.max_pixels"),
        (stream[: at + 1] + struct.pack(">HH", 31, 44) + stream[at + 5 :], "the compressed image is 31 x 44"),
        (stream[: at + 5] + b"\x03" + stream[at + 6 :], "has 3 components"),
        (stream.replace(b"\xff\xc3", b"\xff\xc1"), "damaged"),
        (stream.replace(b"\xff\xc3\x00\x0b\x0c", b"\xff\xc1\x00\x0b\x10"), "JPEG stream of 16 bits"),
        (stream.replace(b"\xff\xc3", b"\xff\xc4"), "contains no image"),
        (bytes(2), "contains no image"),
    ):
        with pytest.raises(FilmError, match=reason):
            parse_film(streamed_bytes(pixels, change, FAMILY + "70", 12), LIMIT)


@pytest.mark.parametrize("syntax", ["uncompressed", "planes", "YBR_FULL_422", JPEGBaseline8Bit, JPEGLSLossless, JPEG2000Lossless, RLELossless])  # fmt: skip
@pytest.mark.parametrize("photometric", ["RGB", "YBR_FULL"])
def test_equal_channels_are_grey_in_every_codec_and_others_are_refused(syntax, photometric):
    pixels, tint = grey(40, 56), np.zeros((40, 56), np.uint8)
    tint[10:20] = 9
    # The decoder of JPEG makes red, green and blue of luminance and differences.
    equal = syntax == JPEGBaseline8Bit or (photometric == "RGB" and syntax != "YBR_FULL_422")
    for coloured in (False, True):
        other = pixels if equal else np.full_like(pixels, 128)
        film = coloured_film(np.stack([pixels, other, other ^ tint * coloured], axis=-1), photometric, syntax)
        if coloured:
            with pytest.raises(FilmError, match="colour image"):
                parse_film(film, LIMIT)
        else:
            distance = np.abs(parse_film(film, LIMIT).pixels.astype(int) - pixels)
            assert distance.max() <= (1 if syntax == JPEGBaseline8Bit else 0)


def coloured_film(channels: np.ndarray, photometric: str, syntax: str) -> bytes:
    """Return a film of three channels."""
    film = dataset(channels, SamplesPerPixel=3, PlanarConfiguration=0, PhotometricInterpretation=photometric)
    if syntax == "planes":
        film.PlanarConfiguration, film.PixelData = 1, channels.transpose(2, 0, 1).tobytes()
    elif syntax == "YBR_FULL_422":
        film.PhotometricInterpretation = syntax
        pairs = channels.reshape(-1, 2, 3)
        film.PixelData = np.concatenate([pairs[:, :, 0], pairs[:, 0, 1:]], axis=1).tobytes()
    elif syntax == JPEGBaseline8Bit:
        film.PixelData, film.file_meta.TransferSyntaxUID = encapsulate([jpeg(channels, 100)]), syntax
    elif syntax != "uncompressed":
        film.PhotometricInterpretation = "RGB"  # pydicom encodes no others
        film.compress(syntax, encoding_plugin=ENCODERS[syntax], generate_instance_uid=False)
        film.PhotometricInterpretation = photometric
    return written(film)


@pytest.mark.parametrize(("make", "bits"), [(lossless_jpeg, 8), (lossless_jpeg, 12), (extended_jpeg, 12)])
@pytest.mark.parametrize("damage", ["overwritten", "inserted"])
def test_damage_that_libjpeg_tells_on_stderr_only_is_refused(make, bits, damage, capfd):
    pixels = grey(40, 56, bits)
    stream, garbage = make(pixels, bits), bytes(range(1, 41))
    at = len(stream) * 3 // 5 if damage == "overwritten" else len(stream) - len(codecs.END)
    end = at + 40 if damage == "overwritten" else at
    with pytest.raises(FilmError, match="damaged JPEG data .*(bad Huffman code|extraneous bytes)"):
        parse_film(streamed_bytes(pixels, stream[:at] + garbage + stream[end:], FAMILY + "70", bits), LIMIT)
    parse_film(streamed_bytes(pixels, stream, FAMILY + "70", bits), LIMIT)
    assert capfd.readouterr().err == ""


def test_decoders_print_nothing_and_the_lines_of_others_are_kept(capfd):
    stream = bytearray(j2k(grey(40, 44, 12), 12))
    with pytest.raises(FilmError, match="damaged"):
        codecs.decode(codecs.stream_of(bytes(stream[: len(stream) // 2]) + codecs.END))
    with pytest.raises(RuntimeError), codecs._heard():
        os.write(2, b"a line\nInvalid SOS parameters for sequential JPEG\nof another thread\na line\n")
        raise RuntimeError
    os.write(2, b"and the next\n")
    assert capfd.readouterr().err == "a line\nof another thread\na line\nand the next\n"

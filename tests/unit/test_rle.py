"""Run-length masks: the competition's format, exact to the last pixel."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from pneumo_dist.data.films.rle import RleError, area_px, decode_rle, decode_union, encode_rle, runs

MASKS = arrays(bool, array_shapes(min_dims=2, max_dims=2, max_side=24))


def slow_decode(text: str, rows: int, columns: int) -> np.ndarray:
    """The competition's own loop, with its offsets from the end of the previous run."""
    flat, at = np.zeros(rows * columns, dtype=bool), 0
    tokens = [int(token) for token in text.split()]
    for offset, length in zip(tokens[::2], tokens[1::2], strict=True):
        at += offset
        flat[at : at + length] = True
        at += length
    return flat.reshape(columns, rows).T


@given(MASKS)
@settings(max_examples=300, deadline=None)
def test_decoding_inverts_encoding_and_agrees_with_the_plain_loop(mask):
    text = encode_rle(mask)
    assert np.array_equal(decode_rle(text, *mask.shape), mask)
    if mask.any():
        assert np.array_equal(slow_decode(text, *mask.shape), mask)
    else:
        assert text == "-1"


@given(MASKS, st.integers(0, 2**32 - 1))
@settings(max_examples=200, deadline=None)
def test_a_mask_cut_into_overlapping_rows_is_their_union(mask, seed):
    random = np.random.default_rng(seed)
    pieces = [mask & (random.random(mask.shape) < 0.6) for _ in range(3)]
    whole = pieces[0] | pieces[1] | pieces[2]
    texts = [encode_rle(piece) for piece in pieces]
    assert np.array_equal(decode_union(texts, *mask.shape), whole)
    area = whole.sum()
    assert area_px([runs(text) for text in texts]) == (area, sum(piece.sum() for piece in pieces) - area)


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(1, 30)), min_size=1, max_size=20), st.integers(0, 5))
@settings(max_examples=200, deadline=None)
def test_any_legal_text_decodes_as_the_plain_loop_says(pairs, spare):
    text = " ".join(f"{offset} {length}" for offset, length in pairs)
    pixels = sum(map(sum, pairs)) + spare
    assert np.array_equal(decode_rle(text, pixels, 1), slow_decode(text, pixels, 1))


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (1024, 1024), (700, 900)])
def test_full_and_empty_and_corner_masks_keep_the_last_pixel(shape):
    corner = np.zeros(shape, bool)
    corner[-1, -1] = True
    for mask in (np.ones(shape, bool), np.zeros(shape, bool), corner):
        assert np.array_equal(decode_rle(encode_rle(mask), *shape), mask)
    assert encode_rle(corner) == f"{corner.size - 1} 1"
    assert encode_rle(np.ones(shape)) == f"0 {corner.size}"


def test_columns_come_first_and_offsets_count_from_the_previous_end():
    mask = decode_rle("1 2 3 1", 4, 3)
    assert mask.astype(int).tolist() == [[0, 0, 0], [1, 0, 0], [1, 1, 0], [0, 0, 0]]


@pytest.mark.parametrize("text", ["-1", " -1", "-1 ", "\t-1\n"])
def test_minus_one_is_the_empty_mask_with_any_spaces(text):
    assert not decode_rle(text, 4, 4).any()


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "empty cell"),
        ("   ", "empty cell"),
        ("5", "odd number of values"),
        ("1 2 3", "odd number of values"),
        ("1 -2", "'-2'"),
        ("-1 3", "'-1'"),
        ("1 x", "'x'"),
        ("1 2.0", "'2.0'"),
        ("1 ٣", "is not a whole number"),
        ("99999999999 1", "at most 10 digits"),
        ("3 0", "length 0"),
        ("0 17", "past the 4 x 4 film"),
        ("9999999999 9999999999", "past the 4 x 4 film"),
    ],
)
def test_a_text_that_is_no_mask_says_why(text, reason):
    with pytest.raises(RleError, match=reason):
        decode_rle(text, 4, 4)


@given(st.text(alphabet="0123456789 -x\t.", max_size=40))
@settings(max_examples=500, deadline=None)
def test_any_text_is_decoded_or_refused(text):
    try:
        starts, ends = runs(text)
    except RleError:
        return
    assert (ends > starts).all() and (starts[1:] >= ends[:-1]).all()

"""Overlays and thumbnails of films, with contours and a caption.

A picture holds pixels, numbers and the film's id, never a name or another header value.
"""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray

Grey = NDArray[np.uint8]
Colour = NDArray[np.uint8]  # (rows, columns, 3) in OpenCV's order blue, green, red
Mask = NDArray[np.bool_]

PREDICTION = (60, 190, 255)  # orange
ANNOTATION = (220, 200, 60)  # light blue
INK, PAPER = (240, 240, 240), (32, 32, 32)


def contour(picture: Colour, mask: Mask, colour: tuple[int, int, int], width: int) -> None:
    """Draw a mask's outline into `picture` (of the same size), with a dark edge so that it is visible on any grey."""
    lines, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE)
    line_type = cv2.LINE_AA if width > 1 else cv2.LINE_8  # anti-aliasing would dim a line of one pixel
    cv2.drawContours(picture, lines, -1, (0, 0, 0), width + 2, line_type)
    cv2.drawContours(picture, lines, -1, colour, width, line_type)


def restore(square: Grey, rows: int, columns: int, least_px: int = 384) -> Grey:
    """Return a shard's square image in the film's aspect ratio, its longer side at least `least_px`."""
    longest = max(square.shape[0], least_px)
    shape = max(1, round(columns * longest / max(rows, columns))), max(1, round(rows * longest / max(rows, columns)))
    method = cv2.INTER_LINEAR if min(shape) > square.shape[0] else cv2.INTER_AREA
    return np.asarray(cv2.resize(square, shape, interpolation=method), np.uint8)


def fit_mask(mask: Mask, rows: int, columns: int) -> Mask:
    """Return the mask at a picture's size. A pixel that the mask touches is inside, so small masks stay visible."""
    if mask.shape == (rows, columns):
        return mask
    small = cv2.resize(mask.astype(np.float32), (columns, rows), interpolation=cv2.INTER_AREA)
    return np.asarray(small > 0)


def overlay(grey: Grey, mask: Mask, lines: list[str], truth: Mask | None = None) -> Colour:
    """Return a film with the contours of the masks, below a caption bar.

    Args:
        grey: the film at the picture's size.
        mask: the prediction at any size.
        lines: the caption, one or two short lines of ASCII.
        truth: the annotation at any size, drawn under the prediction.
    """
    rows, columns = grey.shape
    picture = cv2.cvtColor(grey, cv2.COLOR_GRAY2BGR)
    width = max(1, round(max(rows, columns) / 400))
    if truth is not None:
        contour(picture, fit_mask(truth, rows, columns), ANNOTATION, width)
    contour(picture, fit_mask(mask, rows, columns), PREDICTION, width)
    scale = max(0.4, columns / 1100)
    line_px = round(34 * scale)
    bar = np.full((line_px * len(lines) + round(10 * scale), columns, 3), PAPER, np.uint8)
    for i, line in enumerate(lines):
        colour = PREDICTION if i == 0 and mask.any() else INK
        size = scale * 0.95
        while size > 0.2 and cv2.getTextSize(line, cv2.FONT_HERSHEY_SIMPLEX, size, 1)[0][0] > columns - 16 * scale:
            size *= 0.9
        origin = (round(8 * scale), round(line_px * (i + 1) - 8 * scale))
        cv2.putText(bar, line, origin, cv2.FONT_HERSHEY_SIMPLEX, size, colour, max(1, round(2 * size)), cv2.LINE_AA)
    return np.asarray(np.vstack([bar, picture]), dtype=np.uint8)


def thumbnail(grey: Grey, mask: Mask) -> Colour:
    """Return a small film with the contour of the prediction; `grey` has the thumbnail's size."""
    picture = cv2.cvtColor(grey, cv2.COLOR_GRAY2BGR)
    contour(picture, fit_mask(mask, *grey.shape), PREDICTION, 1)
    return np.asarray(picture, dtype=np.uint8)


def png(image: NDArray[np.uint8], level: int = 3) -> bytes:
    """Encode grey or colour as PNG; equal images give equal bytes."""
    encoded, data = cv2.imencode(".png", image, [cv2.IMWRITE_PNG_COMPRESSION, level])
    if not encoded:
        raise RuntimeError("OpenCV could not encode a PNG")
    return data.tobytes()


def jpeg(image: NDArray[np.uint8], quality: int = 82) -> bytes:
    """Encode as JPEG; equal images give equal bytes."""
    encoded, data = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, quality])
    if not encoded:
        raise RuntimeError("OpenCV could not encode a JPEG")
    return data.tobytes()

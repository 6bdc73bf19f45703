"""Pictures for people: overlays and thumbnails with contour, score and verdict, readable at a glance.

Only pixels, numbers and a file's id go into a picture, never a name or another header value.
"""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray

Grey = NDArray[np.uint8]
Colour = NDArray[np.uint8]  # (rows, columns, 3), blue green red, as OpenCV has them
Mask = NDArray[np.bool_]

FOUND = (60, 190, 255)  # orange: the prediction
TRUTH = (220, 200, 60)  # light blue: the annotation
INK, PAPER = (240, 240, 240), (32, 32, 32)


def contour(picture: Colour, mask: Mask, colour: tuple[int, int, int], width: int) -> None:
    """Draw a mask's outline into `picture` (same size), with a dark edge so that it shows on any grey."""
    lines, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE)
    kind = cv2.LINE_AA if width > 1 else cv2.LINE_8  # smoothing would dim a line of one pixel
    cv2.drawContours(picture, lines, -1, (0, 0, 0), width + 2, kind)
    cv2.drawContours(picture, lines, -1, colour, width, kind)


def restore(square: Grey, rows: int, columns: int, least_px: int = 384) -> Grey:
    """Return a shard's square image with the film's aspect ratio, its longer side at least `least_px`."""
    longest = max(square.shape[0], least_px)
    shape = max(1, round(columns * longest / max(rows, columns))), max(1, round(rows * longest / max(rows, columns)))
    grown = min(shape) > square.shape[0]
    return np.asarray(cv2.resize(square, shape, interpolation=cv2.INTER_LINEAR if grown else cv2.INTER_AREA), np.uint8)


def fit_mask(mask: Mask, rows: int, columns: int) -> Mask:
    """Return the mask at a picture's size: inside where any of it falls, so that small findings stay visible."""
    if mask.shape == (rows, columns):
        return mask
    small = cv2.resize(mask.astype(np.float32), (columns, rows), interpolation=cv2.INTER_AREA)
    return np.asarray(small > 0)


def overlay(grey: Grey, mask: Mask, lines: list[str], truth: Mask | None = None) -> Colour:
    """Return a film with contours and a caption bar above it.

    Args:
        grey: the film, at most PICTURE_PX wide and high.
        mask: the prediction at any size.
        lines: the caption, one or two short lines; ASCII.
        truth: the annotation, drawn below the prediction.
    """
    rows, columns = grey.shape
    picture = cv2.cvtColor(grey, cv2.COLOR_GRAY2BGR)
    width = max(1, round(max(rows, columns) / 400))
    if truth is not None:
        contour(picture, fit_mask(truth, rows, columns), TRUTH, width)
    contour(picture, fit_mask(mask, rows, columns), FOUND, width)
    scale = max(0.4, columns / 1100)
    step = round(34 * scale)
    bar = np.full((step * len(lines) + round(10 * scale), columns, 3), PAPER, np.uint8)
    for i, line in enumerate(lines):
        colour = (FOUND if mask.any() else INK) if i == 0 else INK
        size = scale * 0.95
        while size > 0.2 and cv2.getTextSize(line, cv2.FONT_HERSHEY_SIMPLEX, size, 1)[0][0] > columns - 16 * scale:
            size *= 0.9
        origin = (round(8 * scale), round(step * (i + 1) - 8 * scale))
        cv2.putText(bar, line, origin, cv2.FONT_HERSHEY_SIMPLEX, size, colour, max(1, round(2 * size)), cv2.LINE_AA)
    return np.asarray(np.vstack([bar, picture]), dtype=np.uint8)


def thumbnail(grey: Grey, mask: Mask) -> Colour:
    """Return a small film with the contour of the prediction; `grey` is at its size already."""
    picture = cv2.cvtColor(grey, cv2.COLOR_GRAY2BGR)
    contour(picture, fit_mask(mask, *grey.shape), FOUND, 1)
    return np.asarray(picture, dtype=np.uint8)


def png(image: NDArray[np.uint8], level: int = 3) -> bytes:
    """Encode grey or colour as PNG; equal images give equal bytes."""
    done, data = cv2.imencode(".png", image, [cv2.IMWRITE_PNG_COMPRESSION, level])
    if not done:
        raise RuntimeError("OpenCV could not encode a PNG")
    return data.tobytes()


def jpeg(image: NDArray[np.uint8], quality: int = 82) -> bytes:
    """Encode as JPEG; equal images give equal bytes."""
    done, data = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, quality])
    if not done:
        raise RuntimeError("OpenCV could not encode a JPEG")
    return data.tobytes()

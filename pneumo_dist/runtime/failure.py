"""Errors that are not programming errors: a full disk, a diverged training, a lost rank.

Such an error is printed as one line with the rank and the node; any other error keeps its traceback.
"""

from __future__ import annotations

import errno

# Errors of a disk that is full, read-only or failing. A missing file is not among them: that is a programming error.
_DISK = (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.EIO,
    errno.ESTALE,
)


class Failure(RuntimeError):
    """Something outside the program failed; the text says what, where, and what to do."""


def disk_error(error: BaseException | None) -> OSError | None:
    """Return the disk error that `error` is or was raised while handling; None where there is none."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in _DISK:
            return error
        error = error.__context__
    return None


def error_line(error: BaseException) -> str | None:
    """Return the error as one line, or None for a programming error, which needs its traceback."""
    known = disk_error(error) is error or isinstance(error, (Failure, FloatingPointError))
    return " ".join(str(error).split()) if known else None

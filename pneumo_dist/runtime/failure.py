"""What ends a job without being a mistake in the program: a full disk, a diverged training, another rank's end.

Such an error is told in one line with the rank and the node; everything else keeps its traceback.
"""

from __future__ import annotations

import errno

# What a file system answers when it cannot take or give what is asked for. A missing file is no such thing.
_DISK = (
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ESTALE,
)  # fmt: skip


class Failure(RuntimeError):
    """Something outside the program went wrong; the text says what, where, and what to do."""


def disk_error(error: BaseException | None) -> OSError | None:
    """Return what the disk answered, where an error is that or was raised in its wake; None for any other."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in _DISK:
            return error
        error = error.__context__
    return None


def error_line(error: BaseException) -> str | None:
    """Return the one line that says it all, or None for an error that needs its traceback."""
    known = disk_error(error) is error or isinstance(error, (Failure, FloatingPointError))
    return " ".join(str(error).split()) if known else None

"""List the films of a folder, and name every other file with the reason why it is not read.

A film extension decides without opening the file; of any other file only the first bytes are read.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from pneumo_dist.data.films.header import VRS, walk

EXTENSIONS = (".dcm", ".dicom", ".png", ".jpg", ".jpeg")
HEAD_BYTES = 512  # holds the SOP class of a file with preamble, and mostly of one without
SOP_CLASSES = (0x00020002, 0x00080016)

# What the first bytes of other files say about them.
OTHER_KINDS = {
    rb"\x1f\x8b|PK\x03\x04|BZh|\xfd7zXZ|7z\xbc\xaf|Rar!|.{257}ustar": "compressed file or archive: unpack it",
    rb"II[*+]\0|MM\0[*+]": "TIFF picture: convert it to PNG",
    rb"BM.{4}\0{4}": "BMP picture: convert it to PNG",
    rb"GIF8": "GIF picture: convert it to PNG",
    rb"\x89PNG\r\n\x1a\n": "PNG picture without the extension .png: rename it",
    rb"\xff\xd8\xff": "JPEG picture without the extension .jpg or .jpeg: rename it",
}


def find_films(folder: Path, follow_links: bool = True) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """Return ([(id, path)] sorted by id, [(path, reason)] of all other files); paths are relative to `folder`.

    An id is the file's stem, or the relative path of files whose stems repeat.

    Args:
        follow_links: follow symbolic links that lead out of the folder; those within it are always followed.
    """
    paths, ignored = [], []
    for path, reason in _files(str(folder), follow_links):
        if reason:
            ignored.append((printable(path), reason))
        else:
            paths.append(path)
    counts = Counter(map(film_stem, paths))
    films = [(stem if counts[stem := film_stem(path)] == 1 else path, path) for path in paths]
    # The relative path of one film may equal the stem of another ("x.dcm" and "x.dcm.png"): both then take their path.
    names = Counter(name for name, _ in films)
    return sorted((name if names[name] == 1 else path, path) for name, path in films), sorted(ignored)


def film_stem(path: str) -> str:
    """Return a file's name without its film extension; a UID without extension keeps its last component."""
    name = path.rpartition("/")[2]
    stem, suffix = os.path.splitext(name)
    return stem if suffix.lower() in EXTENSIONS else name


def printable(path: str) -> str:
    """Return a path with control characters and undecodable bytes escaped, as a csv file can hold it."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in path)


def ignored_text(ignored: Iterable[tuple[str, str]]) -> str:
    """Return the number of ignored files and their most frequent reasons as text."""
    reasons = Counter(reason for _, reason in ignored)
    shown = "; ".join(f"{count} x {reason}" for reason, count in reasons.most_common(3))
    return f"{reasons.total()} other files" + (f": {shown}" if shown else "")


def _files(folder: str, follow_links: bool) -> Iterator[tuple[str, str]]:
    """Yield (relative path, reason why the file is not read, "" for a film); each real folder is visited once."""
    home, waiting = os.path.realpath(folder), [""]
    seen: set[tuple[int, int]] = set()
    while waiting:
        prefix = waiting.pop()
        place = os.path.join(folder, prefix)
        try:
            status = os.stat(place)
            if (status.st_dev, status.st_ino) in seen:
                continue
            seen.add((status.st_dev, status.st_ino))
            with os.scandir(place) as found:
                entries = sorted(found, key=lambda entry: entry.name)
        except OSError as error:
            yield prefix or ".", f"the folder cannot be read ({error.strerror})"
            continue
        folders = []
        for entry in entries:
            reason = _entry_reason(entry, home, follow_links)
            if not reason and entry.is_dir():
                folders.append(f"{prefix}{entry.name}/")
            else:
                yield prefix + entry.name, reason or file_reason(entry.path)
        waiting += reversed(folders)


def _entry_reason(entry: os.DirEntry[str], home: str, follow_links: bool) -> str:
    """Return why an entry of a folder is neither opened nor searched, "" if it is."""
    if entry.name.startswith("."):
        return "hidden"
    if not entry.name.isprintable():
        return "its name has control characters or is not UTF-8: rename it"
    if entry.is_symlink():
        try:
            os.stat(entry.path)
        except OSError as error:
            return f"broken symbolic link ({error.strerror})"
        if not follow_links and os.path.commonpath((home, os.path.realpath(entry.path))) != home:
            return "symbolic link out of the folder: set infer.follow_links=true to read it"
    return "" if entry.is_dir() or entry.is_file() else "not a regular file"


def file_reason(path: str) -> str:
    """Return why a regular file is no film, "" if it may be one."""
    if os.path.splitext(path)[1].lower() in EXTENSIONS:
        return ""
    try:
        with open(path, "rb", buffering=0) as handle:
            head = handle.read(HEAD_BYTES)
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    elements = dicom_head(head)
    if elements is not None:
        return no_image_reason(elements)
    for pattern, reason in OTHER_KINDS.items():
        if re.match(pattern, head, re.DOTALL):
            return reason
    return "not DICOM, PNG or JPEG" if head else "empty file"


def object_reason(path: Path) -> str:
    """Return why a DICOM file of any name is no image, as far as its first bytes tell; "" for any other file."""
    try:
        with path.open("rb", buffering=0) as handle:
            elements = dicom_head(handle.read(HEAD_BYTES))
    except OSError:
        return ""
    return no_image_reason(elements) if elements else ""


def dicom_head(data: bytes) -> dict[int, bytes] | None:
    """Return the raw values by tag of a DICOM file's first group, as far as `data` goes; None for other files.

    A file without preamble begins with an element of group 0002 or 0008; its VR may be implicit, or big endian.
    """
    preamble = data[128:132] == b"DICM"
    at = 132 if preamble else 0
    order = "<" if preamble or data[:2] != b"\0\x08" else ">"
    explicit = data[at + 4 : at + 6] in VRS
    elements: dict[int, bytes] = {}
    last, first_group = -1, 0
    for tag, _, start, length in walk(data, at, order, explicit):
        first_group = first_group or tag >> 16
        if tag <= last or first_group not in (2, 8):
            return elements if preamble else None
        if tag >> 16 != first_group or start + length > len(data):
            break
        last = tag
        elements[tag] = data[start : start + length]
    return elements if elements or preamble else None


def no_image_reason(elements: dict[int, bytes]) -> str:
    """Return why an object with these first elements is no image, "" for an image or an unknown SOP class."""
    from pydicom.uid import UID_dictionary

    uid = next((elements[tag] for tag in SOP_CLASSES if tag in elements), b"")
    name = UID_dictionary.get(uid.decode("ascii", "replace").strip(" \0"), ("",))[0]
    return f"not an image ({name})" if "Storage" in name and "Image" not in name else ""

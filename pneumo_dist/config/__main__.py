"""Print every key of the configuration with type, default and meaning, made from the schema."""

from __future__ import annotations

import argparse
import os
import sys
from itertools import groupby
from typing import Any, get_args, get_origin

from pneumo_dist.config.loading import nearest, word
from pneumo_dist.config.schema import Config, Key, keys

_WIDEST_DEFAULT = 16  # the meaning of a key with a longer default (the grids) goes to the next line


def _type(kind: Any) -> str:
    """Return `str`, `str or null`, `list of str`."""
    names = ["null" if item is type(None) else item.__name__ for item in get_args(kind) or (kind,)]
    return ("list of " if get_origin(kind) is list else "") + " or ".join(names)


def _matches(name: str, key: Key, word: str) -> bool:
    """Tell whether the key or its meaning contains the word; a word that ends in a dot (`loss.`) matches keys only."""
    return word in name or (not word.endswith(".") and word in key.meaning.lower())


def table(listed: dict[str, Key]) -> str:
    """Return an aligned table of the keys with a heading for each section."""
    rows = [(name, _type(key.type), word(key.default), key.meaning) for name, key in listed.items()]
    name_width, type_width = (max(len(row[column]) for row in rows) for column in (0, 1))
    lines: list[str] = []
    for section, group in groupby(rows, lambda row: row[0].rpartition(".")[0]):
        about = type(getattr(Config(), section)) if section else Config
        lines += ["", f"{section}: {about.__doc__}" if section else str(about.__doc__)]
        for name, kind, default, meaning in group:
            start = f"  {name:{name_width}}  {kind:{type_width}}  "
            gap = "\n" + " " * (len(start) + _WIDEST_DEFAULT) if len(default) > _WIDEST_DEFAULT else ""
            lines.append(f"{start}{default:{_WIDEST_DEFAULT}}{gap}  {meaning}")
    return "\n".join(lines[1:])


def main(arguments: list[str] | None = None) -> int:
    """Print the table; return 2 when no key matches the word."""
    parser = argparse.ArgumentParser(
        prog="python -m pneumo_dist.config",
        description="List every key of the configuration with type, default and meaning. "
        "A key is set in a recipe (configs/*.yaml) or as key=value on the command line of launch/submit.py.",
    )
    parser.add_argument(
        "word", nargs="?", default="", help="list only keys with this word in their name (loss.) or meaning"
    )
    wanted = parser.parse_args(arguments).word.lower()
    listed = {name: key for name, key in keys().items() if _matches(name, key, wanted)}
    if not listed:
        print(f"error: no key has {wanted!r} in its name or meaning{nearest(wanted, list(keys()))}", file=sys.stderr)
        return 2
    try:
        print(table(listed), flush=True)
    except BrokenPipeError:  # the reader of the pipe has exited, for example `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The argument parser of both commands: a mistake on the command line becomes one line. Standard library only."""

from __future__ import annotations

import argparse
from typing import NoReturn


class UsageError(Exception):
    """A mistake on the command line: one line, exit status 2."""


class Parser(argparse.ArgumentParser):
    """A parser that raises where argparse prints its usage and exits."""

    def error(self, message: str) -> NoReturn:
        """Raise UsageError with argparse's message."""
        raise UsageError(f"{message} (--help shows examples)")

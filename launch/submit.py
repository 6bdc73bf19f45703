"""Submit a stage or the whole chain: `python launch/submit.py --stage 1 --nodes 2`; `--help` shows examples.

Any Python starts this file; it continues under one that has the requirements (launch/bootstrap.py).
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if __name__ == "__main__":
    # `launch` is a package of the repository, so the import path needs the folder above in place of this one.
    sys.path[0] = str(Path(os.path.abspath(__file__)).parents[1])

from launch import bootstrap

if TYPE_CHECKING:
    from launch.planning.arguments import Request


def main(arguments: list[str] | None = None) -> int:
    """Carry out the command line and return the exit status.

    0 done or submitted, 1 a job failed or could not be submitted, 2 a mistake to correct, 130 or 143 a signal.
    """
    if sys.version_info < bootstrap.OLDEST:  # older Pythons cannot import the modules below
        bootstrap.ensure()
    from launch.planning.arguments import parse
    from launch.planning.parser import UsageError

    try:
        request = parse(sys.argv[1:] if arguments is None else arguments)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if arguments is None:  # typed by a person, under whatever Python it was
        bootstrap.ensure(slurm=request.cluster == "slurm" or request.dry_run)
    from launch.monitor.display import plain_output

    with plain_output():
        return _carry_out(request)


def _carry_out(request: Request) -> int:
    from launch.submission import run
    from pneumo_dist.config import ConfigError

    try:
        return run(request)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader has gone, for example `| head`
        # Python flushes the output once more at its exit, which would raise the same error again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 130
    except OSError as error:  # a full disk or a lost file system: the message names the cause and the file
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())

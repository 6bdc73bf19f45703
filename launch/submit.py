"""Submit a stage or the whole chain: `python launch/submit.py --stage 1 --nodes 2`. `--help` shows examples.

Any Python starts this file; the work is done with one that has the requirements (launch/bootstrap.py).
"""

from __future__ import annotations

import os
import sys

if __name__ == "__main__":
    # `launch` is a package of the repository: its folder must not stand on the import path by itself.
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

from launch import bootstrap


def main(words: list[str] | None = None) -> int:
    """Do what the command line asks and return the exit status: 0, 1 failed, 2 to be corrected, 130 or 143 stopped."""
    if sys.version_info < bootstrap.OLDEST:  # before anything that such a Python cannot read
        bootstrap.ensure()
    from launch.planning.arguments import UsageError, parse

    try:
        request = parse(sys.argv[1:] if words is None else words)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if words is None:
        bootstrap.ensure(slurm=request.cluster == "slurm" or request.dry_run)
    from launch.submission import run
    from pneumo_dist.config import ConfigError

    try:
        return run(request)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader of the output has gone, for example `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 130
    except OSError as error:  # a full disk, a vanished file system: the words say what and where
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())

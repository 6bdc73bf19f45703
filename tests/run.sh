#!/bin/bash
# Every test, with the set-up a fresh machine needs: `bash tests/run.sh`. With arguments: pytest alone, for example
# `bash tests/run.sh tests/unit -k rle`. PNEUMO_REQUIRE_SLURM=1: a SLURM test that cannot run here is a failure.
# Nothing outside the checkout is changed, except that root on a Debian without SLURM gets its packages.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
cd "$root"

. launch/setup_env.sh
ensure_venv
marker=.venv/tests-installed
if ! cmp -s tests/requirements.txt "$marker"; then
    .venv/bin/python -m pip install --quiet -r tests/requirements.txt
    cp tests/requirements.txt "$marker"
fi

if ! command -v sbatch >/dev/null && [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    echo "installing SLURM for the tests on a private cluster"
    log=$(mktemp)
    if ! bash slurm/devcluster/install-packages.sh >"$log" 2>&1; then
        tail -n 20 "$log" >&2
        echo "SLURM could not be installed: its tests will say so" >&2
    fi
    rm -f "$log"
fi

if [ $# = 0 ]; then
    .venv/bin/ruff check
    .venv/bin/mypy
fi
exec .venv/bin/python -m pytest "$@"

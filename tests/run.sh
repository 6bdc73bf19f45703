#!/bin/bash
# Every test, with the set-up a fresh machine needs: `bash tests/run.sh`. With arguments: pytest alone, for example
# `bash tests/run.sh tests/unit -k rle`. PNEUMO_REQUIRE_SLURM=1: a SLURM test that cannot run here is a failure.
# `bash tests/run.sh --quick`: the linters, the unit tests and the shorter tests with several ranks, for the daily loop
# (under 4 minutes on two cores). It needs and installs no SLURM and no browser.
# Nothing outside the checkout is changed, except that root on a Debian gets the packages that tests need and lack:
# SLURM, a browser that opens the reports, a validator of DICOM objects.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
cd "$root"

quick=
if [ "${1-}" = --quick ]; then
    quick=yes
    shift
    set -- tests/unit tests/dist/test_{batch_norm_update,evaluation_ranks,gradient,resume}.py "$@"
fi

. launch/setup_env.sh
ensure_venv tests

if [ -z "$quick" ] && [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    log=$(mktemp)
    if ! command -v sbatch >/dev/null; then
        echo "installing SLURM for the tests on a private cluster"
        if ! bash slurm/devcluster/install-packages.sh >"$log" 2>&1; then
            tail -n 20 "$log" >&2
            echo "SLURM could not be installed: its tests will say so" >&2
        fi
    fi
    missing=()
    command -v chromium >/dev/null || missing+=(chromium)
    command -v dciodvfy >/dev/null || missing+=(dicom3tools)
    for package in "${missing[@]}"; do
        echo "installing $package"
        if ! { apt-get update -qq && apt-get install -y -qq --no-install-recommends "$package"; } >"$log" 2>&1 </dev/null; then
            tail -n 5 "$log" >&2
            echo "$package could not be installed: the tests that need it are skipped" >&2
        fi
    done
    rm -f "$log"
fi

if [ -n "$quick" ] || [ $# = 0 ]; then
    # One list for both: the hooks of pre-commit.
    mapfile -t linters < <(sed -n 's/^ *entry: //p' .pre-commit-config.yaml)
    for linter in "${linters[@]}"; do $linter; done
fi
exec .venv/bin/python -m pytest "$@"

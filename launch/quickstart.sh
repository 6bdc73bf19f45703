#!/bin/bash
# From nothing to scores on one machine: .venv, requirements, then the whole chain on synthetic films with two
# worker processes. Needs no SLURM, no GPU and no data; further words go to submit.py.
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/setup_env.sh
ensure_venv || exit $?
exec .venv/bin/python launch/submit.py --stage all --nodes 2 --cluster local "$@"

#!/bin/bash
# Quick start on one machine: make .venv, install the requirements, run the whole chain on synthetic films with two
# worker processes. Needs no SLURM, GPU or data. Arguments are passed on to submit.py.
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/setup_env.sh
ensure_venv || exit $?
exec .venv/bin/python launch/submit.py --stage all --nodes 2 --cluster local "$@"

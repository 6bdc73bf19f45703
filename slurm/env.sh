# Sourced by every *.sbatch here: the environment of a node, and `task`, which runs one stage by srun.
# It must run on the submitting site's plain bash; what a site has to change stands at the top.

# --- change here -------------------------------------------------------------------------------------------------
# module load cuda
# export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0   # the network that joins the nodes (ip -br link)
PYTHON=${PYTHON:-$PWD/.venv/bin/python}
# -----------------------------------------------------------------------------------------------------------------

set -euo pipefail
if [ ! -d pneumo_dist ]; then
    echo "error: $PWD is no checkout of pneumo_dist: call sbatch from the checkout's directory" >&2
    exit 2
fi
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}

# Ranks find host and port themselves (pneumo_dist/runtime/ranks.py); the submitting shell's would mislead them.
unset MASTER_ADDR MASTER_PORT

# SLURM 22.05 to 23.02: srun does not take the job's --cpus-per-task over by itself.
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}

# A rank that dies takes the others along, so that the job fails instead of waiting for it.
srun=(srun --kill-on-bad-exit=1)
python=("$PYTHON")

# task STAGE RUN_DIR [--fold K | --part I/N]: one process for each task of the job. `env` blocks the signals until
# Python has its handlers: one that comes in the first second would otherwise kill the job without a requeue.
task() {
    local stage=$1 run=$2
    shift 2
    "${srun[@]}" env --block-signal=USR2 --block-signal=TERM \
        "${python[@]}" -m pneumo_dist.stages --stage "$stage" --run-dir "$run" "$@"
}

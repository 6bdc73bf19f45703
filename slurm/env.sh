# shellcheck shell=bash
# Sourced by every *.sbatch of this folder: sets up the environment of a node and defines `task`, which runs one stage
# with srun. It needs plain bash only. Adapt the lines at the top to the cluster.

# sbatch passes the calling shell's variables on. Those of an earlier torchrun or job step, of other Python packages and
# of other networks must not act here: what this cluster needs is set below.
unset RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT PNEUMO_STORE OMP_NUM_THREADS NVIDIA_TF32_OVERRIDE \
    PYTHONPATH PYTHONHOME PYTHONUSERBASE PYTHONOPTIMIZE PYTHONWARNINGS PYTHONINSPECT LD_PRELOAD \
    "${!NCCL_@}" "${!GLOO_@}" "${!TORCH_NCCL_@}" "${!SLURM_STEP_@}" SLURM_STEPID
# Loaded modules need it, so it stays.
if [ -n "${LD_LIBRARY_PATH:-}" ]; then echo "note: libraries in LD_LIBRARY_PATH of the calling shell come first"; fi
if [ -n "${SLURM_MEM_PER_NODE:-}" ]; then unset SLURM_MEM_PER_CPU; fi # srun refuses both
export PYTHONUTF8=1 # whatever the locale: names of films and folders need not be ASCII

# --- change here -------------------------------------------------------------------------------------------------
# module load cuda
# export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0   # the network that joins the nodes (ip -br link)
PYTHON=${PYTHON:-$PWD/.venv/bin/python}
# -----------------------------------------------------------------------------------------------------------------

set -euo pipefail
umask "$(printf %04o $((027 | 0$(umask))))" # pictures of patients: no account outside the group reads them
if [ ! -d pneumo_dist ]; then
    echo "error: $PWD is not a checkout of pneumo_dist: call sbatch from the checkout's directory" >&2
    exit 2
fi
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}

# In SLURM 22.05 to 23.02, srun does not inherit the job's --cpus-per-task.
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}

# A failed rank ends the other ranks, so that the job fails instead of waiting for it. All variables reach the ranks
# even if sbatch was called with --export=NONE.
srun=(srun --kill-on-bad-exit=1 --export=ALL)
python=("$PYTHON")

# task STAGE RUN_DIR [--fold K | --part I/N]: starts one process per task of the job. `env` blocks the signals until
# Python has installed its handlers: a signal in the first second would otherwise kill the job without a requeue.
task() {
    local stage=$1 run=$2
    shift 2
    "${srun[@]}" env --block-signal=USR2 --block-signal=TERM \
        "${python[@]}" -m pneumo_dist.stages --stage "$stage" --run-dir "$run" "$@"
}

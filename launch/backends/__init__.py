"""From a plan to running jobs: SLURM or worker processes of this machine."""

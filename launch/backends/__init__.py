"""From a plan to running jobs, on SLURM or as worker processes of this machine."""

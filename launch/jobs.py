"""`launch.jobs.Job`: the name under which submitit pickles jobs. Queued jobs need it, so this file must not move."""

from launch.backends.slurm_job import Job

__all__ = ["Job"]

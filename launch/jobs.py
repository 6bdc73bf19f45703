"""The name under which SLURM jobs pickle their work: `launch.jobs.Job`. It stays when files move."""

from launch.backends.slurm_job import Job

__all__ = ["Job"]

"""Cancel the SLURM jobs of a run. Jobs on this machine are only named: Ctrl-C stops them where they run."""

from __future__ import annotations

from launch.monitor.logs import submissions
from launch.state import slurm_client as slurm
from launch.state.ledger import Ledger
from launch.state.locks import holder
from pneumo_dist.config import ConfigError
from pneumo_dist.run import RunFolder


def cancel_jobs(run: RunFolder, stage: str | None) -> None:
    """Cancel the waiting and running jobs of a stage (None: of all stages) and print them.

    Raises:
        ConfigError: no such job has been submitted, or SLURM does not answer.
    """
    keys = {entry.key for entry in submissions(run, stage)}
    try:
        live = Ledger(run).live(keys)
        slurm.cancel(live.values())
    except slurm.SlurmError as error:
        raise ConfigError(f"SLURM does not answer ({error}): no job has been cancelled, try again later") from None
    for key, job_id in live.items():
        print(f"{key}: job {job_id} cancelled")
    if live and stage:
        print("SLURM also cancels the jobs that depend on it")
    processes = {process for key in keys if (process := holder(run.lock(key)))}
    for process in sorted(processes):
        print(f"{process} runs jobs of this run in the foreground: stop it with Ctrl-C there")
    if not live and not processes:
        print("no job is waiting or running")

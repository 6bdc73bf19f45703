"""Cluster profiles, and the sbatch scripts made from them. No SLURM is needed here."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from launch.backends import sbatch
from launch.planning.profile import STAGE_KEYS, Profile, find_profile, load_profile
from launch.planning.shape import Shape, shape_of
from launch.state import slurm_client as slurm
from pneumo_dist.config import ConfigError
from tests.unit.squeue import squeue

ROOT = Path(__file__).resolve().parents[2]


def script(
    tmp_path: Path,
    stage: str = "1",
    shape: Shape | None = None,
    profile: Profile | None = None,
    code: Path | None = None,
    after: str = "",
    partition: slurm.Partition | None = None,
) -> str:
    spec = sbatch.JobSpec(
        folder=tmp_path,
        profile=profile or Profile(),
        stage=stage,
        shape=shape or shape_of("1", 2, 0),
        name="stage1-fold0.x",
        comment="c",
        code=code or tmp_path / "code",
        after=after,
        partition=partition,
    )
    return sbatch.script(spec)


def written(tmp_path: Path, text: str) -> Profile:
    (tmp_path / "p.yaml").write_text(text)
    return load_profile(tmp_path / "p.yaml")


def test_every_profile_that_is_delivered_can_be_read_and_rendered(tmp_path: Path) -> None:
    files = sorted((ROOT / "configs" / "cluster").glob("*.yaml"))
    assert {"devcluster", "gpu", "preemptible", "workstation"} <= {path.stem for path in files}
    for path in files:
        for stage in STAGE_KEYS[1:]:
            assert "#SBATCH --time=" in script(tmp_path, stage, profile=load_profile(path))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("partion: gpu", "unknown key partion; did you mean partition?"),
        ("gpus_per_node: many", "gpus_per_node"),
        ("stages: {cpu: {quos: x}}", "stages.cpu.quos; did you mean qos?"),
        ("time_min: {swaa: 3}", "time_min.swaa: no such stage; did you mean swa?"),
        ("time_min: 0", "time_min.default=0"),
        ("gres: gpu:4", "must be a name without a number"),
        ("env: {NCCL-DEBUG: x}", "env.NCCL-DEBUG"),
        ("- a", "key: value lines"),
        ("partition: [", "p.yaml"),
        ("setup: ['echo ${oc.env:HOME}']", "setup: ${...} is not replaced here"),
        ("env: {A: '${oc.env:HOME}'}", "env.A: ${...} is not replaced here"),
        ('stages: {cpu: {qos: "a\\nb"}}', "stages.cpu.qos: a line break"),
        ('srun: ["--x=a\\tb"]', "srun: a line break or another control character"),
        ("sbatch: {output: x.log}", "sbatch.output: submit.py sets this option"),
        ("sbatch: {job_name: x}", "sbatch.job_name: submit.py sets this option"),
        ("stages: {swa: {sbatch: {time: 5}}}", "sbatch.time: submit.py sets this option: use the key time_min"),
        ("sbatch: {'nice --hold': 5}", "is not the long name"),
        ("sbatch: {licenses: [a, b]}", "sbatch.licenses must be one value"),
        ("time_min: 12:00:00", "line 1: put 12:00:00 in quotes"),
        ("sbatch: {begin: 16:00}", "put 16:00 in quotes"),
        ("exclude: 013", "put 013 in quotes"),
        ("env: {A: [1]}", "env: each value must be one text"),
        ("setup: [{A: 1}]", "setup: each value must be one text"),
        ("env: [1]", "env must not be a list"),
        ("stages: {swa: {partition: {a: b}}}", "stages.swa.partition must not be a mapping"),
        ("sbatch: {clusters: b}", "sbatch.clusters: jobs run on the default cluster"),
        ("sbatch: {mail_type: ALL, mail-type: END}", "given twice"),
    ],
)
def test_a_mistake_in_a_profile_is_one_line_naming_file_and_key(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(ConfigError) as error:
        written(tmp_path, text)
    assert said in str(error.value) and "p.yaml" in str(error.value) and "\n" not in str(error.value)


def test_an_unknown_profile_names_those_that_there_are() -> None:
    with pytest.raises(ConfigError, match="devcluster"):
        find_profile("devclustr")


def test_a_stages_own_values_win_over_those_for_cpu_jobs_and_the_profiles(tmp_path: Path) -> None:
    profile = written(
        tmp_path,
        "partition: gpu\nqos: normal\nsbatch: {nice: 5}\ntime_min: {default: 60, preprocess: 9, 1: 700}\n"
        "stages: {cpu: {partition: cpu, qos: '', sbatch: {nice: 1}}, preprocess: {partition: big}}",
    )
    assert profile.resources("1").partition == "gpu" and profile.resources("1").qos == "normal"
    assert profile.resources("merge").partition == "cpu" and profile.resources("merge").qos is None
    assert profile.resources("finalize").partition == "big" and profile.resources("finalize").sbatch == {"nice": 1}
    assert [profile.minutes(s) for s in ("1", "2", "finalize")] == [700, 60, 9]


def test_the_script_carries_what_keeps_a_chain_alive(tmp_path: Path) -> None:
    text = script(tmp_path, after="afterok:12:13")
    for line in (
        "--requeue", "--kill-on-invalid-dep=yes", "--open-mode=append", "--signal=USR2@180", "--nodes=2",
        "--dependency=afterok:12:13",
    ):  # fmt: skip
        assert f"#SBATCH {line}" in text
    assert "--kill-on-bad-exit=1" in text and "export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK" in text
    assert f"export PYTHONPATH={tmp_path}/code" in text and "wckey" not in text and "gpus" not in text


def test_the_script_is_valid_shell(tmp_path: Path) -> None:
    profile = Profile(env={"A": "it's $HOME; x"}, setup=["module load cuda"])
    text = script(tmp_path, profile=profile, code=tmp_path / "a b", after="afterok:<id of stage 1>")
    subprocess.run(["bash", "-n"], input=text, text=True, check=True)


def test_signals_are_blocked_until_the_job_has_its_handlers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sbatch, "blocks_signals", lambda: True)
    assert " env --block-signal=USR2 --block-signal=TERM apptainer exec x.sif python -u -m submitit" in script(
        tmp_path, profile=Profile(python="apptainer exec x.sif python")
    )
    monkeypatch.setattr(sbatch, "blocks_signals", lambda: False)
    assert "block-signal" not in script(tmp_path)


def test_options_of_sbatch_without_a_value(tmp_path: Path) -> None:
    text = (
        "sbatch: {contiguous: true, hold: true, nice: 0, switches: 1@00:30:00}\nstages: {swa: {sbatch: {hold: false}}}"
    )
    profile = written(tmp_path, text)
    first, swa = script(tmp_path, profile=profile), script(tmp_path, "swa", profile=profile)
    for line in ("--contiguous\n", "--nice=0\n", "--switches=1@00:30:00\n"):
        assert f"#SBATCH {line}" in first and f"#SBATCH {line}" in swa
    assert "#SBATCH --hold\n" in first and "hold" not in swa


def test_an_option_of_sbatch_replaces_another_one_whatever_its_spelling(tmp_path: Path) -> None:
    text = (
        "sbatch: {kill_on_invalid_dep: 'no', mem-per-cpu: 5}\nstages: {swa: {sbatch: {mem_per_cpu: 7}}}\nqos: a\u00a0b"
    )
    swa = script(tmp_path, "swa", profile=written(tmp_path, text))
    assert [line for line in swa.splitlines() if "kill-on-inv" in line] == ["#SBATCH --kill-on-invalid-dep=no"]
    assert [line for line in swa.splitlines() if "mem-per-cpu" in line] == ["#SBATCH --mem-per-cpu=7"]


def test_requeueing_can_be_given_up(tmp_path: Path) -> None:
    text = script(tmp_path, profile=Profile(requeue=False))
    assert "#SBATCH --no-requeue" in text and "#SBATCH --requeue" not in text


def test_shapes_of_jobs() -> None:
    assert shape_of("1", 4, 8) == Shape(kind="ranks", nodes=4, tasks_per_node=8, gpus_per_node=8)
    assert shape_of("1", 4, 0) == Shape(kind="ranks", nodes=4)
    assert shape_of("preprocess", 4, 8) == Shape(kind="array", array_tasks=4)
    assert shape_of("infer", 4, 8) == Shape(kind="array", array_tasks=4, gpus_per_node=1)
    assert shape_of("merge", 4, 8) == Shape(kind="single")


def test_gpus_are_asked_for_in_the_sites_way(tmp_path: Path) -> None:
    shape = shape_of("1", 2, 4)
    assert "#SBATCH --gpus-per-node=4" in script(tmp_path, shape=shape)
    text = script(tmp_path, shape=shape, profile=Profile(gres="gpu:a100"))
    assert "#SBATCH --gres=gpu:a100:4" in text and "gpus-per-node" not in text and "--ntasks-per-node=4" in text


def test_what_the_profile_leaves_open_comes_from_the_partition(tmp_path: Path) -> None:
    partition = slurm.Partition(nodes=3, cpus=12, memory_mb=1, gpus=4, max_minutes=90)
    text = script(tmp_path, shape=shape_of("1", 1, 4), partition=partition)
    assert "#SBATCH --cpus-per-task=3" in text and "#SBATCH --time=90" in text


def test_an_array_is_one_script(tmp_path: Path) -> None:
    text = script(tmp_path, "preprocess", shape_of("preprocess", 3, 2))
    assert "#SBATCH --array=0-2%3" in text and "gpus" not in text


def test_the_warning_comes_at_half_time_of_a_short_job_at_the_earliest(tmp_path: Path) -> None:
    assert "--signal=USR2@60" in script(tmp_path, profile=Profile(time_min={"default": 2}))


def test_plain_scripts_leave_out_what_the_shell_had_set_for_something_else(tmp_path: Path) -> None:
    foreign = {
        "RANK": "0",
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": "1",
        "PYTHONPATH": "/foreign",
        "NCCL_DEBUG": "INFO",
        "SLURM_MEM_PER_CPU": "9",
        "SLURM_STEP_GPUS": "0",  # of an interactive job step that called sbatch
        "SLURM_STEPID": "0",
    }
    shell = {
        "PATH": f"{tmp_path}:/usr/bin:/bin",
        "SLURM_MEM_PER_NODE": "5",
        "HOME": "/h",
    }
    program = ["bash", "-c", '. slurm/env.sh; env; echo "${srun[@]}"']
    shown = subprocess.run(program, cwd=ROOT, env=shell | foreign, capture_output=True, text=True, check=True).stdout
    lines = shown.splitlines()
    assert not [line for line in lines if line.split("=")[0] in foreign.keys() - {"PYTHONPATH"}]
    assert {f"PYTHONPATH={ROOT}", "HOME=/h", "SLURM_MEM_PER_NODE=5"} <= set(lines)
    assert "--export=ALL" in lines[-1]


@pytest.mark.parametrize(
    ("text", "expected"),
    [("infinite", None), ("1-00:00:00", 1440), ("2-3", 3060), ("90:00", 90), ("12:30:00", 750), ("45", 45), ("", None)],
)
def test_slurm_times(text: str, expected: int | None) -> None:
    assert slurm.minutes(text) == expected


def fake(folder: Path, name: str, answer: str, status: int = 0) -> None:
    (folder / name).write_text(f"#!/bin/sh\ncat <<'END'\n{answer}\nEND\nexit {status}\n")
    (folder / name).chmod(0o755)


def test_partition_facts_are_the_least_of_its_nodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake(
        tmp_path,
        "sinfo",
        "gpu*|4|32+|128000|gpu:a100:4(S:0-1)|1-00:00:00\ngpu*|1|16|64000|gpu:2|1-00:00:00\ncpu|9|8|1|(null)|10",
    )
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert slurm.partition(None) == slurm.Partition(nodes=5, cpus=16, memory_mb=64000, gpus=2, max_minutes=1440)


def test_a_controller_that_does_not_answer_is_told_from_no_slurm_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    assert slurm.unavailable_reason() == "no sbatch on PATH"
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    fake(tmp_path, "sbatch", "")
    fake(tmp_path, "scontrol", "Slurmctld(primary) at head is DOWN")
    assert "no controller is up" in (slurm.unavailable_reason() or "")
    fake(tmp_path, "scontrol", "slurm_load_ctl_conf error: Unable to contact slurm controller", 1)
    assert "no controller answers" in (slurm.unavailable_reason() or "")
    fake(tmp_path, "scontrol", "Slurmctld(primary) at head is UP")
    assert slurm.unavailable_reason() is None


def test_states_come_from_the_controller_first_and_count_restarts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake(tmp_path, "squeue", squeue("9_1|infer.x|RUNNING|None|node2"))
    fake(
        tmp_path,
        "sacct",
        "7|NODE_FAIL|0:0|node1|stage1-fold0.x\n7|CANCELLED by 0|0:15|node2|stage1-fold0.x\n"
        "9_0|FAILED|1:0|node1|infer.x\n9_1|PENDING|0:0|None assigned|infer.x",
    )
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    states = slurm.states(["7", "9"])
    assert states["7"].state == "CANCELLED" and states["7"].restarts == 1 and not states["7"].live
    assert states["7"].previous_state == "NODE_FAIL" and states["7"].reason == "by root"
    assert states["9_0"].reason == "exit 1:0" and states["9_1"].live and states["9_1"].parent == "9"


def test_how_the_run_before_ended_is_known_even_while_accounting_lags_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    fake(tmp_path, "squeue", squeue("7|ab|PENDING|BeginTime||1"))
    fake(tmp_path, "sacct", "7|PREEMPTED|0:0|node1|ab")
    assert (slurm.states(["7"])["7"].previous_state, slurm.states(["7"])["7"].restarts) == ("PREEMPTED", 1)
    fake(tmp_path, "sacct", "7|RUNNING|0:0|node1|ab")
    assert slurm.states(["7"])["7"].previous_state == ""


def test_exit_status_of_a_failed_job_is_read_without_accounting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    rows = ["1|x|FAILED|NonZeroExitCode|n1|0|768", "2|x|FAILED|x|n1|0|9", "3|x|CANCELLED|DependencyNeverSatisfied||0|0"]
    fake(tmp_path, "squeue", squeue(*rows))
    fake(tmp_path, "sacct", "Slurm accounting storage is disabled", 1)
    states = slurm.states(["1", "2", "3"])
    assert [states[i].reason for i in "123"] == ["exit 3:0", "exit 0:9", "DependencyNeverSatisfied"]

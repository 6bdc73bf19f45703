"""Inference as an array on three nodes: a task is killed, a node dies, the same command ends with the same bytes.

With PNEUMO_TEST_FILMS=DIR[:DIR...] the films of those folders are used, else synthetic ones; 20 damaged files beside
them in either case.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path

import pytest

from pneumo_dist.data.films.dicom import read_film
from pneumo_dist.data.films.listing import find_films
from pneumo_dist.data.phantom import make_phantom
from pneumo_dist.data.shards import to_size
from pneumo_dist.inference import infer
from pneumo_dist.inference.film_plan import write_film_plan
from pneumo_dist.prediction.forward import predict
from pneumo_dist.scoring.submission_csv import read_rows, validation_of
from tests.films import task, write_model
from tests.slurm.private import TINY, PrivateCluster, until

DAMAGED = 20


@pytest.fixture(scope="module")
def films(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a flat folder of good and damaged films."""
    folder = tmp_path_factory.mktemp("films")
    sources = [Path(name) for name in os.environ.get("PNEUMO_TEST_FILMS", "").split(":") if name]
    if not sources:
        sources = [tmp_path_factory.mktemp("phantom")]
        make_phantom(sources[0], 36, 128, 0)
    for source in sources:
        for _, path in find_films(source)[0]:
            shutil.copyfile(source / path, folder / Path(path).name)
    good = sorted(folder.iterdir())
    for i in range(DAMAGED):
        data = good[i % len(good)].read_bytes()
        cut = data[: len(data) * (i % 5) // 9]  # empty, no header's end, no pixels, half of the pixels
        (folder / f"damaged-{i:02d}.dcm").write_bytes(cut)
    return folder


def outputs(folder: Path) -> dict[str, bytes]:
    """Return every output by name, without the parts, which are working files."""
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    return {name: path.read_bytes() for name, path in files.items() if not name.startswith("parts/")}


def processes_of(array: str, index: int) -> list[int]:
    """Return the process ids of one task of an array."""
    pids = []
    for entry in Path("/proc").iterdir():
        try:
            words = (entry / "environ").read_bytes().decode(errors="replace").split("\0")
            command = (entry / "cmdline").read_bytes().split(b"\0")[0]
        except OSError:
            continue
        wanted = {f"SLURM_ARRAY_JOB_ID={array}", f"SLURM_ARRAY_TASK_ID={index}"}
        if wanted <= set(words) and b"python" in command and any(w.startswith("SLURM_PROCID=") for w in words):
            pids.append(int(entry.name))
    return pids


def test_killed_task_and_dead_node_leave_the_same_bytes(films, free_cluster: PrivateCluster, tmp_path, monkeypatch):
    cluster = free_cluster
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")  # the only date in any output: that of the DICOM SEG
    monkeypatch.setitem(cluster.env, "SOURCE_DATE_EPOCH", "1700000000")
    some = [path for path in sorted(films.iterdir()) if not path.name.startswith("damaged")][:5]
    seen = [to_size(read_film(path).pixels, 256) for path in some]
    model = write_model(tmp_path / "model.pt", size=256, images=seen)
    middle = sorted(answer.top_score for answer in predict(model, some))[
        2
    ]  # so that some films are positive and some negative
    rule = {"top_score": middle, "min_area": 200, "mask_threshold": 0.3}
    write_model(model, size=256, images=seen, triplet=rule)
    patience_s = 240 + 6 * len(list(films.iterdir()))
    what = [f"infer.dir={films}", f"infer.models={model}", "infer.label=it", "infer.part_size=5"]
    what += ["infer.outputs=csv,masks,overlays,dicomseg", "data.workers=1", "train.threads=1"]
    calm, run = tmp_path / "calm", tmp_path / "run"
    write_film_plan(task(calm, "infer", what).run)
    infer.infer_parts(task(calm, "infer", what))
    infer.merge(task(calm, "merge", what))

    words = ("--config", TINY, "--run", "run", f"run_root={tmp_path}", "--stage", "infer", *what)
    cluster.submit("--nodes", 3, *words)
    ids = {row["key"]: str(row["job_id"]) for row in _submitted(run)}
    parts = run / "infer" / "it" / "parts"
    until(lambda: len(list(parts.glob("part-*"))) >= 3, 240, "three finished parts", every_s=0.05)
    for pid in processes_of(ids["infer"], 0):
        os.kill(pid, signal.SIGKILL)
    cluster.control("node", "off", "node2")
    assert cluster.wait_for(ids["merge"], within_s=patience_s) != "COMPLETED"
    survived = {path.name: path.stat().st_mtime_ns for path in parts.glob("part-*")}
    cluster.control("node", "on", "node2")
    cluster.command("scancel", "--user", "root")
    until(cluster.idle, 90, "an idle cluster")

    cluster.submit("--nodes", 2, *words)  # another number of nodes: parts do not depend on it
    ids = {row["key"]: str(row["job_id"]) for row in _submitted(run)}
    assert cluster.wait_for(ids["merge"], within_s=patience_s) == "COMPLETED"
    assert survived and survived.items() <= {p.name: p.stat().st_mtime_ns for p in parts.glob("part-*")}.items()
    written, wanted = outputs(run / "infer" / "it"), outputs(calm / "infer" / "it")
    assert written.keys() - {"DONE.json"} == wanted.keys()
    assert [name for name in wanted if written[name] != wanted[name]] == []

    submission = run / "infer" / "it" / "submission.csv"
    assert validation_of(submission, films).problems == []
    head, *rows = read_rows(run / "infer" / "it" / "predictions.csv")
    table = [dict(zip(head, row, strict=True)) for row in rows]
    bad = [row for row in table if row["status"] == "unreadable"]
    assert len(table) == len(list(films.iterdir())) and len(bad) == DAMAGED
    assert all(row["film"].startswith("damaged-") and row["reason"] for row in bad)
    assert {row["decision"] for row in table} == {"positive", "negative", ""}


def _submitted(run: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (run / "jobs" / "submitted.jsonl").read_text().splitlines()]

"""TensorBoard as slurm/tensorboard.sbatch starts it, in a real browser: scalars and images load, on this machine only."""

import json
import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pneumo_dist import stages
from pneumo_dist.model.resnet import ResNet34Encoder
from pneumo_dist.model.unet import ResNet34UNet
from pneumo_dist.reports import tensorboard
from tests.browser import CHROMIUM, Browser
from tests.dist import small_run

ROOT = Path(__file__).resolve().parents[2]
CELLS = "[...document.querySelectorAll('scalar-card tb-data-table-content-cell')].map(cell => cell.textContent.trim())"
LIMIT_S = 120  # several megabytes of scripts, on a machine that may be busy
IMAGES = "[...document.querySelectorAll('image-card img')]"
# Custom scalars are web components: their charts lie in shadow trees.
CHARTS = """(function count(root) {
    let charts = root.querySelectorAll('vz-line-chart2').length;
    for (const node of root.querySelectorAll('*')) if (node.shadowRoot) charts += count(node.shadowRoot);
    return charts;
})(document)"""


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    channels, widths = ResNet34Encoder.channels, ResNet34UNet.widths
    small_run.thin()
    try:
        overrides = ("stages=1,swa", "stage1.epochs=2", "train.log_every=1")
        run_dir = small_run.prepare(tmp_path_factory.mktemp("run"), *overrides)
        for stage in ("1", "swa", "evaluate"):
            stages.run_stage(stage, run_dir, fold=0)
    finally:
        ResNet34Encoder.channels, ResNet34UNet.widths = channels, widths
    return run_dir


def job(folder, run_dir, port):
    """Return command and environment of the script as on a node, where SLURM gives the latter."""
    (folder / "scontrol").write_text("#!/bin/sh\necho localhost\n")
    (folder / "scontrol").chmod(0o755)
    slurm = {"SLURM_JOB_ID": str(port), "SLURM_JOB_NODELIST": "localhost", "SLURM_SUBMIT_HOST": "login1"}
    search = {"PYTHON": sys.executable, "PATH": f"{folder}:{os.environ['PATH']}"}
    return ["bash", "slurm/tensorboard.sbatch", str(run_dir)], {**os.environ, **slurm, **search}


@pytest.fixture
def served(run_dir, tmp_path):
    """The port that the script serves on, and what it has printed into its log, which nobody else can read."""
    port = next(p for p in range(30000, 40000) if socket.socket().connect_ex(("127.0.0.1", p)))
    command, environment = job(tmp_path, run_dir, port)
    log = tmp_path / "log"
    with log.open("w") as output:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT)
    try:
        limit = time.monotonic() + 60
        while "other accounts" not in log.read_text():
            assert process.poll() is None and time.monotonic() < limit, log.read_text()
            time.sleep(0.1)
        assert log.stat().st_mode & 0o777 == 0o600
        yield port, log.read_text()
    finally:
        process.terminate()
        process.wait()


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on PATH (Debian package chromium)")
def test_scalars_images_and_the_first_page_load(run_dir, served, tmp_path):
    port, printed = served
    assert f" -L {port}:127.0.0.1:{port} -J " in printed and "@login1" in printed
    others = {info[4][0] for info in socket.getaddrinfo(socket.gethostname(), port, socket.AF_INET)}
    for address in others - {"127.0.0.1"}:
        if not address.startswith("127."):
            assert socket.socket().connect_ex((address, port)), f"reachable at {address}"
    scores = json.loads((run_dir / "fold0" / "evaluate" / "scores.json").read_text())
    with Browser(tmp_path / "profile") as browser:
        address = re.search(r"http://127\.0\.0\.1:\d+/[\w-]+/", printed)[0]
        browser.call("Page.navigate", url=f"{address}?tagFilter=evaluation%2Fdice_all_empty%7Coverlay#timeseries")
        browser.until(f"{CELLS}.includes('fold0/stage1/tensorboard')", LIMIT_S)
        browser.until(f"{CELLS}.includes('{scores['dice_all_empty']:.4g}')", LIMIT_S)
        browser.until(f"{IMAGES}.length > 1 && {IMAGES}.every(image => image.complete)", LIMIT_S)
        assert set(browser.run(f"{IMAGES}.map(image => image.naturalWidth)")) == {3 * tensorboard.PANEL_PX}
        browser.call("Page.navigate", url=f"{address}#custom_scalars")
        browser.until(f"{CHARTS} >= {len(tensorboard.layout(False, False)['Learning'])}", LIMIT_S)
        assert all(
            url.startswith((f"http://127.0.0.1:{port}/", "data:", "blob:", "chrome:", "about:"))
            for url in browser.requests
        )


def test_the_job_refuses_a_run_that_is_not_there(tmp_path):
    command, environment = job(tmp_path, tmp_path / "nope", 30000)
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and "no such run" in done.stderr and "Traceback" not in done.stderr

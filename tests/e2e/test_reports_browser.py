"""The two report pages in a real browser, from a file, without a server: no error, no request, thumbnails load."""

from pathlib import Path

import numpy as np
import pytest

from pneumo_dist.evaluation import evaluate
from pneumo_dist.inference import infer
from pneumo_dist.inference.film_plan import write_film_plan
from pneumo_dist.inference.worklist import write_worklist
from pneumo_dist.reports import pictures
from tests.browser import CHROMIUM, Browser
from tests.films import make_shards, picture, task, write_dicom, write_model

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on PATH (Debian package chromium)")

RULE = {"top_score": 0.85, "min_area": 200, "mask_threshold": 0.5}
VISIBLE = "[...document.images].filter(i => i.getBoundingClientRect().top < innerHeight && i.getBoundingClientRect().bottom > 0)"
LOADED = f"{VISIBLE}.length > 0 && {VISIBLE}.every(i => i.complete && i.naturalWidth > 0)"


def check(browser: Browser, page: Path) -> None:
    assert browser.errors == []
    assert browser.requests and all(url.startswith(("file://", "data:")) for url in browser.requests)
    folder = page.parent.absolute().as_uri()
    assert all(url.startswith((folder, "data:")) for url in browser.requests)


def test_the_worklist(tmp_path):
    films = tmp_path / "films"
    for i in range(7):
        write_dicom(films / f"film{i}.dcm", picture(i, 96 + 8 * i, 80))
    (films / "<script>alert(1)<b>.dcm").write_bytes(b"")  # an id may hold anything that a file name may
    model = write_model(tmp_path / "model.pt", triplet=RULE)
    overrides = [f"infer.dir={films}", f"infer.models={model}", "infer.label=it", "infer.outputs=csv,overlays"]
    write_film_plan(task(tmp_path, "infer", overrides).run)
    infer.infer_parts(task(tmp_path, "infer", overrides))
    page = infer.merge(task(tmp_path, "merge", overrides))["report"]
    with Browser(tmp_path / "profile") as browser:
        browser.open(page)
        browser.run("window.scrollTo(0, document.body.scrollHeight)")
        browser.until(LOADED)
        assert browser.run("document.querySelectorAll('.film').length") == 8
        assert browser.run("document.images.length") == 7
        scores = browser.run("[...document.querySelectorAll('.film b')].map(b => b.textContent)")
        assert scores == [*sorted(scores[:-1], reverse=True), "unreadable"]
        browser.run("document.querySelector('[data-kind=unreadable]').click()")
        assert browser.run("document.querySelector('.film .id').textContent") == "<script>alert(1)<b>"
        browser.run("document.querySelector('[data-kind=all]').click()")
        browser.run("search.value = 'FILM3'; search.dispatchEvent(new Event('input'))")
        assert browser.run("document.getElementById('count').textContent") == "1 film"
        target = browser.run("document.querySelector('.film a').href")
        assert target.endswith("overlays/film3.png") and (page.parent / "overlays" / "film3.png").exists()
        check(browser, page)


def test_a_worklist_of_5000_films_opens_at_once(tmp_path):
    page, rng = tmp_path / "report.html", np.random.default_rng(0)
    (tmp_path / "thumbs").mkdir()
    thumb = pictures.jpeg(pictures.thumbnail(picture(1, 256, 256), np.zeros((256, 256), bool)))
    rows = []
    for i, top in enumerate(rng.random(5000)):
        (tmp_path / "thumbs" / f"f{i}.jpg").write_bytes(thumb)
        rows.append(
            {"film": f"film-{i:04d}", "name": f"f{i}", "status": "ok", "decision": "positive" if top > 0.8 else "negative",
             "top_score": float(top), "share": 0.01, "reason": "", "warnings": "", "files": {}}
        )  # fmt: skip
    counts = {"films": 5000, "positive": 1000, "negative": 4000, "unreadable": 0, "ignored_files": 0}
    settings = {
        "label": "big",
        "models": ["ab"],
        "sizes": [512],
        "tta": "hflip",
        "score": "image-level head",
        "triplet": RULE,
        "triplet_from": "model file",
    }
    write_worklist(page, rows, {**counts, **settings, "outputs": ["csv"]})
    assert page.stat().st_size < 600_000
    with Browser(tmp_path / "profile") as browser:
        browser.open(page)
        requested = len(browser.requests)
        assert requested < 400  # thumbnails of what is near the screen, not 5,000
        for _ in range(3):
            browser.run("window.scrollTo(0, document.body.scrollHeight)")
            browser.until("document.querySelectorAll('.film').length > 120 && " + LOADED)
        assert requested < len(browser.requests) < 5000
        browser.run("order.value = 'low'; order.dispatchEvent(new Event('change'))")
        first = browser.run("document.querySelector('.film .id').textContent")
        assert first == min(rows, key=lambda row: row["top_score"])["film"]
        check(browser, page)


def test_the_evaluation_report(tmp_path):
    overrides = [
        "phantom.films=16",
        "phantom.size=96",
        "stages=1",
        "stage1.size=32",
        "data.shards=2",
        "data.folds=2",
        "evaluate.bootstrap=20",
    ]
    make_shards(tmp_path, overrides)
    for name in ("best", "last"):
        write_model(tmp_path / "fold0" / "stage1" / f"{name}.pt")
    (tmp_path / "fold0" / "stage1" / "metrics.jsonl").write_text(
        '{"epoch": 1, "train_loss": 1.0, "loss": 0.9, "dice": 0.5, "dice_positive": 0.1}\n'
        '{"epoch": 2, "train_loss": 0.8, "loss": 0.8, "dice": 0.6, "dice_positive": 0.2}\n'
    )
    page = evaluate.run(task(tmp_path, "evaluate", overrides, fold=0))["report"]
    with Browser(tmp_path / "profile") as browser:
        browser.open(page)
        assert browser.run("document.querySelectorAll('figure svg').length") == 6
        assert browser.run("document.querySelectorAll('figure').length") == 6
        browser.run("document.querySelector('.films').scrollIntoView()")
        browser.until(LOADED)
        check(browser, page)

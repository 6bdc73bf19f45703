"""Write report.html of an inference: a worklist sorted by score. It opens without a server, fast with many films.

The page names films by their ids only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from pneumo_dist.reports import page, plots
from pneumo_dist.runtime.files import write_text
from pneumo_dist.scoring.submission_csv import OK

# Scrolling adds the cards: 5,000 images at once would take the browser seconds.
_SCRIPT = """
const STEP = 120;
const byId = id => document.getElementById(id);
const grid = byId("films"), end = byId("end"), count = byId("count"), search = byId("search"), order = byId("order");
const buttons = [...document.querySelectorAll("button[data-kind]")];
let kind = "all", shown = [], next = 0;

function make(tag, name, text) {
  const element = document.createElement(tag);
  element.className = name;
  if (text !== undefined) element.textContent = text;  // never as markup: an id may be any file name
  return element;
}

function card([id, name, state, score, share, reason]) {
  const box = make("article", "film " + ({ positive: "found", unreadable: "bad" }[state] ?? ""));
  if (state !== "unreadable") {
    const link = make("a", ""), image = make("img", "");
    image.loading = "lazy";
    image.alt = "";
    image.src = "thumbs/" + name + ".jpg";
    link.href = DATA.overlays ? "overlays/" + name + ".png" : image.src;
    link.append(image);
    box.append(link);
  }
  const percent = 100 * (share ?? 0);
  const size = percent < 0.01 ? "under 0.01" : percent.toFixed(percent < 0.1 ? 2 : 1);
  const area = "; mask area " + size + " % of the image";
  const verdict = { positive: area, negative: "; negative", unreadable: "" }[state];
  const text = make("div", "");
  text.append(make("b", "", state === "unreadable" ? "unreadable" : "score " + score.toFixed(2)), verdict);
  if (reason) text.append(make("div", "soft", reason));
  text.append(make("div", "id", id));
  box.append(text);
  return box;
}

function more() {
  const part = document.createDocumentFragment();
  for (const stop = Math.min(next + STEP, shown.length); next < stop; next++) part.append(card(shown[next]));
  grid.append(part);
}

const by = (column, sign, missing) => (a, b) => sign * ((a[column] ?? missing) - (b[column] ?? missing));
const ORDERS = {
  score: by(3, -1, -1), low: by(3, 1, 2), area: by(4, -1, -1),
  id: (a, b) => a[0] < b[0] ? -1 : a[0] > b[0] ? 1 : 0,
};

function refresh() {
  const query = search.value.trim().toLowerCase();
  shown = DATA.films.filter(f => (kind === "all" || f[2] === kind) && (!query || f[0].toLowerCase().includes(query)));
  shown.sort(ORDERS[order.value]);
  next = 0;
  grid.replaceChildren();
  more();
  count.textContent = shown.length + (shown.length === 1 ? " film" : " films");
  for (const button of buttons) button.setAttribute("aria-pressed", button.dataset.kind === kind);
}

for (const button of buttons) button.addEventListener("click", () => { kind = button.dataset.kind; refresh(); });
search.addEventListener("input", refresh);
order.addEventListener("change", refresh);
const observer = new IntersectionObserver(entries => {
  if (!entries.some(entry => entry.isIntersecting) || next >= shown.length) return;
  more();
  observer.unobserve(end);  // observing again reports at once: a tall screen may need several steps
  observer.observe(end);
}, { rootMargin: "1200px" });
observer.observe(end);
refresh();
"""


def write_worklist(path: Path, rows: Sequence[Mapping[str, Any]], inference: Mapping[str, Any]) -> None:
    """Write the page for the merged rows.

    Args:
        rows: the results of `FilmWriter.write` and `empty_row`.
        inference: counts and settings, as in inference.json.
    """
    readable = [row for row in rows if row["status"] == OK]
    parts = [_heading(inference), _tiles(inference), _histogram(readable, inference["triplet"]["top_score"])]
    parts[1:1] = [f"<p>{escape(note)}.</p>" for note in inference.get("notes", ())]
    parts += [page.settings_table({name: inference[name] for name in SETTINGS}), _controls(inference)]
    parts += ['<div id="films" class="films"></div><div id="end"></div>']
    parts += ["<noscript>The films are listed in predictions.csv.</noscript>"]
    data = {
        "overlays": any(name.startswith("overlays/") for row in readable for name in row["files"]),
        "films": [_film(row) for row in sorted(rows, key=lambda row: (_last(row["top_score"]), row["film"]))],
    }
    write_text(path, page.page(f"Worklist {inference['label']}", "\n".join(parts), _SCRIPT, data))


SETTINGS = ("label", "models", "sizes", "tta", "score", "triplet", "triplet_from", "outputs", "ignored_files")


def _heading(inference: Mapping[str, Any]) -> str:
    title = f"<h1>Pneumothorax worklist: {escape(str(inference['label']))}</h1>"
    rule = f"{decision_rule(inference['triplet'])} (thresholds: {inference['triplet_from']})."
    return f"{title}\n<p>Automatic, not reviewed, not a diagnosis. {escape(rule)}</p>"


def decision_rule(triplet: Mapping[str, Any]) -> str:
    """Return the decision rule as a sentence, without conditions that always hold."""
    conditions = []
    if triplet["min_area"]:
        conditions.append(f"the mask has at least {triplet['min_area']:,} px (scaled to 1024x1024)")
    if triplet["top_score"] > 1:  # no score reaches it
        return "Every film is called negative: no thresholds gave a better Dice on the validation films"
    if triplet["top_score"] > 0:
        conditions.append(f"the film's score is at least {triplet['top_score']:g}")
    return " and ".join([f"Positive if any pixel exceeds {triplet['mask_threshold']:g}", *conditions])


def _tiles(inference: Mapping[str, Any]) -> str:
    styles = {"films": "", "positive": "found", "negative": "", "unreadable": "bad" if inference["unreadable"] else ""}
    tiles = [(name, inference[name], style) for name, style in styles.items()]
    return page.tiles([*tiles, ("other files ignored", inference["ignored_files"], "")])


def _histogram(readable: Sequence[Mapping[str, Any]], threshold: float) -> str:
    if not readable:
        return ""
    scores = np.array([row["top_score"] for row in readable], np.float64)
    positive = np.array([row["decision"] == "positive" for row in readable], bool)
    return page.figure(plots.score_histogram(scores, positive, threshold), "Films by score")


def _controls(inference: Mapping[str, Any]) -> str:
    kinds = {"all": inference["films"]} | {name: inference[name] for name in ("positive", "negative", "unreadable")}
    orders = {"score": "highest score first", "low": "lowest score first", "area": "largest area first", "id": "by id"}
    buttons = "".join(f'<button type="button" data-kind="{kind}">{kind} {n}</button>' for kind, n in kinds.items())
    options = "".join(f'<option value="{name}">{text}</option>' for name, text in orders.items())
    return (
        f'<div class="bar">{buttons}<select id="order" aria-label="order">{options}</select>'
        '<input id="search" type="search" placeholder="id" aria-label="search by id">'
        '<span id="count" class="soft"></span></div>'
    )


def _film(row: Mapping[str, Any]) -> list[Any]:
    state = row["decision"] or "unreadable"
    note = row["reason"] or row["warnings"]
    return [row["film"], row["name"], state, _short(row["top_score"]), _short(row["share"]), note]


def _last(score: float | None) -> float:
    return 2.0 if score is None else -score


def _short(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.6g}")

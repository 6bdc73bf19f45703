"""report.html of an inference: a worklist sorted by score, for people. Opens without a server, fast with many films.

Film ids only; the page shows what merge was given and decides nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from pneumo_dist.prediction import page, plots
from pneumo_dist.runtime.files import write_text

# Cards are made while one scrolls: 5,000 images at once would take the browser seconds.
_SCRIPT = """
const grid = document.getElementById("films"), end = document.getElementById("end"), count = document.getElementById("count");
const search = document.getElementById("search"), order = document.getElementById("order"), buttons = [...document.querySelectorAll("button[data-kind]")];
const STEP = 120;
let kind = "all", shown = [], next = 0;
const make = (tag, name, text) => { const e = document.createElement(tag); e.className = name; if (text !== undefined) e.textContent = text; return e; };
function card(f) {
  const [id, name, state, score, share, reason] = f;
  const box = make("article", "film " + (state === "positive" ? "found" : state === "unreadable" ? "bad" : ""));
  if (state !== "unreadable") {
    const link = make("a", ""), image = make("img", "");
    image.loading = "lazy"; image.alt = ""; image.src = "thumbs/" + name + ".jpg";
    link.href = DATA.overlays ? "overlays/" + name + ".png" : image.src;
    link.append(image); box.append(link);
  }
  const text = make("div", "");
  text.append(make("b", "", state === "unreadable" ? "unreadable" : score.toFixed(3)));
  text.append(document.createTextNode(state === "positive" ? " pneumothorax, " + (100 * share).toPrecision(2) + " %" : state === "negative" ? " nothing found" : ""));
  if (reason) text.append(make("div", "soft", reason));
  text.append(make("div", "id", id)); box.append(text);
  return box;
}
function more() {
  const part = document.createDocumentFragment();
  for (const stop = Math.min(next + STEP, shown.length); next < stop; next++) part.append(card(shown[next]));
  grid.append(part);
}
const ORDERS = { score: (a, b) => (b[3] ?? -1) - (a[3] ?? -1), low: (a, b) => (a[3] ?? 2) - (b[3] ?? 2), area: (a, b) => (b[4] ?? -1) - (a[4] ?? -1),
  id: (a, b) => a[0] < b[0] ? -1 : a[0] > b[0] ? 1 : 0 };
function refresh() {
  const word = search.value.trim().toLowerCase();
  shown = DATA.films.filter(f => (kind === "all" || f[2] === kind) && (!word || f[0].toLowerCase().includes(word)));
  shown.sort(ORDERS[order.value]);
  next = 0; grid.replaceChildren(); more();
  count.textContent = shown.length + " films";
  for (const b of buttons) b.setAttribute("aria-pressed", b.dataset.kind === kind);
}
for (const b of buttons) b.addEventListener("click", () => { kind = b.dataset.kind; refresh(); });
search.addEventListener("input", refresh); order.addEventListener("change", refresh);
const watch = new IntersectionObserver(seen => {
  if (!seen.some(e => e.isIntersecting) || next >= shown.length) return;
  more(); watch.unobserve(end); watch.observe(end);  // asks again at once: on a tall screen one step may not be enough
}, { rootMargin: "1200px" });
watch.observe(end);
refresh();
"""


def write_worklist(path: Path, rows: Sequence[Mapping[str, Any]], inference: Mapping[str, Any]) -> None:
    """Write the page for the merged rows.

    Args:
        rows: as `FilmWriter.write` and `unreadable_row` return them.
        inference: counts and settings, as in inference.json.
    """
    readable = [row for row in rows if row["status"] == "ok"]
    scores = np.array([row["top_score"] for row in readable], np.float64)
    found = np.array([row["decision"] == "positive" for row in readable], bool)
    triplet = inference["triplet"]
    films = [
        [row["film"], row["name"], row["decision"] or "unreadable", _short(row["top_score"]), _short(row["share"]), row["reason"] or row["warnings"]]
        for row in sorted(rows, key=lambda row: (2.0 if row["top_score"] is None else -row["top_score"], row["film"]))
    ]
    kinds = [("all", len(rows)), ("positive", inference["positive"]), ("negative", inference["negative"]), ("unreadable", inference["unreadable"])]
    buttons = "".join(f'<button type="button" data-kind="{kind}">{kind} {count}</button>' for kind, count in kinds)
    rule = (
        f"Called positive: highest probability at least {triplet['top_score']:g} and at least {triplet['min_area']:,} px (of 1024x1024) "
        f"above {triplet['mask_threshold']:g}, both at the film's own size ({inference['triplet_from']})."
    )
    names = ("label", "models", "sizes", "tta", "triplet", "triplet_from", "outputs", "ignored_files")
    body = (
        f"<h1>Pneumothorax worklist: {escape(str(inference['label']))}</h1>\n"
        f"<p>Automatic, not reviewed, not a diagnosis. {escape(rule)}</p>\n"
        + page.tiles(
            [
                ("films", inference["films"], ""),
                ("positive", inference["positive"], "found"),
                ("negative", inference["negative"], ""),
                ("unreadable", inference["unreadable"], "bad" if inference["unreadable"] else ""),
                ("other files ignored", inference["ignored_files"], ""),
            ]
        )
        + (page.figure(plots.score_histogram(scores, found, triplet["top_score"]), "Films by score") if len(scores) else "")
        + page.settings_table({name: inference[name] for name in names})
        + f'<div class="bar">{buttons}<select id="order" aria-label="order"><option value="score">highest score first</option>'
        '<option value="low">lowest score first</option><option value="area">largest area first</option><option value="id">by id</option></select>'
        '<input id="search" type="search" placeholder="id" aria-label="search by id"><span id="count" class="soft"></span></div>\n'
        '<div id="films" class="films"></div><div id="end"></div><noscript>The films are listed in predictions.csv.</noscript>'
    )
    overlays = any(name.startswith("overlays/") for row in readable for name in row["files"])
    write_text(path, page.page(f"Worklist {inference['label']}", body, _SCRIPT, {"overlays": overlays, "films": films}))


def _short(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.6g}")

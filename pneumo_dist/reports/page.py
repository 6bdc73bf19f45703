"""The frame of the two report pages: one HTML file with its style and script inside, which loads nothing remote.

Every text that comes from data is escaped here. The pictures beside a page are the only other files.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

# The browser blocks every other source. `file:` allows pages that are opened without a server.
_POLICY = "default-src 'none'; img-src 'self' file: data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"

STYLE = """
:root { --ink: #e8eaed; --soft: #9aa0a6; --ground: #14161a; --card: #1e2127; --line: #33373f; --found: #ffbe3c;
  --truth: #3cc8dc; --bad: #ff6b6b; color-scheme: dark; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1500px; padding: 1.2rem; background: var(--ground); color: var(--ink);
  font: 15px/1.45 system-ui, sans-serif; }
h1 { font-size: 1.4rem; margin: 0 0 .3rem; } h2 { font-size: 1.1rem; margin: 2rem 0 .6rem; }
p, figcaption, .soft { color: var(--soft); margin: .2rem 0 .8rem; } a { color: inherit; }
.tiles { display: flex; flex-wrap: wrap; gap: .6rem; margin: 1rem 0; }
.tile { background: var(--card); border: 1px solid var(--line); border-radius: .5rem; padding: .5rem .9rem;
  min-width: 7rem; }
.tile b { display: block; font-size: 1.4rem; } .tile.found b { color: var(--found); } .tile.bad b {
  color: var(--bad); }
table { border-collapse: collapse; margin: .5rem 0 1rem; } .wide { overflow-x: auto; }
th, td { text-align: right; padding: .25rem .7rem; border-bottom: 1px solid var(--line); white-space: nowrap; }
th:first-child, td:first-child { text-align: left; } th { color: var(--soft); font-weight: 500; }
td.text { text-align: left; white-space: normal; overflow-wrap: anywhere; }
tr.optimistic td { color: var(--soft); font-style: italic; } tr.interval td { color: var(--soft); border-top: 0;
  font-size: .85em; }
.plots { display: flex; flex-wrap: wrap; gap: 1rem; } figure { margin: 0; display: inline-block; max-width: 100%;
  background: #fff; border-radius: .5rem; padding: .4rem; }
figure svg { display: block; max-width: 100%; height: auto; }
.films { display: grid; grid-template-columns: repeat(auto-fill, minmax(170px, 1fr)); gap: .6rem; }
.film { background: var(--card); border: 1px solid var(--line); border-radius: .5rem; overflow: hidden;
  content-visibility: auto; contain-intrinsic-size: 170px 240px; }
p.bad { color: var(--bad); font-weight: bold; }
.film.found { border-color: var(--found); } .film.bad { border-color: var(--bad); }
.film img { display: block; width: 100%; aspect-ratio: 1; object-fit: contain; background: #000; }
.film div { padding: .35rem .5rem; font-size: .85rem; } .film b { font-size: 1rem; } .film.found b {
  color: var(--found); } .film.bad b { color: var(--bad); }
.film .id { color: var(--soft); overflow-wrap: anywhere; font-size: .72rem; padding: 0; }
.bar { position: sticky; top: 0; background: var(--ground); padding: .6rem 0; display: flex; flex-wrap: wrap;
  gap: .5rem; align-items: center; z-index: 1; }
button, select, input { background: var(--card); color: var(--ink); border: 1px solid var(--line);
  border-radius: .4rem; padding: .35rem .7rem; font: inherit; }
button[aria-pressed=true] { border-color: var(--found); color: var(--found); }
details { margin: .6rem 0; } summary { cursor: pointer; }
"""


def page(title: str, body: str, script: str = "", data: Any = None) -> str:
    """Return a complete HTML document. The script sees `data` as the constant DATA."""
    constant = ""
    if data is not None:
        # Escaped: a "</script>" in the data would end the script element.
        text = json.dumps(data, separators=(",", ":")).replace("<", r"\u003c")
        constant = f"const DATA = {text};\n"
    element = f"<script>\n{constant}{script}</script>\n" if script or constant else ""
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<link rel="icon" href="data:,">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n{body}\n{element}</body>\n</html>\n"
    )


def tiles(values: Iterable[tuple[str, Any, str]]) -> str:
    """Return a row of large numbers; each value is (label, value, CSS class)."""
    cells = (
        f'<div class="tile {kind}"><b>{escape(str(value))}</b>{escape(label)}</div>' for label, value, kind in values
    )
    return f'<div class="tiles">{"".join(cells)}</div>'


def table(heads: Sequence[str], rows: Iterable[tuple[str, Sequence[Any]]]) -> str:
    """Return a table; each row is (CSS class, cells). A float gets four decimals, None a hyphen."""
    head = "".join(f"<th>{escape(name)}</th>" for name in heads)
    body = "".join(f'<tr class="{kind}">{"".join(_cell(value) for value in cells)}</tr>' for kind, cells in rows)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _cell(value: Any) -> str:
    if value is None:
        return "<td>-</td>"
    return f"<td>{value:.4f}</td>" if isinstance(value, float) else f"<td>{escape(str(value))}</td>"


def settings_table(settings: Mapping[str, Any]) -> str:
    """Return a collapsed table of names and values."""
    rows = "".join(f'<tr><td>{escape(k)}</td><td class="text">{escape(str(v))}</td></tr>' for k, v in settings.items())
    return f"<details><summary>{len(settings)} settings</summary><table>{rows}</table></details>"


def figure(svg: str, caption: str) -> str:
    """Return an inline SVG with its caption; "" without an SVG."""
    return f"<div><figure>{svg}</figure><figcaption>{escape(caption)}</figcaption></div>" if svg else ""

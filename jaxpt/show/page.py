"""A look as one page for the browser: hover over a token for what is known of it and for what it sees."""

from __future__ import annotations

import json
import os
from html import escape
from pathlib import Path

import numpy as np

from jaxpt.show.lines import Cell, cells_of, heading_of
from jaxpt.show.look import Look
from jaxpt.show.reading import Panel, Place, Reading

STYLE = """
body { font: 14px/1.4 system-ui, sans-serif; color: #1b2733; margin: 2em auto; max-width: 78em; padding: 0 1em; }
h1 { font-size: 1.3em; } h2 { font-size: 1.05em; margin: 2em 0 .3em; } h3 { font-size: .85em; color: #7b8794; }
h3, p { font-weight: normal; margin: .6em 0 .3em; }
.text { font-family: ui-monospace, "DejaVu Sans Mono", Menlo, Consolas, monospace; font-size: 13px; }
.t { display: inline-block; vertical-align: top; margin: 0 3px 5px 0; cursor: default; }
.t > * { display: block; padding: 0 3px; min-height: 1.35em; white-space: pre; }
.t b { font-weight: normal; background: #f1f5fa; border-radius: 3px; }
.t.special b { background: #e3e7ec; } .t.changed b { background: #ffd45e; }
.t.unseen { opacity: .3; } .t.here b { outline: 2px solid #2f6db3; }
.n { color: #2f6db3; } .p { color: #0b7a3e; } .w { color: #7b8794; } .o { color: #a02c7d; }
figure { display: inline-block; margin: .5em 1.5em .5em 0; vertical-align: top; }
figcaption { color: #7b8794; font-size: .85em; }
canvas { border: 1px solid #7b8794; image-rendering: pixelated; cursor: crosshair; }
#tip { position: fixed; right: 1em; bottom: 1em; background: #1b2733; color: white; padding: .5em .8em;
  border-radius: 5px; white-space: pre; font-family: ui-monospace, monospace; font-size: 12px; display: none; }
"""
# Attention comes as runs: for each query, the keys where what it sees begins and ends, by turns.
SCRIPT = """
const tip = document.getElementById("tip");
function say(text) { tip.textContent = text; tip.style.display = text ? "block" : "none"; }
for (const section of document.querySelectorAll("section")) {
  const data = JSON.parse(section.querySelector("script").textContent);
  const cells = [...section.querySelectorAll(".t")];
  const clear = () => { cells.forEach(c => c.classList.remove("unseen", "here")); say(""); };
  const sees = (runs, k) => runs.some((edge, i) => i % 2 == 0 && edge <= k && k < runs[i + 1]);
  cells.forEach((cell, q) => {
    cell.addEventListener("mouseenter", () => {
      say(cell.title.replaceAll("; ", "\\n"));
      cell.classList.add("here");
      const panel = data.panels[0];
      if (panel && panel.stride == 1 && panel.keys == cells.length && panel.runs.length == cells.length)
        cells.forEach((c, k) => c.classList.toggle("unseen", !sees(panel.runs[q], k)));
    });
    cell.addEventListener("mouseleave", clear);
  });
  section.querySelectorAll("canvas").forEach((canvas, n) => {
    const panel = data.panels[n], pen = canvas.getContext("2d");
    const scale = Math.max(1, Math.floor(420 / Math.max(panel.keys, panel.runs.length)));
    canvas.width = panel.keys * scale;
    canvas.height = panel.runs.length * scale;
    pen.fillStyle = "#f4f6f9";
    pen.fillRect(0, 0, canvas.width, canvas.height);
    const gap = scale > 5 ? 1 : 0;
    panel.runs.forEach((runs, q) => {
      pen.fillStyle = "#2f6db3";
      for (let i = 0; i < runs.length; i += 2)
        for (let k = runs[i]; k < runs[i + 1]; k++)
          pen.fillRect(k * scale, q * scale, scale - gap, scale - gap);
    });
    pen.fillStyle = "#e0a800";
    for (const start of data.starts) {
      pen.fillRect(start / panel.stride * scale, 0, 1, canvas.height);
      pen.fillRect(0, start / panel.stride * scale, canvas.width, 1);
    }
    const name = i => cells[i] ? i + " " + cells[i].querySelector("b").textContent : String(i);
    canvas.addEventListener("mousemove", event => {
      const q = Math.floor(event.offsetY / scale), k = Math.floor(event.offsetX / scale);
      if (!panel.runs[q]) return;
      const verb = sees(panel.runs[q], k) ? " sees " : " does not see ";
      say(name(q * panel.stride) + verb + name(k * panel.stride));
    });
    canvas.addEventListener("mouseleave", clear);
  });
}
"""


def write_page(look: Look, path: str | os.PathLike[str]) -> None:
    """Write a look as one HTML file that needs nothing beside it."""
    title = escape(f"{look.title}, {look.source}")
    sections = "\n".join(_section(reading) for reading in look.sequences)
    arrays = "".join(
        f"<dt>{escape(name)} {array.dtype}{list(array.shape)}</dt><dd>{escape(np.array2string(array))}</dd>"
        for name, array in look.arrays.items()
    )
    more = f"<h2>the example, by name</h2><dl>{arrays}</dl>" if arrays else ""
    page = f"""<!DOCTYPE html>
<html lang="en">
<head><meta charset="utf-8"><title>{title}</title><style>{STYLE}</style></head>
<body>
<h1>{title}</h1>
<p>Yellow: not as in the row. <span class="n">Blue: positions that do not count up.</span> <span class="p">Green:
predicted there.</span> Hover over a token: its id, position and weight, and what it sees.</p>
{sections}
{more}
<div id="tip"></div>
<script>{SCRIPT}</script>
</body>
</html>
"""
    Path(path).write_text(page, "utf-8")


def _section(reading: Reading) -> str:
    documents = "".join(
        f"<h3>{escape(heading_of(document))}</h3>"
        f'<div class="text">{"".join(map(_token, cells_of(document, reading)))}</div>'
        for document in reading.documents
    )
    figures = "".join(
        f"<figure><figcaption>{escape(', '.join(filter(None, ['a line per token: what it sees', panel.title])))}"
        f"</figcaption><canvas></canvas></figure>"
        for panel in reading.panels
    )
    data = {
        "panels": [_runs(panel) for panel in reading.panels],
        "starts": [document[0].index for document in reading.documents[1:]],
    }
    return (
        f"<section><h2>{escape(reading.name)}: {escape(reading.summary)}</h2>{documents}{figures}"
        f'<script type="application/json">{json.dumps(data, separators=(",", ":"))}</script></section>'
    )


def _token(cell: Cell) -> str:
    place = cell.place
    kinds = "t" + " special" * place.special + " changed" * place.changed
    under = "".join(
        f'<span class="{kind}">{escape(text)}</span>'
        for kind, text in (("n", cell.position), ("p", cell.predicts), ("w", cell.weight), ("o", cell.was))
        if text
    )
    return f'<span class="{kinds}" title="{escape(_told(place))}"><b>{escape(place.text)}</b>{under}</span>'


def _told(place: Place) -> str:
    """Everything about a place."""
    told = [f"place {place.index}", f"token {place.text}", f"id {place.token}", f"position {place.position}"]
    told.append(f"document {place.document}" if place.document else "padding")
    if place.was is not None:
        told.append(f"was {place.was}")
    told += [f"predicts {target.text} with weight {target.weight:g}" for target in place.targets]
    return "; ".join(told)


def _runs(panel: Panel) -> dict[str, object]:
    """Attention as runs: for each query, where what it sees begins and ends."""
    edges = np.diff(np.pad(panel.seen.astype(np.int8), ((0, 0), (1, 1))), axis=1)
    runs = [np.flatnonzero(line).tolist() for line in edges]
    return {"title": panel.title, "keys": panel.seen.shape[1], "stride": panel.stride, "runs": runs}

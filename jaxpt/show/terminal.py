"""A look in the terminal: coloured where it has colours, and to be read without them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from jaxpt.show.lines import Cell, cells_of, heading_of, lines_of, shorten
from jaxpt.show.look import Look
from jaxpt.show.reading import Panel, Place, Reading

GUTTER = 15  # columns: the first place of a line, and what the line says
SQUARE = 40  # places up to which attention is drawn
STYLES = {"position": "cyan", "predicts": "green", "weight": "dim", "was": "magenta"}


def print_look(look: Look, console: Console) -> None:
    """Print a look, wrapped to the width of the console."""
    say = _Printer(console)
    say.line(Text.assemble((look.title, "bold"), f", {look.source}"))
    for reading in look.sequences:
        say.reading(reading, "tokens" if reading is look.row else "reads")
    if look.arrays:
        say.heading("what the objective made, by name (it has no `views`)")
        for name, array in look.arrays.items():
            values = np.array2string(array, threshold=24, edgeitems=10, max_line_width=10**6, precision=3)
            say.line(Text.assemble((f"{name} ", "bold"), (f"{array.dtype}{list(array.shape)} ", "dim"), values))


class _Printer:
    def __init__(self, console: Console):
        self.console = console

    def line(self, text: Text) -> None:
        text.rstrip()
        self.console.print(text, soft_wrap=True)

    def heading(self, title: str, more: str = "") -> None:
        self.line(Text())
        self.line(Text.assemble((title, "bold"), f": {more}" if more else ""))

    def reading(self, reading: Reading, label: str) -> None:
        self.heading(reading.name, reading.summary)
        for document in reading.documents:
            rule = f"-- {heading_of(document)} "
            self.line(Text(rule + "-" * max(0, min(self.console.width, 100) - len(rule)), "cyan"))
            if not document[0].document:
                continue  # padding says nothing
            for cells in lines_of(cells_of(document, reading), self.console.width - GUTTER):
                self.cells(cells, label)
        for panel in reading.panels:
            self.panel(panel, reading)

    def cells(self, cells: Sequence[Cell], label: str) -> None:
        """One line of tokens and what stands under them."""
        self.row(f"{cells[0].place.index:>5} {label}", cells, [(c.place.text, _style(c.place)) for c in cells])
        for name in STYLES:
            texts = [getattr(cell, name) for cell in cells]
            if any(texts):
                self.row(f"      {name}", cells, [(text, STYLES[name]) for text in texts])

    def row(self, gutter: str, cells: Sequence[Cell], texts: list[tuple[str, str]]) -> None:
        line = Text.assemble((gutter.ljust(GUTTER), "dim"))
        for cell, (text, style) in zip(cells, texts, strict=True):
            line.append(text, style)
            line.append(" " * (cell.width - cell_len(text) + 1), "none")
        self.line(line)

    def panel(self, panel: Panel, reading: Reading) -> None:
        """Who sees whom, a line per query."""
        queries, keys = panel.seen.shape
        told = f"attention{', ' * bool(panel.title)}{panel.title}"
        average = panel.seen.sum(1).mean() * panel.stride
        self.line(Text(f"{told}: a token sees {average:.1f} of {keys * panel.stride} on average", "cyan"))
        if max(queries, keys) > SQUARE or 2 * keys + GUTTER > self.console.width:
            return
        self.line(Text(" " * GUTTER + " ".join(str(key % 10) for key in range(keys)), "dim"))
        for query in range(queries):
            text = reading.places[query].text if queries == len(reading.places) else str(query)
            line = Text.assemble((f"{query:>3} " + shorten(text, GUTTER - 5).rjust(GUTTER - 5) + " ", "dim"))
            for seen in panel.seen[query]:
                line.append("■ " if seen else "· ", "none" if seen else "dim")
            self.line(line)


def _style(place: Place) -> str:
    if place.changed:
        return "bold black on yellow"
    return "dim" if place.special else "none"

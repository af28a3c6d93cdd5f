"""Places in lines: what stands under what, the same in the terminal and in the picture."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from rich.cells import cell_len

from jaxpt.show.reading import Place, Reading


class Cell(NamedTuple):
    """One place: its token, and under it, where there are any, its position, what is predicted, and so on."""

    place: Place
    position: str
    predicts: str
    weight: str
    was: str

    @property
    def width(self) -> int:
        """Columns that it takes."""
        return max(map(cell_len, (self.place.text, *self[1:])))


def cells_of(places: Sequence[Place], reading: Reading) -> list[Cell]:
    """The cells of some places: positions and weights where they say something, the old token if not predicted."""
    cells, weighed, moved = [], reading.weighed, reading.moved
    for place in places:
        texts = [target.text for target in place.targets]
        weight = " ".join(f"{target.weight:.3g}" for target in place.targets) if weighed else ""
        was = place.was if place.was is not None and place.was not in texts else ""
        cells.append(Cell(place, str(place.position) if moved else "", " ".join(texts), weight, was))
    return cells


def lines_of(cells: Sequence[Cell], width: int) -> Iterator[Sequence[Cell]]:
    """Wrap cells, one column apart, into lines of at most ``width`` columns (a wider cell is alone in its line)."""
    start = used = 0
    for n, cell in enumerate(cells):
        if n > start and used + cell.width > width:
            yield cells[start:n]
            start, used = n, 0
        used += cell.width + 1
    if start < len(cells):
        yield cells[start:]


def heading_of(document: Sequence[Place]) -> str:
    """The name of a document, or of padding between documents, and its places."""
    first, last = document[0], document[-1]
    name = f"document {first.document}" if first.document else "padding"
    if first is last:
        return f"{name}, place {first.index}"
    return f"{name}, places {first.index} to {last.index}"


def shorten(text: str, width: int) -> str:
    """The text in at most ``width`` columns.

    >>> shorten("electroencephalography", 8)
    'electro…'
    """
    while cell_len(text) > width:
        text = text.rstrip("…")[:-1] + "…"
    return text

"""A look as one picture: the tokens in lines, and who sees whom."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from rich.cells import cell_len

from jaxpt.show.lines import Cell, cells_of, heading_of, lines_of, shorten
from jaxpt.show.look import Look
from jaxpt.show.reading import Panel, Place, Reading

COLUMNS = 112  # of a line of tokens
LINES = 16  # of tokens per sequence; a picture of a long row shows its beginning
FONT = 8.0  # points
CHARACTER = FONT * 0.602 / 72  # inches that a character of the font is wide
LINE = FONT * 1.45 / 72  # inches from one line of text to the next
MARGIN = 0.25  # inches
GUTTER = 6  # columns before a line: the place of its first token
LABEL = 16  # columns of a token at an axis
LABELLED = 64  # places up to which the axes of attention carry tokens
DPI = 110
INK, FAINT, POSITION, TARGET, CHANGED, SPECIAL, TOKEN, WAS = (
    "#1b2733", "#7b8794", "#2f6db3", "#0b7a3e", "#ffd45e", "#e3e7ec", "#f1f5fa", "#a02c7d",
)  # fmt: skip
ATTENTION = ListedColormap(["#f4f6f9", "#2f6db3"])
# Monospaced first; then what is there for scripts that it lacks.
FONTS = (
    "DejaVu Sans Mono", "Noto Sans Mono CJK SC", "Noto Sans CJK SC", "Noto Sans CJK JP", "Source Han Sans SC",
    "WenQuanYi Micro Hei", "PingFang SC", "Hiragino Sans", "Microsoft YaHei", "Arial Unicode MS", "Noto Sans",
)  # fmt: skip


class Block(NamedTuple):
    """A part of the picture: its height in inches, and what draws it at a height above the lower edge."""

    height: float
    draw: Callable[[Figure, float], None]


def write_picture(look: Look, path: str | os.PathLike[str]) -> None:
    """Write a look as a PNG file.

    Raises:
      ValueError: the file is no .png.
    """
    if not os.fspath(path).lower().endswith(".png"):
        raise ValueError(f"--png {os.fspath(path)}: a picture is a PNG file, so name it .png")
    blocks = [_words([(f"{look.title}, {look.source}", INK)], FONT + 2, "bold"), _words(_legend(look), FONT)]
    for reading in look.sequences:
        blocks.append(_words([(f"{reading.name}: {reading.summary}", INK)], FONT, "bold"))
        blocks.append(_tokens(reading))
        if reading.panels:
            blocks.append(_attention(reading))
    width = (COLUMNS + GUTTER) * CHARACTER + 2 * MARGIN
    height = sum(block.height for block in blocks) + 2 * MARGIN
    figure = Figure(figsize=(width, height), dpi=DPI)
    top = height - MARGIN
    fonts = [font for font in FONTS if font in font_manager.get_font_names()]
    with matplotlib.rc_context({"font.family": fonts}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")  # no font has them: a box stands there
        for block in blocks:
            top -= block.height
            block.draw(figure, top)
        figure.savefig(os.fspath(path), pil_kwargs={"optimize": True})


def _axes(figure: Figure, left: float, bottom: float, width: float, height: float) -> Axes:
    """Axes at a place in inches."""
    whole, tall = figure.get_size_inches()
    return figure.add_axes((left / whole, bottom / tall, width / whole, height / tall))


def _legend(look: Look) -> list[tuple[str, str]]:
    """What the colours mean that occur."""
    cells = [cell for reading in look.sequences for cell in cells_of(reading.places, reading)]
    occurs = {
        ("reads", INK): True,
        ("not as in the row", CHANGED): any(cell.place.changed for cell in cells),
        ("position", POSITION): any(cell.position for cell in cells),
        ("predicts", TARGET): any(cell.predicts for cell in cells),
        ("loss weight", FAINT): any(cell.weight for cell in cells),
        ("what was there", WAS): any(cell.was for cell in cells),
    }
    return [entry for entry, there in occurs.items() if there]


def _words(words: Sequence[tuple[str, str]], size: float, weight: str = "normal") -> Block:
    """A line of words in some colours, on the colour of tokens that changed where that is theirs."""

    def draw(figure: Figure, bottom: float) -> None:
        whole, tall = figure.get_size_inches()
        x = MARGIN
        for text, color in words:
            box = {"facecolor": CHANGED, "edgecolor": "none", "pad": 1.5} if color == CHANGED else None
            color = INK if color == CHANGED else color
            at = (x / whole, (bottom + 0.05) / tall)
            figure.text(*at, text, size=size, weight=weight, color=color, bbox=box, va="bottom", parse_math=False)
            x += (cell_len(text) + 2) * CHARACTER * size / FONT

    return Block(size * 2.2 / 72, draw)


# ------------------------------------------------------------------------------------------------- tokens


def _tokens(reading: Reading) -> Block:
    """The tokens in wrapped lines, what they predict below them; a heading per document."""
    rows: list[tuple[str, Sequence[Cell]]] = []  # a heading, or a line of cells
    for document in reading.documents:
        rows.append((heading_of(document), ()))
        if document[0].document:
            rows += [("", line) for line in lines_of(cells_of(document, reading), COLUMNS)]
    left_out = sum(len(line) for _, line in rows[LINES:])
    rows = rows[:LINES]
    if left_out:
        rows.append((f"... and {left_out} more tokens", ()))
    heights = [_height(line) for _, line in rows]

    def draw(figure: Figure, bottom: float) -> None:
        lines = sum(heights)
        axes = _axes(figure, MARGIN, bottom, (COLUMNS + GUTTER) * CHARACTER, lines * LINE)
        axes.set_xlim(0, COLUMNS + GUTTER)
        axes.set_ylim(lines, 0)
        axes.axis("off")
        y = 0.0
        for (heading, line), height in zip(rows, heights, strict=True):
            if not line:
                _write(axes, 0, y + 0.35, heading, FAINT)
            else:
                _line(axes, y, line)
            y += height

    return Block(sum(heights) * LINE, draw)


def _below(line: Sequence[Cell]) -> list[tuple[str, str]]:
    """What stands under a line of tokens, and in which colour."""
    colors = {"position": POSITION, "predicts": TARGET, "weight": FAINT, "was": WAS}
    return [(name, color) for name, color in colors.items() if any(getattr(cell, name) for cell in line)]


def _height(line: Sequence[Cell]) -> float:
    return 1.35 + len(_below(line)) if line else 1.25


def _line(axes: Axes, y: float, line: Sequence[Cell]) -> None:
    _write(axes, GUTTER - 1, y, str(line[0].place.index), FAINT, "right")
    x = float(GUTTER)
    for cell in line:
        color = _color(cell.place)
        axes.add_patch(Rectangle((x - 0.25, y), cell.width + 0.5, 0.98, facecolor=color, edgecolor="none"))
        _write(axes, x, y, cell.place.text, INK)
        for depth, (name, color) in enumerate(_below(line), 1):
            _write(axes, x, y + depth, getattr(cell, name), color)
        x += cell.width + 1


def _color(place: Place) -> str:
    return CHANGED if place.changed else SPECIAL if place.special else TOKEN


def _write(axes: Axes, x: float, y: float, text: str, color: str, align: str = "left") -> None:
    axes.text(x, y + 0.5, text, size=FONT, color=color, ha=align, va="center_baseline", parse_math=False)


# ---------------------------------------------------------------------------------------------- attention


def _attention(reading: Reading) -> Block:
    """The panels of a sequence side by side."""
    panels = reading.panels[:3]
    labelled = max(max(panel.seen.shape) for panel in panels) <= LABELLED
    whole = (COLUMNS + GUTTER) * CHARACTER
    left = 1.3 if labelled else 0.6  # for the labels of the queries
    above = 1.1 if labelled else 0.55  # for those of the keys, and the title
    right = 0.9 if labelled else 0.1  # for what queries predict
    below = 0.2
    size = min(4.6, whole / len(panels) - left - right)

    def draw(figure: Figure, bottom: float) -> None:
        for n, panel in enumerate(panels):
            wide = left + size + right
            axes = _axes(figure, MARGIN + n * wide + left, bottom + below, size, size)
            _panel(axes, panel, reading, labelled)

    return Block(size + above + below, draw)


def _panel(axes: Axes, panel: Panel, reading: Reading, labelled: bool) -> None:
    queries, keys = panel.seen.shape
    whole = keys * panel.stride, queries * panel.stride
    extent = (0, whole[0], whole[1], 0)
    smooth = "nearest" if max(queries, keys) <= 400 else "antialiased"
    axes.imshow(panel.seen, ATTENTION, vmin=0, vmax=1, extent=extent, aspect="auto", interpolation=smooth)
    axes.xaxis.tick_top()
    axes.xaxis.set_label_position("top")
    axes.tick_params(length=0, labelsize=_small(panel) if labelled else FONT - 1, colors=INK, pad=2)
    for spine in axes.spines.values():
        spine.set_color(FAINT)
    told = ", ".join(filter(None, ["a line per token: what it sees", panel.title]))
    axes.set_xlabel(told, size=FONT, color=FAINT, labelpad=4)
    starts = [document[0].index for document in reading.documents]
    for size, axis, line, limit in (
        (keys, axes.xaxis, axes.axvline, whole[0]),
        (queries, axes.yaxis, axes.axhline, whole[1]),
    ):
        if size * panel.stride < len(reading.places):  # keys of another sequence
            continue
        for start in starts[1:]:
            line(start, color=CHANGED, linewidth=1)
        if labelled:
            axis.set_ticks(np.arange(size) + 0.5, [shorten(place.text, LABEL) for place in reading.places])
        else:
            axis.set_ticks([0, *starts[1:], limit], [str(start) for start in (0, *starts[1:], limit)])
    if labelled:
        axes.set_xticks(np.arange(1, keys), minor=True)
        axes.set_yticks(np.arange(1, queries), minor=True)
        axes.grid(which="minor", color="white", linewidth=0.6)
        axes.tick_params(which="minor", length=0)
        for label in (*axes.get_xticklabels(), *axes.get_yticklabels()):
            label.set_parse_math(False)
        for label in axes.get_yticklabels():
            label.set_verticalalignment("center_baseline")
        axes.tick_params("x", rotation=90)
        _predicted(axes, panel, reading)


def _small(panel: Panel) -> float:
    """The size of labels that do not touch each other."""
    return min(FONT - 1, 300 / max(panel.seen.shape))


def _predicted(axes: Axes, panel: Panel, reading: Reading) -> None:
    """What each query predicts, to the right of its line."""
    if len(panel.seen) != len(reading.places):
        return
    style: dict[str, Any] = {"size": _small(panel), "color": TARGET, "va": "center", "parse_math": False}
    for place in reading.places:
        if place.targets:
            told = shorten("→ " + " ".join(target.text for target in place.targets), LABEL)
            at = (axes.get_xlim()[1], place.index + 0.5)
            axes.annotate(told, at, (4, 0), textcoords="offset points", **style)

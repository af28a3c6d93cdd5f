"""What a person is shown: every objective's views, the terminal, the picture and the page."""

from __future__ import annotations

import dataclasses
import io
import json
import struct
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console
from support import packed_batch, tiny, tiny_vocab

from jaxpt import cli
from jaxpt.config import RunConfig
from jaxpt.corruption.selection import Spans
from jaxpt.data.build import BuildConfig, build
from jaxpt.data.manifest import load_vocab
from jaxpt.data.pipeline import Phase, Pipeline, Source
from jaxpt.data.tokenizer import byte_tokenizer, wordpiece_tokenizer
from jaxpt.models.patterns import bidirectional, causal
from jaxpt.models.presets import modernbert
from jaxpt.objectives import OBJECTIVES, CausalLM, MaskedLM
from jaxpt.objectives.combine import Mixture
from jaxpt.show import look, print_look, write_page, write_picture
from jaxpt.show.look import Look
from jaxpt.show.reading import Reading, reading_of
from jaxpt.step import make_example, seed_key
from jaxpt.types import Objective, Snapshot, View, Vocab

CONFIG = str(Path(__file__).parent.parent / "configs" / "quickstart.py")
TOKENIZER = byte_tokenizer()
PAD, CLS, SEP, MASK, FIRST = 0, 4, 5, 6, 107


def ids(text: str) -> list[int]:
    """Letters are bytes; C, S, M and P are [CLS], [SEP], [MASK] and padding."""
    special = {"C": CLS, "S": SEP, "M": MASK, "P": PAD}
    return [special.get(letter, FIRST + ord(letter)) for letter in text]


def view(text: str, segments: str, **more) -> View:
    """One row of a view, without the leading R."""
    segment_ids = np.array([int(s) for s in segments], np.int32)
    starts = np.array([segments.index(s) for s in segments])
    return View(np.array(ids(text), np.int32), segment_ids, (np.arange(len(text)) - starts).astype(np.int32), **more)


def masked() -> Look:
    row = view("CabcSCxSPP", "1111122200")
    pattern = jax.tree.map(lambda leaf: leaf[0], bidirectional(row.segment_ids[None], row.positions[None]))
    read = view(
        "CaMzSCxSPP",
        "1111122200",
        pattern=pattern,
        targets=np.array(ids("bcxa"), np.int32),
        target_positions=np.array([2, 3, 6, 0]),
        weights=np.array([1, 0.5, 1, 0], np.float32),
    )
    windows: dict[int | None, str] = {None: ""}
    return Look(
        "MaskedLM",
        "a row",
        reading_of("the row", row, row, TOKENIZER, {}),
        (reading_of("text", read, row, TOKENIZER, windows),),
    )


def printed(seen: Look, width: int = 60, **options) -> str:
    file = io.StringIO()
    print_look(seen, Console(file=file, width=width, highlight=False, **options))
    return file.getvalue()


# ------------------------------------------------------------------------------------------------ the terminal


GOLDEN = """\
MaskedLM, a row

the row: 8 tokens and 2 of padding
-- document 1, places 0 to 4 -------------------------------
    0 tokens   [CLS] a b c [SEP]
-- document 2, places 5 to 7 -------------------------------
    5 tokens   [CLS] x [SEP]

text: 8 tokens and 2 of padding, 2 not as in the row; 3 predictions (37.5% of the tokens)
-- document 1, places 0 to 4 -------------------------------
    0 reads    [CLS] a [MASK] z   [SEP]
      predicts         b      c
      weight           1      0.5
-- document 2, places 5 to 7 -------------------------------
    5 reads    [CLS] x [SEP]
      predicts       x
      weight         1
attention: a token sees 4.2 of 8 on average
               0 1 2 3 4 5 6 7
  0      [CLS] ■ ■ ■ ■ ■ · · ·
  1          a ■ ■ ■ ■ ■ · · ·
  2     [MASK] ■ ■ ■ ■ ■ · · ·
  3          z ■ ■ ■ ■ ■ · · ·
  4      [SEP] ■ ■ ■ ■ ■ · · ·
  5      [CLS] · · · · · ■ ■ ■
  6          x · · · · · ■ ■ ■
  7      [SEP] · · · · · ■ ■ ■
"""


def test_the_terminal_shows_what_is_read_and_what_is_predicted_below_it():
    assert printed(masked()) == GOLDEN


def test_positions_are_shown_where_they_do_not_count_up(tmp_path: Path):
    def with_positions(*positions: int) -> Look:
        row = view("abcx", "1112")._replace(positions=np.array(positions, np.int32))
        return Look("GLM", "a row", reading_of("the row", row, row, TOKENIZER, {}), ())

    moved = with_positions(7, 0, 12, 3)
    assert "    0 tokens   a b c\n      position 7 0 12\n" in printed(moved)
    write_page(moved, tmp_path / "look.html")
    assert '<b>c</b><span class="n">12</span>' in (tmp_path / "look.html").read_text()
    assert "position" not in printed(with_positions(7, 8, 9, 0)) + GOLDEN


def test_lines_wrap_to_the_width_and_keep_what_stands_below():
    lines = printed(masked(), width=31).splitlines()
    assert "    3 reads    z   [SEP]" in lines
    assert lines[lines.index("    3 reads    z   [SEP]") + 1] == "      predicts c"
    assert all(len(line) <= 31 for line in lines if line[:5].strip().isdigit())


def test_colours_only_in_a_terminal():
    assert "\x1b" not in printed(masked())
    coloured = printed(masked(), force_terminal=True, color_system="standard")
    assert "\x1b[1;30;43m[MASK]" in coloured  # changed
    assert "\x1b[32mb\x1b" in coloured  # predicted


def test_a_row_that_is_read_as_it_is_is_shown_once():
    row = view("abc", "111", targets=np.array(ids("bca")), weights=np.array([1.0, 1, 0]))
    the_row, text = (reading_of(name, row, row, TOKENIZER, {}) for name in ("the row", "text"))
    seen = Look("CausalLM", "x", the_row, (text,))
    assert "the row" not in printed(seen)
    assert "weight" not in printed(seen)  # all are 1


def test_tokens_that_moved_are_found_again():
    """The middle goes to the end: only the sentinels and what moved are new."""
    row, read = view("abcdefgh", "11111111"), view("abMefghMcdM", "11111111111")
    places = reading_of("decoder", read, row, TOKENIZER, {}).places
    assert "".join("x" if place.changed else "." for place in places) == "..x....xxxx"
    assert all(place.was is None for place in places)


def test_what_was_there_is_told_where_it_is_not_predicted():
    classes = ("original", "replaced")
    read = view("azc", "111", targets=np.array([0, 1, 0]), classes=classes)
    places = reading_of("discriminator", read, view("abc", "111"), TOKENIZER, {}).places
    assert [place.was for place in places] == [None, "b", None]
    assert [place.targets[0].text for place in places] == ["original", "replaced", "original"]


@pytest.mark.parametrize("pieces", [b"[UNK]\n[MASK]\nplay\n##ing\n"])
def test_tokens_are_named_as_their_vocabulary_writes_them(pieces):
    tokenizer = wordpiece_tokenizer(pieces)
    assert [tokenizer.name(i) for i in range(4)] == ["[UNK]", "[MASK]", "play", "##ing"]
    assert tokenizer.name(tokenizer.special["cls"]) == "[CLS]"  # added behind the vocabulary
    assert tokenizer.name(-1) == "<-1>"


# ------------------------------------------------------------------------------------- the picture and the page


class Tags(HTMLParser):
    """Refuses tags that are not closed in order; keeps attributes and the data of scripts."""

    VOID = ("meta", "br", "link", "img")

    def __init__(self):
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict]] = []
        self.scripts: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] == ["script"]:
            self.scripts.append(data)


def test_the_page_is_well_formed_and_needs_nothing_beside_it(tmp_path):
    seen = masked()
    evil = dataclasses.replace(seen.readings[0].places[1], text="</script><b>", changed=True)
    places = (seen.readings[0].places[0], evil, *seen.readings[0].places[2:])
    seen = dataclasses.replace(seen, readings=(dataclasses.replace(seen.readings[0], places=places),))
    write_page(seen, tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text("utf-8")
    page = Tags()
    page.feed(text)
    page.close()
    assert page.open == []
    assert not {"src", "href"} & {name for _, attrs in page.seen for name in attrs}
    assert not any(word in text for word in ("http", "@import", "url("))
    titles = [attrs["title"] for tag, attrs in page.seen if "title" in attrs]
    assert titles[8 + 2] == (
        f"place 2; token [MASK]; id {MASK}; position 2; document 1; was b; predicts b with weight 1"
    )
    row, text_data = (json.loads(script) for script in page.scripts[:2])
    assert row == {"panels": [], "starts": [5]}
    assert text_data["panels"][0]["runs"] == [[0, 5]] * 5 + [[5, 8]] * 3


def test_the_picture_is_a_png_of_a_sane_size(tmp_path):
    write_picture(masked(), tmp_path / "picture.png")
    data = (tmp_path / "picture.png").read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", data[16:24])
    assert 600 < width < 1600
    assert 600 < height < 1600
    assert 10_000 < len(data) < 200_000
    with pytest.raises(ValueError, match=r"name it \.png"):
        write_picture(masked(), tmp_path / "picture.jpg")


def test_a_picture_of_a_long_row_of_strange_texts(tmp_path, recwarn):
    """Not all scripts have a font everywhere; a dollar is no formula; long rows are shown in part."""
    length = 1200
    texts = ["$x_2$", "你好", "\u0bb5", "a" * 40]
    row = view("a" * length, "1" * 700 + "2" * (length - 700))
    pattern = jax.tree.map(lambda leaf: leaf[0], causal(row.segment_ids[None], row.positions[None]))
    reading = reading_of("text", row._replace(pattern=pattern), row, TOKENIZER, {None: "", 64: "window 64"})
    places = tuple(dataclasses.replace(place, text=texts[place.index % 4]) for place in reading.places)
    write_picture(Look("X", "y", reading, (dataclasses.replace(reading, places=places),)), tmp_path / "long.png")
    assert not [warning for warning in recwarn if "Glyph" in str(warning.message)]
    assert struct.unpack(">I", (tmp_path / "long.png").read_bytes()[20:24])[0] < 2500


# ----------------------------------------------------------------------------------------- every objective


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_has_views_whose_shapes_agree(name):
    vocab = tiny_vocab()
    objective = tiny(OBJECTIVES[name]()).build(vocab)
    batch = packed_batch(objective.rows, vocab)
    assert objective.views is not None
    classes = {}

    def make():
        params = objective.init(jax.random.key(0))
        carry = objective.start(params, jax.random.key(1)) if objective.start else {}
        snapshot = Snapshot(params, carry, jnp.int32(0))
        found = objective.views(snapshot, make_example(objective, snapshot, batch, jax.random.key(2)))
        classes.update({view: found[view].classes for view in found})
        return {view: found[view]._replace(classes=()) for view in found}

    views = jax.device_get(jax.jit(make)())
    assert views
    for each, read in views.items():
        rows, length = read.tokens.shape
        assert rows == 8
        assert read.segment_ids.shape == read.positions.shape == (rows, length)
        assert ((read.tokens >= 0) & (read.tokens < vocab.size)).all()
        if read.pattern is not None:
            assert read.pattern.query_segments.shape == read.pattern.query_ranks.shape == (rows, length)
            assert read.pattern.key_segments.shape == read.pattern.key_ranks.shape
        if read.targets is None:
            continue
        assert read.targets.ndim == 2
        assert read.weights is not None
        assert read.weights.shape == read.targets.shape
        asked = read.weights > 0
        assert asked.any()
        places = np.broadcast_to(np.arange(read.targets.shape[1]), read.targets.shape)
        if read.target_positions is not None:
            assert read.target_positions.shape == read.targets.shape
            places = read.target_positions
        assert ((places >= 0) & (places < length))[asked].all()
        assert (np.take_along_axis(read.segment_ids, np.where(asked, places, 0), 1)[asked] > 0).all()
        kinds = len(classes[each]) or vocab.size
        assert ((read.targets >= 0) & (read.targets < kinds))[asked].all()


# ------------------------------------------------------------------------------------------ rows and texts


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("data")
    (folder / "text.txt").write_text("".join(f"Line {n} says {n * 7}. So it does.\n" for n in range(300)))
    out = folder / "built"
    build(BuildConfig(out=str(out), input=(str(folder / "text.txt"),), document="line", model="byte", workers=1))
    return str(out)


def run_config(data: str, objective=None, **changes) -> RunConfig:
    objective = tiny(MaskedLM(rate=0.3, selection=Spans())) if objective is None else objective
    return RunConfig(objective=objective, data=(data,), seq_len=64, batch_size=4, **changes)


def tokens_of(reading: Reading) -> list[int]:
    return [place.token for place in reading.places] + [PAD] * reading.padding


def test_a_row_is_what_the_run_is_served(data):
    config = run_config(data, seed=3)
    seen = look(config, row=2, step=5)
    objective = config.objective.build(load_vocab(data))
    batch = Pipeline([Phase(0, (Source(data),), 64, 4)], objective.rows, 3).batch(5)
    key = jax.random.fold_in(seed_key(3, "corrupt"), 5)
    example = jax.jit(lambda batch: make_example(objective, Snapshot({}, {}, jnp.int32(5)), batch, key))(batch)
    assert tokens_of(seen.row) == batch.tokens[2].tolist()
    (text,) = seen.readings
    assert tokens_of(text) == example.inputs["tokens"][2].tolist()
    used = np.flatnonzero(example.weights["mlm"][2])
    want = {int(example.inputs["target_positions"][2, k]): int(example.inputs["targets"][2, k]) for k in used}
    assert {place.index: place.targets[0].text for place in text.places if place.targets} == {
        place: TOKENIZER.name(target) for place, target in want.items()
    }
    assert seen.source == f"row 2 of step 5, from {data}"
    assert tokens_of(look(config, row=3, step=5).row) != tokens_of(seen.row)


def test_texts_are_the_documents_of_a_row(data):
    seen = look(run_config(data), ["It is. So.", "né"])
    first, second = ([CLS, *(FIRST + byte for byte in text.encode()), SEP] for text in ("It is. So.", "né"))
    assert tokens_of(seen.row)[:18] == [*first, *second, PAD]
    assert [place.document for place in seen.row.places] == [1] * 12 + [2] * 5
    assert [place.position for place in seen.row.places] == [*range(12), *range(5)]
    assert seen.row.padding == 64 - 17
    assert seen.title == "MaskedLM"


def test_windows_of_layers_are_panels(data):
    config = run_config(data, MaskedLM(encoder=tiny(modernbert("base"))))
    text = "x" * 20
    (reading,) = look(config, [text]).readings
    assert [panel.title for panel in reading.panels] == ["1 of 2 layers: no window", "1 of 2 layers: window 4"]
    distance = np.abs(np.subtract.outer(np.arange(22), np.arange(22)))
    np.testing.assert_array_equal(reading.panels[1].seen, distance <= 4)
    (reading,) = look(config, ["ab"]).readings  # too short for a window to matter
    (panel,) = reading.panels
    assert panel.title == "1 of 2 layers: no window, 1 of 2 layers: window 4, alike here"


@pytest.mark.parametrize(
    ("texts", "options", "message"),
    [
        (["x" * 63], {}, "65 tokens, .* do not fit into a row of 64: shorten the text or raise --seq-len"),
        ([""], {}, "has no tokens"),
        ([], {"row": 4}, "--row 4: the batch of step 0 has 4 rows, 0 to 3"),
        ([], {"step": -1}, "--step -1: steps count from 0"),
    ],
)
def test_mistakes_are_told(data, texts, options, message):
    with pytest.raises(ValueError, match=message):
        look(run_config(data), texts, **options)


def test_more_mistakes_are_told(data, tmp_path):
    config = run_config(data, tiny(MaskedLM(packing="one_document")))
    with pytest.raises(ValueError, match="2 texts, and a row of this objective holds one document"):
        look(config, ["a", "b"])
    with pytest.raises(ValueError, match=r"jaxpt data build .*nothing-here"):
        look(run_config(str(tmp_path / "nothing-here")), ["a"])


@dataclass(frozen=True)
class Own:
    """An objective of one's own: without views, or such that it wants the whole batch."""

    causal: CausalLM = field(default_factory=lambda: tiny(CausalLM()))
    views: bool = False

    def build(self, vocab: Vocab) -> Objective:
        objective = self.causal.build(vocab)
        if not self.views:
            return objective._replace(views=None)

        def corrupt(snapshot, batch, key):
            if batch.tokens.shape[0] != 4:
                raise ValueError("4 rows")
            turned = batch._replace(tokens=jnp.where(jnp.arange(4)[:, None] == 2, MASK, batch.tokens))
            return objective.corrupt(snapshot, turned, key)

        return objective._replace(corrupt=corrupt)

    def for_evaluation(self):
        return self


def test_an_objective_without_views_shows_its_arrays_by_name(data):
    seen = look(run_config(data, Own()), ["ab"])
    assert set(seen.arrays) == {"tokens", "segment_ids", "positions", "targets", "weights.lm"}
    assert seen.arrays["weights.lm"].tolist() == [1, 1, 0] + [0] * 61
    text = printed(seen)
    assert "a b </s>" in text or "a b [EOS]" in text
    assert "weights.lm float32[64] [1. 1. 0." in text


def test_an_objective_that_divides_the_batch_gets_its_row_in_place(data):
    """Rows whose place decides what they are for: the row stands in a whole batch."""
    config = run_config(data, Own(views=True))
    tokens = [{place.token for place in look(config, ["ab"], row).readings[0].places} for row in (1, 2)]
    assert tokens[1] == {MASK}
    assert MASK not in tokens[0]
    config = run_config(data, tiny(Mixture()))  # of two parts, one row each is the least
    parts = [[reading.name for reading in look(config, ["ab"], row).readings] for row in (0, 3)]
    assert parts == [["mlm/text"], ["clm/text"]]


# --------------------------------------------------------------------------------------------- the command


def test_the_command_shows_and_writes(data, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "")
    png, html = tmp_path / "a.png", tmp_path / "a.html"
    flags = ["--text", "Hello.", "--text=So?", "--row", "1", "--step=2", "--png", str(png), "--html", str(html)]
    assert cli.main(["show", CONFIG, "--data", data, "--seq-len", "32", *flags]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("CausalLM, your text, as row 1 of step 2\n")
    assert "reads    H e l l o ." in out
    assert f"wrote {png}" in err
    assert png.exists()
    assert "CausalLM" in html.read_text("utf-8")


def test_the_command_teaches_and_says_what_is_wrong(capsys):
    assert cli.main(["show", "--help"]) == 0
    out = capsys.readouterr().out
    assert "examples:\n  jaxpt show " in out
    assert cli.main(["show"]) == 2
    capsys.readouterr()
    for args, message in (
        (["show", CONFIG, "--row", "x"], "--row x: give a whole number"),
        (["show", CONFIG, "--text"], '--text needs a value, for example --text "The quick brown fox."'),
        (["show", "--text", "a"], "name the config file before --text"),
    ):
        assert cli.main(args) == 2
        assert message in capsys.readouterr().err

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxpt.data.sentences import join_sentences, sentence_ends, unspaced


def split(text):
    ends = sentence_ends(text)
    return [text[a:b].strip() for a, b in zip((0, *ends), (*ends, None), strict=True)]


@pytest.mark.parametrize(
    "sentences",
    [
        ["It rains.", "It pours!", "Does it?", "Yes."],
        ["Dr. Smith of the U. S. Army saw Fig. 3.", "He left."],
        ["“Stop!”", "She ran (fast.)", "He did not."],
        ["It costs 3.50 e.g. in Rome.", "¿Por qué?", "Ça va."],
        ["看天。", "“好！”", "他说：再见？", "走了"],
        ["我用 Python 3.13。", "It works.", "好"],
        ["संसार।", "जल"],
        ["А он сказал.", "Это так."],
        ["No full stop", "after a blank line"],
    ],
)
def test_sentences(sentences):
    unspaced_end = "。！？”।"
    text = ""
    for before, after in itertools.pairwise(sentences):
        if before == "No full stop":
            text += before + "\n \n"
        else:
            text += before + ("" if before[-1] in unspaced_end and unspaced(after.strip("“")[0]) else " ")
    text += sentences[-1]
    assert split(text) == sentences


@pytest.mark.parametrize(
    "text",
    ["", "  ", "a.b.c www.x.org 3.14", "and so on... but it went on", "Wait. what", "The end.   ", "终。\n"],
)
def test_no_sentence_ends(text):
    assert sentence_ends(text) == ()


@given(st.text(alphabet="Aa .!?。\n\"'）” ", max_size=60))
def test_ends_are_sound(text):
    ends = sentence_ends(text)
    assert list(ends) == sorted(set(ends))
    pieces = [text[a:b] for a, b in zip((0, *ends), (*ends, None), strict=True)]
    assert "".join(pieces) == text
    if ends:
        assert all(piece.strip() for piece in pieces)


def test_long_runs_take_linear_time():
    for text in (
        "." * 300_000,
        "." + ")" * 300_000,
        "." + " " * 300_000 + "a",
        "\n" * 300_000,
        "." * 9 + "。" * 300_000,
    ):
        assert len(sentence_ends(text)) <= 1


def test_join_sentences():
    document = join_sentences(["One.", "  ", "Two.\n", "Three.", "四。", "五。"])
    assert document.text == "One. Two.\nThree.四。五。"
    assert document.ends is not None
    assert [document.text[a:b] for a, b in zip((0, *document.ends), (*document.ends, None), strict=True)] == [
        "One.",
        " Two.\n",
        "Three.",
        "四。",
        "五。",
    ]


def test_unspaced():
    assert [unspaced(c) for c in "aé한कД漢かカไ၀。"] == [False] * 5 + [True] * 6

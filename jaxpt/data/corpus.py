"""The built-in corpora, which need no download: English prose and code of the installed Python.

`prose` is the documentation of the Python language, and the docstrings of the standard library and of the packages
that jaxpt itself requires. `code` is the source of the standard library. Files are parsed, never imported. The text
differs between versions of Python, so a build records versions and digests.
"""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import platform
import re
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from jaxpt.data.files import Piece
from jaxpt.data.sentences import Document, sentence_ends

Corpus = Literal["prose", "code"]

PACKAGES = ("jax", "jaxlib", "numpy", "scipy")
# What distributions of Python split off, generate or add: without it the corpus is nearly the same everywhere.
_SKIPPED_FOLDERS = re.compile(
    r"tests?|idle_test|site-packages|dist-packages|_bundled|lib2to3|distutils|idlelib|tkinter|turtledemo|config-.*"
    r"|__pycache__|\..*"
)
_SKIPPED_FILES = re.compile(
    r"_sysconfigdata.*|topics\.py|sitecustomize\.py"
    r"|(?:cp\d+|mac_\w+|iso8859_\d+|koi8_\w|hp_roman8|kz1048|ptcp154|tis_620|palmos)\.py"  # tables of encodings
)
_TOPICS = "pydoc_data/topics.py"


def corpus_pieces(corpus: Corpus) -> list[Piece]:
    """The files of a built-in corpus, in a fixed order.

    Raises:
      ValueError: this Python comes without the sources of its standard library.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    files = _sources(root, "stdlib")
    topics = root / _TOPICS
    if len(files) < 100 or (corpus == "prose" and not topics.exists()):
        raise ValueError(
            f"the built-in corpus {corpus!r} is read from the sources of Python's standard library, and {root} does "
            f"not hold them (an embedded or stripped Python?): use another Python, or give your own text with --input"
        )
    if corpus == "code":
        return [piece for piece in files if 200 <= piece.size <= 200_000]
    for package in PACKAGES:
        spec = importlib.util.find_spec(package)
        if spec and spec.submodule_search_locations:
            files += _sources(Path(next(iter(spec.submodule_search_locations))), package)
    return [_piece(topics, f"stdlib/{_TOPICS}"), *files]


def _sources(root: Path, label: str) -> list[Piece]:
    pieces = []
    for path in sorted(root.rglob("*.py"), key=lambda path: path.relative_to(root).as_posix()):
        name = path.relative_to(root)
        skipped = any(_SKIPPED_FOLDERS.fullmatch(part) for part in name.parts[:-1])
        if not skipped and not _SKIPPED_FILES.fullmatch(name.name) and name.as_posix() != "html/entities.py":
            pieces.append(_piece(path, f"{label}/{name.as_posix()}"))
    return pieces


def _piece(path: Path, name: str) -> Piece:
    stat = path.stat()
    return Piece(str(path), name, "text", stat.st_size, int(stat.st_mtime))


def versions() -> dict[str, str]:
    """The versions that decide what the built-in corpora hold."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


# --------------------------------------------------------------------------------------------- prose


def read_prose(piece: Piece) -> Iterator[Document]:
    """The documents of a source file: all its docstrings as one, or each topic of the language documentation."""
    source = Path(piece.path).read_bytes()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of escapes in other people's strings
            tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return
    units = _topics(tree) if piece.name.endswith(_TOPICS) else [_docstrings(tree)]
    for unit in units:
        paragraphs = [paragraph for text in unit for paragraph in prose_paragraphs(text)]
        if paragraphs:
            yield _document(paragraphs)


def _topics(tree: ast.Module) -> list[list[str]]:
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            topics = ast.literal_eval(node.value)
            return [[topics[name]] for name in sorted(topics)]
    return []


def _docstrings(tree: ast.Module) -> list[str]:
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = (ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, documented))
    return [text for text in found if text]


def _document(paragraphs: list[str]) -> Document:
    """Paragraphs separated by a newline, each split into sentences."""
    ends: list[int] = []
    length = 0
    for paragraph in paragraphs:
        if length:
            ends.append(length)
            length += 1
        ends += [length + end for end in sentence_ends(paragraph)]
        length += len(paragraph)
    return Document("\n".join(paragraphs), tuple(ends))


_ROLE = re.compile(r":[\w:+.-]+:`([^`<]*?)(?:\s*<[^`>]*>)?`")
_LINK = re.compile(r"`([^`<]+?)\s*<[^`>]*>`_+")
_MARKS = re.compile(r"\*\*|``|`_*|(?<=\])_+")
_RULER = re.compile(r"^[\s=~^\"'`#*+.:_-]*[=~^\"'`#*+_-]{3,}[\s=~^\"'`#*+.:_-]*$", re.MULTILINE)
_PROSE_END = re.compile(r"[.!?][\"')\]]*$")


def prose_paragraphs(text: str) -> list[str]:
    """The paragraphs of a docstring that are running English, without markup and on one line each.

    Kept are paragraphs of at least 8 words, at least 85 % letters and spaces, that end as a sentence does;
    examples, directives, grammar and tables are left out.
    """
    kept = []
    for block in re.split(r"\n[ \t]*\n", text):
        if ">>>" in block or ".. " in block or "::=" in block or _RULER.search(block):
            continue
        block = _MARKS.sub("", _LINK.sub(r"\1", _ROLE.sub(r"\1", block)))
        block = re.sub(r"::$", ":", " ".join(block.split()))
        plain = sum(c.isalpha() or c == " " for c in block)
        if len(block.split(" ")) >= 8 and plain >= 0.85 * len(block) and _PROSE_END.search(block):
            kept.append(block)
    return kept

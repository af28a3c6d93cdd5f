"""Phrases by pointwise mutual information, and where they start (PMI-Masking, Levine et al. 2021, arXiv:2010.01825).

    PMI(w1 .. wn) = min over segmentations into two or more parts of  log p(w1 .. wn) - sum of log p(part)

The minimum keeps a strong part ("New York") from making the whole ("in New York") look good. Of the n-grams of 2 to 5
words that occur often enough, those with the highest PMI are phrases, n by n, since values of different n do not
compare. Words are runs of tokens; a phrase never holds a word without letters and digits or crosses a sentence.

Three passes over the encoded training documents, of bounded memory: counters shared by n-grams of one hash find which
n-grams can be frequent; those are counted exactly; with their counts every n-gram in the text gets its PMI.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jaxpt.data.jobs import advance, run, say
from jaxpt.data.manifest import decode_document
from jaxpt.data.tokenizer import Tokenizer

LONGEST = 5  # words of a phrase
BLOCK = 1 << 19  # tokens that are looked at together
SKETCH_BITS = (16, 28)  # log2 of the number of shared counters, of one byte each
TABLE = 1 << 25  # n-grams that are counted exactly, at most
FREQUENT = 255  # the highest count that a shared counter reaches

SKETCH, GRAMS, LOG_P, TABLES, PHRASES = "sketch.npy", "grams.npy", "log_p.npy", "words.npy", "phrases.npy"
SPELLINGS = "spellings.npy"
SCORE = np.dtype([("gram", np.uint64), ("pmi", np.float32), ("n", np.uint8)])


class PassJob(NamedTuple):
    """One pass over one part: the file of its encoded training documents, and the folder with what came before."""

    file: str
    work: str
    token_dtype: str
    bits: int  # log2 of the number of shared counters


# ---------------------------------------------------------------------------------------- words and n-grams


def save_word_tables(tokenizer: Tokenizer, work: Path) -> None:
    """Write which tokens start a word and which hold a letter or a digit, [2, V] bool, and which spell alike.

    Tokens spell alike where their text differs in case and outer space only: [V] i32, a number for each spelling, -1
    for space alone.
    """
    texts = [tokenizer.decode([i]) for i in range(tokenizer.size)]
    letters = [any(c.isalnum() or c == "\ufffd" for c in text) for text in texts]
    np.save(work / TABLES, np.array([tokenizer.starts_word, letters]))
    bare = [text.strip().casefold() for text in texts]
    whole = [text if "\ufffd" not in text else f"\ufffd{i}" for i, text in enumerate(bare)]  # a byte of a character
    spellings = np.unique(whole, return_inverse=True)[1].astype(np.int32)
    np.save(work / SPELLINGS, np.where([bool(text) for text in bare], spellings, -1))


class Words(NamedTuple):
    """The words of some documents, one after the other."""

    first: np.ndarray  # [W] i64: the token that starts the word
    hashes: np.ndarray  # [W] u64
    runs: np.ndarray  # [W] i64: the n-grams lie inside a run; a word that is in no phrase has a run of its own


def words_of(tokens: np.ndarray, sentence_starts: np.ndarray, starts_word: np.ndarray, letters: np.ndarray) -> Words:
    """Cut tokens into words.

    Args:
      tokens: [n], of whole documents.
      sentence_starts: [n] bool, True where a document starts.
      starts_word: [V] bool.
      letters: [V] bool, tokens that hold a letter or a digit.
    """
    first = np.flatnonzero(starts_word[tokens] | sentence_starts)
    place = (np.arange(len(tokens)) - np.repeat(first, np.diff(first, append=len(tokens)))).astype(np.uint64)
    hashes = _mix(np.add.reduceat(_mix(tokens.astype(np.uint64) * _ODD + place), first))
    apart = ~np.logical_or.reduceat(letters[tokens], first)
    breaks = sentence_starts[first] | apart
    breaks[1:] |= apart[:-1]
    return Words(first, hashes, np.cumsum(breaks))


_ODD = np.uint64(0x9E3779B97F4A7C15)


def _mix(x: np.ndarray) -> np.ndarray:
    """A bijection of 64-bit integers whose every bit depends on every bit (SplitMix64)."""
    x = x + _ODD
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def grams_of(words: Words) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """For n = 1 .. LONGEST: the words at which an n-gram starts, and the n-grams' hashes (u64)."""
    hashes = np.zeros(len(words.first), np.uint64)
    for n in range(1, LONGEST + 1):
        count = max(len(words.first) - n + 1, 0)
        hashes = _mix(hashes[:count] * _ODD + words.hashes[n - 1 :])
        inside = words.runs[:count] == words.runs[n - 1 :]
        yield np.flatnonzero(inside), hashes[inside]


def pmi(log_p: np.ndarray) -> np.ndarray:
    """The PMI of every n-gram, from the log-probabilities of all n-grams.

    Args:
      log_p: [N, W] float64: of the n-gram of n = 1 .. N words that starts at each word; -inf where there is none.

    Returns:
      [N, W]: log p minus that of the most probable segmentation; -inf for n = 1 and where there is none.

    >>> log_p = np.log([[0.1, 0.1, 0.1], [0.05, 0.02, 0], [0.04, 0, 0]], where=[[1] * 3, [1, 1, 0], [1, 0, 0]],
    ...                out=np.full((3, 3), -np.inf))
    >>> np.exp(pmi(log_p))[1:].round(1).tolist()  # 0.05 / 0.1**2; and 0.04 / (0.05 * 0.1), not 0.04 / 0.1**3
    [[5.0, 2.0, 0.0], [8.0, 0.0, 0.0]]
    """
    longest, size = log_p.shape
    best = log_p.copy()  # the most probable way to write the n-gram, in one part or several
    result = np.full_like(log_p, -np.inf)
    for n in range(2, longest + 1):
        count = max(size - n + 1, 0)
        parted = np.max([log_p[k - 1, :count] + best[n - k - 1, k : k + count] for k in range(1, n)], axis=0)
        there = np.isfinite(log_p[n - 1, :count])
        np.subtract(log_p[n - 1, :count], parted, out=result[n - 1, :count], where=there)
        best[n - 1, :count] = np.maximum(log_p[n - 1, :count], parted)
    return result


# ----------------------------------------------------------------------------------------------- the passes


class Counts:
    """Sums of counts by hash, merged now and then."""

    def __init__(self) -> None:
        self._parts: list[tuple[np.ndarray, np.ndarray]] = [(np.zeros(0, np.uint64), np.zeros(0, np.int64))]

    def add(self, hashes: np.ndarray, counts: np.ndarray) -> None:
        """Add the counts of distinct hashes."""
        self._parts.append((hashes, counts))
        if sum(len(hashes) for hashes, _ in self._parts[1:]) > len(self._parts[0][0]):
            self._parts = [self.all()]

    def all(self) -> tuple[np.ndarray, np.ndarray]:
        """Hashes [G] u64, sorted, and counts [G] i64."""
        hashes, counts = (np.concatenate(arrays) for arrays in zip(*self._parts, strict=True))
        unique, index = np.unique(hashes, return_inverse=True)
        summed = np.zeros(len(unique), np.int64)
        np.add.at(summed, index, counts)
        return unique, summed


def _blocks(job: PassJob) -> Iterator[tuple[np.ndarray, Words]]:
    """The tokens and words of a part's documents, many documents at a time."""
    tables = np.load(Path(job.work) / TABLES)
    itemsize = np.dtype(job.token_dtype).itemsize
    tokens: list[np.ndarray] = []
    starts: list[np.ndarray] = []
    size = 0

    def block() -> tuple[np.ndarray, Words]:
        ids = np.concatenate(tokens)
        return ids, words_of(ids, np.concatenate(starts), *tables)

    with Path(job.file).open("rb") as file:
        while header := file.read(4):
            n = int.from_bytes(header, "little")
            record = header + file.read(n * itemsize + (n + 7) // 8)
            advance(len(record))
            ids, sentences = decode_document(record, job.token_dtype)
            tokens.append(ids)
            starts.append(np.diff(sentences, prepend=-1) > 0)
            size += n
            if size >= BLOCK:
                yield block()
                tokens, starts, size = [], [], 0
    if tokens:
        yield block()


def sketch_part(job: PassJob) -> tuple[int, list[tuple[np.ndarray, np.ndarray]]]:
    """Words of a part, and how often each shared counter is hit: [(counters u32, counts u8)], block by block."""
    found = []
    size = 0
    for _, words in _blocks(job):
        hashes = np.concatenate([hashes for _, hashes in grams_of(words)])
        counters, counts = np.unique((hashes >> np.uint64(64 - job.bits)).astype(np.uint32), return_counts=True)
        found.append((counters, np.minimum(counts, FREQUENT).astype(np.uint8)))
        size += len(words.first)
    return size, found


def count_part(job: PassJob) -> tuple[np.ndarray, np.ndarray]:
    """The n-grams of a part whose shared counter is high enough (sorted u64), and how often each occurs (i64)."""
    sketch = np.load(Path(job.work) / SKETCH, mmap_mode="r")
    found = Counts()
    for _, words in _blocks(job):
        hashes = np.concatenate([hashes for _, hashes in grams_of(words)])
        found.add(*np.unique(hashes[sketch[hashes >> np.uint64(64 - job.bits)]], return_counts=True))
    return found.all()


def score_part(job: PassJob) -> np.ndarray:
    """The frequent n-grams of two words and more in a part, each once: a structured array of `SCORE`, by hash."""
    grams, log_p_G = np.load(Path(job.work) / GRAMS, mmap_mode="r"), np.load(Path(job.work) / LOG_P, mmap_mode="r")
    found = np.zeros(0, SCORE)
    for _, words in _blocks(job):
        shape = (LONGEST, len(words.first))
        log_p, hashes = np.full(shape, -np.inf), np.zeros(shape, np.uint64)
        for n, (at, gram) in enumerate(grams_of(words)):
            place, there = find(grams, gram)
            log_p[n, at[there]] = log_p_G[place[there]]
            hashes[n, at] = gram
        values = pmi(log_p)
        n, at = np.nonzero(np.isfinite(values))
        scores = np.zeros(len(n), SCORE)
        scores["gram"], scores["pmi"], scores["n"] = hashes[n, at], values[n, at], n + 1
        found = _distinct([found, scores])
    return found


def _distinct(scores: Sequence[np.ndarray]) -> np.ndarray:
    merged = np.concatenate(scores)
    return merged[np.unique(merged["gram"], return_index=True)[1]]


def find(sorted_G: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where values are among sorted ones, and whether they are there."""
    if not len(sorted_G):
        return np.zeros(len(values), np.int64), np.zeros(len(values), bool)
    place = np.minimum(np.searchsorted(sorted_G, values), len(sorted_G) - 1)
    return place, sorted_G[place] == values


def find_phrases(
    files: Sequence[Path], work: Path, tokenizer: Tokenizer, token_dtype: str, minimum: int, share: float, workers: int
) -> None:
    """Find the phrases of encoded documents and write them, and what else `phrase_starts` needs, to `work`.

    Args:
      files: of encoded documents of the training split, one per part.
      work: the folder of the build's parts.
      tokenizer: the tokenizer.
      token_dtype: of the documents.
      minimum: how often an n-gram must occur.
      share: of the n-grams of each n that occur so often, those with the highest PMI, this share of them.
      workers: processes.
    """
    if (work / PHRASES).exists():
        return
    total = sum(file.stat().st_size for file in files)
    grams = LONGEST * total // np.dtype(token_dtype).itemsize
    bits = min(max(int(grams).bit_length(), SKETCH_BITS[0]), SKETCH_BITS[1])
    jobs = [PassJob(str(file), str(work), token_dtype, bits) for file in files]
    words, minimum = _sketch(jobs, work, workers, total, minimum)
    _count(jobs, work, workers, total, words, minimum)
    scores = _distinct(run("phrases, 3 of 3", score_part, jobs, workers, total))
    chosen = [np.sort(_best(scores[scores["n"] == n], share)["gram"]) for n in range(2, LONGEST + 1)]
    temporary = work / f"new-{PHRASES}"
    np.save(temporary, np.sort(np.concatenate(chosen)))
    temporary.replace(work / PHRASES)
    found = ", ".join(f"{len(of_n):,} of {n} words" for n, of_n in enumerate(chosen, 2))
    say(f"phrases: {found}{_examples(jobs, tokenizer, work)}")


def _sketch(jobs: Sequence[PassJob], work: Path, workers: int, total: int, minimum: int) -> tuple[int, int]:
    """Write which shared counters are high enough; the number of words, and the minimum count with this much memory."""
    sketch = np.zeros(1 << jobs[0].bits, np.uint8)
    words = 0

    def add(found: tuple[int, list[tuple[np.ndarray, np.ndarray]]]) -> None:
        nonlocal words
        words += found[0]
        for counters, counts in found[1]:
            before = sketch[counters]
            sketch[counters] = before + np.minimum(counts, FREQUENT - before)

    run("phrases, 1 of 3", sketch_part, jobs, workers, total, add)
    wanted = minimum
    while np.count_nonzero(sketch >= minimum) > TABLE and minimum < FREQUENT:
        minimum += 1
    if minimum > wanted:
        say(f"phrases are sought among n-grams that occur {minimum} times, not {wanted}: the text has too many others")
    np.save(work / SKETCH, sketch >= minimum)
    return words, minimum


def _count(jobs: Sequence[PassJob], work: Path, workers: int, total: int, words: int, minimum: int) -> None:
    """Write the frequent n-grams and their log-probabilities."""
    counts = Counts()
    run("phrases, 2 of 3", count_part, jobs, workers, total, lambda found: counts.add(*found))
    hashes, occurrences = counts.all()
    frequent = occurrences >= minimum
    np.save(work / GRAMS, hashes[frequent])
    np.save(work / LOG_P, np.log(occurrences[frequent] / max(words, 1)))


def _best(scores: np.ndarray, share: float) -> np.ndarray:
    order = np.lexsort((scores["gram"], -scores["pmi"]))
    kept = scores[order][: int(np.ceil(share * len(scores)))]
    return kept[kept["pmi"] > 0]


def _examples(jobs: Sequence[PassJob], tokenizer: Tokenizer, work: Path) -> str:
    """The most frequent phrases of the first block, for a person to judge."""
    phrases = np.load(work / PHRASES, mmap_mode="r")
    for ids, words in (block for job in jobs for block in _blocks(job)):
        starts, sizes = phrases_in(words, phrases)
        ends = np.append(words.first, len(ids))
        shown = Counter(
            tokenizer.decode(ids[ends[i] : ends[i + n]]).strip() for i, n in zip(starts, sizes, strict=True)
        )
        return ", for example " + ", ".join(repr(text) for text, _ in shown.most_common(8)) if shown else ""
    return ""


# --------------------------------------------------------------------------------------------------- flags


def phrases_in(words: Words, phrases: np.ndarray) -> tuple[list[int], list[int]]:
    """The phrases of some documents by greedy longest match: the words where they start, and their words' number."""
    sizes = np.ones(len(words.first), np.int64)
    for n, (at, gram) in enumerate(grams_of(words), 1):
        if n > 1:
            sizes[at[find(phrases, gram)[1]]] = n
    taken: list[int] = []
    free = 0
    for start in np.flatnonzero(sizes > 1).tolist():
        if start >= free:
            taken.append(start)
            free = start + int(sizes[start])
    return taken, sizes[taken].tolist()


def phrase_starts(
    tokens: np.ndarray, sentence_starts: np.ndarray, tables: np.ndarray, phrases: np.ndarray
) -> np.ndarray:
    """Mark the tokens that start a phrase or a word outside of every phrase.

    Args:
      tokens: [n], of whole documents.
      sentence_starts: [n] bool, True where a document starts.
      tables: [2, V] bool: tokens that start a word, tokens that hold a letter or a digit.
      phrases: [P] u64, sorted.

    Returns:
      [n] bool.
    """
    words = words_of(tokens, sentence_starts, *tables)
    marks = np.zeros(len(tokens), bool)
    marks[words.first] = True
    for start, size in zip(*phrases_in(words, phrases), strict=True):
        marks[words.first[start + 1 : start + size]] = False
    return marks


def encoded_phrase_starts(records: Sequence[bytes], token_dtype: str, work: Path) -> list[bytes]:
    """The phrase starts of encoded documents, a bit per token."""
    tables, phrases = np.load(work / TABLES), np.load(work / PHRASES, mmap_mode="r")
    documents = [decode_document(record, token_dtype) for record in records]
    tokens = np.concatenate([tokens for tokens, _ in documents])
    starts = np.concatenate([np.diff(sentences, prepend=-1) > 0 for _, sentences in documents])
    marks = np.split(phrase_starts(tokens, starts, tables, phrases), np.cumsum([len(d[0]) for d in documents])[:-1])
    return [np.packbits(mark).tobytes() for mark in marks]

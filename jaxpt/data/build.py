"""`jaxpt data build`: raw text, or the built-in corpus, to token shards with a manifest.

    input -> parts (encoded in parallel, kept until the end, so that a killed build goes on where it was)
          -> shards -> manifest.json, written last: its presence says that the build is finished.

What is written depends on the inputs and the configuration alone, never on the number of workers.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from etils import epath

from jaxpt.data import manifest as manifests
from jaxpt.data import parts
from jaxpt.data.corpus import Corpus, corpus_pieces
from jaxpt.data.files import TABLES, Format, Piece, Unit, list_aligned, list_inputs
from jaxpt.data.finish import KEY, part_arrays, write_rest, write_shards
from jaxpt.data.jobs import run, say
from jaxpt.data.manifest import Manifest, Split, is_local, write_atomically
from jaxpt.data.phrases import FREQUENT, find_phrases, save_word_tables
from jaxpt.data.text import Fields
from jaxpt.data.tokenizer import Tokenizer, byte_tokenizer, open_tokenizer, sentencepiece_tokenizer
from jaxpt.data.train_tokenizer import Sample, check_vocab_size, train_sentencepiece
from jaxpt.data.vocabulary import SENTINELS

_WORK = ".build"  # the folder of an unfinished build
_UNKNOWN = 0.01  # the share of unknown tokens above which the build warns
_SCANNED = 32  # how many times the tokenizer's sample is looked at to choose it


@dataclass(frozen=True)
class BuildConfig:
    """What to build token shards from, and how."""

    out: str
    """Folder for the build: local, or of an object store (gs://, s3://)."""
    input: tuple[str, ...] = ()
    """Files, directories or patterns: plain text, JSON lines, CSV, TSV, Parquet, FASTA; also .gz .xz .zst .bz2."""
    corpus: Corpus | None = None
    """Instead of input: `prose` (English documentation) or `code` of the installed Python; no download."""
    format: Format = "auto"
    """Format of all inputs; `auto` goes by their names (.jsonl .ndjson .json, .csv, .tsv, .parquet, .fasta .fa; else
    text)."""
    field: str = "text"
    """Field of JSON lines, or column of a table or Parquet, with the text or a list of sentences; dots descend."""
    fields: tuple[str, ...] = ()
    """Instead of field, those of the texts of an example: `--fields source target` builds pairs."""
    lists: Literal["join", "each"] = "join"
    """What a list in one of the fields is: the sentences of one text, or several texts, each of which makes an example
    (`--fields query positives --lists each`)."""
    negatives: int = 0
    """Texts of every example that are taken of the last of the fields, a list of hard negatives of any number."""
    aligned: tuple[str, ...] = ()
    """Instead of input, line-aligned files (or patterns): line n of all of them is an example, the first its source."""
    text_tokens: tuple[int, ...] = ()
    """Most tokens of each text of an example: a number for each field or file, or one for all."""
    long_texts: Literal["skip", "cut"] = "skip"
    """What becomes of an example with a longer text: it is left out, or the text is cut; both are counted."""
    document: Unit = "file"
    """What is a document in plain text: the `file`, a `paragraph` (blank lines between) or a `line`."""
    include: tuple[str, ...] = ()
    """Which files of input directories to read, for example `*.py`; all that are not hidden by default."""
    tokenizer: str | None = None
    """Tokenizer file: SentencePiece .model, Hugging Face tokenizer.json or WordPiece vocab.txt; none trains one."""
    lowercase: bool | None = None
    """Lower-case text for a WordPiece vocab.txt; by default as the vocabulary itself is."""
    vocab_size: int = 8192
    """Ids of the trained tokenizer in all, 363 or 364 of them for special tokens, sentinels and bytes."""
    sentinels: int = SENTINELS
    """Sentinel tokens at least: one per span that is hidden of a text (T5), and one per mode (UL2)."""
    model: Literal["unigram", "bpe", "char", "byte"] = "unigram"
    """Kind of the trained tokenizer; `byte` needs no training and ignores the size."""
    sample: int = 32
    """Megabytes of text that the tokenizer is trained on."""
    validation: float = 0.05
    """Fraction of documents for validation, chosen by their content: adding documents never moves one."""
    phrases: bool = False
    """Find phrases by mutual information and mark where they start, for masking by phrases."""
    phrase_count: int = 10
    """How often an n-gram of 2 to 5 words must occur to be a phrase, 2 to 255 times."""
    phrase_share: float = 0.5
    """Share of the n-grams of each length that occur so often: those of the highest mutual information."""
    gap_scores: bool = False
    """Score each sentence by what it has in common with its document (ROUGE-1 F), for gap sentences."""
    fim_rate: float = 0.0
    """Share of documents that are written for fill-in-the-middle, cut at characters before they are tokenised."""
    fim_spm_rate: float = 0.5
    """Share of those that have the suffix before the prefix."""
    fim_seed: int = 0
    """Seed of the cuts; each document's own follows from it and from its text."""
    shard_megabytes: int = 64
    """Largest size of a shard."""
    shard_documents: int = 1 << 20
    """Largest number of documents of a shard."""
    workers: int | None = None
    """Processes; by default one per core."""
    strict: bool = False
    """Refuse what cannot be read, instead of skipping and counting it."""


def build(config: BuildConfig) -> Manifest:
    """Build token shards, or find that they are built already.

    A killed build is taken up by calling this again with the same configuration and input.

    Args:
      config: what to build; with several workers the caller's script must be importable, that is, call this
        under `if __name__ == "__main__":`.

    Returns:
      The manifest of the finished build.

    Raises:
      ValueError: a setting cannot be, an input cannot be read, the folder holds something else, a split would be
        empty.
      RuntimeError: a worker process died.
    """
    _check(config)
    if config.aligned:
        pieces, sources = list_aligned(config.aligned)
    elif config.corpus:
        pieces = sources = corpus_pieces(config.corpus)
    else:
        pieces = sources = list_inputs(config.input, config.format, config.include)
    _check_formats(config, sources)
    tokenizer = _given_tokenizer(config)
    key = _key(config, sources, tokenizer)
    out = epath.Path(config.out)
    if (out / manifests.NAME).exists():
        return _finished(out, key)
    work = _open_work(out, key)
    workers = config.workers or _cores()

    digests: dict[str, str] = {}
    if config.corpus == "prose":
        pieces, digests = _extract(config, pieces, work, workers)
    jobs = _parts(config, pieces, work)
    if tokenizer is None:
        tokenizer = _trained_tokenizer(config, jobs, work, workers)
    parts.save_tokenizer(tokenizer, work / "tokenizer")
    digest = hashlib.sha256(tokenizer.data).hexdigest()
    jobs = [job._replace(tokenizer=digest) for job in jobs]
    results = run("encoding", parts.encode_part, jobs, workers, _total(jobs))
    digests.update((name, sha) for result in results for name, sha in result["digests"].items())
    totals = {s: {c: sum(r["splits"][s][c] for r in results) for c in parts.COUNTS} for s in parts.SPLITS}
    problems = _problems(results)
    _say_problems(problems)
    _check_splits(config, totals, work, len(jobs))

    dtype = parts.token_dtype(tokenizer)
    if config.phrases or config.gap_scores:
        save_word_tables(tokenizer, work)
    if config.phrases:
        files = [parts.part_file(work, job.number, "train") for job in jobs]
        find_phrases(files, work, tokenizer, dtype, config.phrase_count, config.phrase_share, workers)
    limits = config.shard_megabytes << 20, config.shard_documents
    extras = ({"gap_scores": "uint8"} if config.gap_scores else {}) | (
        {"phrase_starts": "bool"} if config.phrases else {}
    )
    shards = write_shards(out, work, dtype, extras, len(jobs), limits, workers)
    splits = {split: Split(**totals[split], shards=shards[split]) for split in parts.SPLITS}
    texts = _texts(config, results)
    manifest = write_rest(out, work, tokenizer, splits, problems, sources, digests, len(jobs), extras, texts)
    manifest.save()
    shutil.rmtree(work, ignore_errors=True)
    _summary(manifest)
    return manifest


# ------------------------------------------------------------------------------------- what to build


def _check(config: BuildConfig) -> None:
    if bool(config.input) + bool(config.corpus) + bool(config.aligned) != 1:
        raise ValueError("give one of --input FILES, --corpus prose|code and --aligned FILE FILE")
    _check_texts(config)
    if not 0 <= config.validation < 1:
        raise ValueError(
            f"--validation is a fraction of the documents, at least 0 and below 1, not {config.validation}"
        )
    for name in ("shard_megabytes", "shard_documents", "sample"):
        if getattr(config, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, not {getattr(config, name)}")
    for name in ("phrase_share", "fim_rate", "fim_spm_rate"):
        value = getattr(config, name)
        if not 0 <= value <= 1:
            raise ValueError(f"--{name.replace('_', '-')} is a share from 0 to 1, not {value}")
    if not 2 <= config.phrase_count <= FREQUENT:
        raise ValueError(f"--phrase-count is from 2 to {FREQUENT}, not {config.phrase_count}")
    if config.sentinels < SENTINELS:
        raise ValueError(f"--sentinels must be at least {SENTINELS}, not {config.sentinels}")
    if config.workers is not None and config.workers < 1:
        raise ValueError(f"--workers must be at least 1, not {config.workers}")
    if config.tokenizer is None and config.model != "byte":
        check_vocab_size(config.vocab_size, config.sentinels)  # now, and not after an hour of reading


def _check_texts(config: BuildConfig) -> None:
    count = len(config.fields or config.aligned)
    for name in ("fields", "aligned"):
        if len(getattr(config, name)) == 1:
            raise ValueError(f"--{name} needs one for each text of an example, for example a source and a target")
    if config.aligned and config.fields:
        raise ValueError("lines of --aligned files have no --fields: give one of the two")
    if not count and (config.text_tokens or config.long_texts != "skip"):
        raise ValueError("--text-tokens and --long-texts are for pairs: give --fields or --aligned, too")
    if not config.fields and (config.negatives or config.lists != "join"):
        raise ValueError("--negatives and --lists are for the texts of examples: name their --fields, too")
    if config.negatives < 0 or (config.negatives and count < 3):
        raise ValueError(
            "--negatives is how many texts are taken of the last of at least three --fields, for example "
            "--fields query positives negatives --negatives 1"
        )
    if min(config.text_tokens, default=1) < 1 or len(config.text_tokens) not in (0, 1, count):
        raise ValueError(f"--text-tokens is one number or {count}, each at least 1, not {config.text_tokens}")
    if count and (config.fim_rate or config.gap_scores):
        raise ValueError("--fim-rate and --gap-scores are for documents, and not for pairs: leave them out")


def _check_formats(config: BuildConfig, pieces: Sequence[Piece]) -> None:
    wrong = next((piece for piece in pieces if piece.format not in ("jsonl", "parquet", *TABLES)), None)
    if config.fields and wrong:
        raise ValueError(
            f"--fields reads JSON lines, CSV, TSV and Parquet, and {wrong.name} is {wrong.format}: see --format"
        )


def _texts(config: BuildConfig, results: Sequence[dict[str, Any]]) -> dict[str, int]:
    """What the manifest says of a build of pairs."""
    count = len(config.fields or config.aligned)
    if not count:
        return {}
    count += max(0, config.negatives - 1)
    longest, cut = max(result["longest"] for result in results), sum(result["cut"] for result in results)
    if cut:
        say(f"cut {cut} examples: a text was longer than --text-tokens")
    say(f"examples of {count} texts; the longest has {longest} tokens")
    return {"count": count, "longest": longest, "cut": cut}


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _given_tokenizer(config: BuildConfig) -> Tokenizer | None:
    if config.tokenizer is not None:
        return open_tokenizer(config.tokenizer, config.lowercase, config.sentinels)
    return byte_tokenizer(config.sentinels) if config.model == "byte" else None


def _key(config: BuildConfig, pieces: Sequence[Piece], tokenizer: Tokenizer | None) -> dict[str, Any]:
    """What the build is made from: equal keys make equal builds."""
    settings = dataclasses.asdict(config)
    unused = ["out", "workers", "strict"]
    unused += [] if config.phrases else ["phrases", "phrase_count", "phrase_share"]
    unused += [] if config.fields or config.aligned else ["fields", "aligned", "text_tokens", "long_texts"]
    unused += [] if config.lists != "join" else ["lists"]
    unused += [] if config.negatives else ["negatives"]
    unused += [] if config.gap_scores else ["gap_scores"]
    unused += [] if config.sentinels != SENTINELS else ["sentinels"]
    unused += [] if config.fim_rate else ["fim_rate", "fim_spm_rate", "fim_seed"]
    for irrelevant in unused:
        del settings[irrelevant]
    if tokenizer is not None:
        settings["tokenizer"] = hashlib.sha256(tokenizer.data).hexdigest()
    files = json.dumps([(piece.name, piece.size, piece.modified) for piece in pieces])
    settings["files"] = f"{len(pieces)} files, {hashlib.sha256(files.encode()).hexdigest()[:16]}"
    settings["format_version"] = manifests.FORMAT
    return json.loads(json.dumps(settings))


def _finished(out: epath.Path, key: dict[str, Any]) -> Manifest:
    """The build that is there, if it is the wanted one."""
    manifest = Manifest.load(out)
    try:
        there = json.loads((out / KEY).read_text())
    except (OSError, ValueError):
        there = {}
    if there != key:
        names = [name for name in {**there, **key} if there.get(name) != key.get(name)]
        shown = ", ".join(f"{name}: {there.get(name)!r} there, {key.get(name)!r} wanted" for name in names)
        raise ValueError(
            f"{out} holds another finished data build ({shown}): choose another folder, or delete this one"
        )
    say(f"{out} is built already, from the same input and settings: nothing to do")
    shutil.rmtree(_work_folder(out), ignore_errors=True)
    return manifest


def _work_folder(out: epath.Path) -> Path:
    if is_local(out):
        return Path(out) / _WORK
    name = hashlib.sha256(os.fspath(out).encode()).hexdigest()[:16]
    return Path(tempfile.gettempdir()) / f"jaxpt-build-{name}"


def _open_work(out: epath.Path, key: dict[str, Any]) -> Path:
    """The work folder, empty or with what an interrupted build of the same key has left."""
    work = _work_folder(out)
    try:
        there = json.loads((work / KEY).read_text())
    except (OSError, ValueError):
        there = None
    if there is None and out.exists() and not work.exists() and any(out.iterdir()):
        raise ValueError(f"{out} is not empty and holds no data build: choose another folder")
    if there == key:
        say(f"going on with the unfinished build in {out}")
        return work
    if there is not None:
        say(f"starting again in {out}: the unfinished build there has other input or settings")
    shutil.rmtree(work, ignore_errors=True)
    out.mkdir(parents=True, exist_ok=True)
    for old in [path for pattern in ("train-*", "validation-*") for path in out.glob(pattern)]:
        old.unlink()
    work.mkdir(parents=True)
    write_atomically(epath.Path(work / KEY), json.dumps(key, indent=1).encode())
    return work


# ----------------------------------------------------------------------------------- parts and tokens


def _parts(config: BuildConfig, pieces: Sequence[Piece], work: Path) -> list[parts.Part]:
    return [
        parts.Part(
            i,
            group,
            Fields(config.fields, config.lists == "each", config.negatives) if config.fields else config.field,
            config.document,
            str(work),
            config.validation,
            config.strict,
            (config.fim_rate, config.fim_spm_rate, config.fim_seed),
            _limits(config),
            config.long_texts == "cut",
        )
        for i, group in enumerate(parts.plan(pieces, config.document))
    ]


def _limits(config: BuildConfig) -> tuple[int, ...]:
    """The most tokens of each text of an example."""
    given = config.text_tokens
    limits = given * len(config.fields or config.aligned) if len(given) == 1 else given
    return limits + limits[-1:] * max(0, config.negatives - 1)


def _total(jobs: Sequence[parts.Part]) -> int:
    return sum(piece.size if piece.end is None else piece.end - piece.start for job in jobs for piece in job.pieces)


def _extract(
    config: BuildConfig, pieces: Sequence[Piece], work: Path, workers: int
) -> tuple[list[Piece], dict[str, str]]:
    """The prose of source files, taken out once because the tokenizer and the encoding both read it."""
    jobs = _parts(config, pieces, work)
    saved = work / "extracted.json"
    if not saved.exists():
        results = run("reading sources", parts.extract_prose, jobs, workers, _total(jobs))
        write_atomically(epath.Path(saved), json.dumps(results).encode())
    results = json.loads(saved.read_text())
    return [Piece(*piece) for piece, _ in results], {name: sha for _, found in results for name, sha in found.items()}


def _trained_tokenizer(config: BuildConfig, jobs: Sequence[parts.Part], work: Path, workers: int) -> Tokenizer:
    saved = work / "tokenizer"
    if (saved / "kind.json").exists():
        return parts.saved_tokenizer(saved, "trained")
    budget = config.sample << 20
    sample = Sample(budget)

    def merge(chunks: list[str]) -> None:
        for chunk in chunks:
            sample.add(chunk)

    # a large input is sampled from parts chosen by a hash of their number, so that the sample is spread over it
    chosen: list[parts.SampleJob] = []
    scanned = 0
    for job in sorted(jobs, key=lambda job: hashlib.sha256(str(job.number).encode()).digest()):
        if scanned < _SCANNED * budget:
            chosen.append(parts.SampleJob(job, budget, _SCANNED * budget))
            scanned += _total([job])
    run("sampling", parts.sample_part, chosen, workers, scanned, merge)
    assert config.model != "byte"
    chunks = sample.chunks()
    if not chunks:
        inputs = config.input or config.aligned
        shown = ", ".join(inputs[:3]) + (", ..." if len(inputs) > 3 else "")
        asked = " and ".join(config.fields) or config.field
        raise ValueError(
            f"there is no text to train a tokenizer on in {shown or config.corpus}: the files are empty or could not "
            f"be read (format {config.format}, field {asked!r}); --strict names the first fault"
        )
    say(f"training a {config.model} tokenizer")
    trained = train_sentencepiece(chunks, config.vocab_size, config.model, config.sentinels)
    tokenizer = sentencepiece_tokenizer(trained, config.sentinels)
    if tokenizer.size < config.vocab_size:
        say(f"the text has pieces for a vocabulary of {tokenizer.size} ids only, not {config.vocab_size}")
    return tokenizer


def _problems(results: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    problems: dict[str, dict[str, Any]] = {}
    for result in results:
        for reason, found in result["problems"].items():
            entry = problems.setdefault(reason, {"count": 0, "examples": []})
            entry["count"] += found["count"]
            entry["examples"] = (entry["examples"] + found["examples"])[: parts.EXAMPLES]
    return problems


def _say_problems(problems: dict[str, dict[str, Any]]) -> None:
    for reason, entry in problems.items():
        say(f"skipped {entry['count']}: {reason}, for example")
        for example in entry["examples"][:3]:
            say(f"  {example}")


def _check_splits(config: BuildConfig, totals: dict[str, dict[str, int]], work: Path, count: int) -> None:
    """Refuse a split without documents."""
    train, validation = (totals[split]["documents"] for split in parts.SPLITS)
    if train + validation == 0:
        raise ValueError("there is not one document in the input; what was skipped, and why, is listed above")
    if train and (validation or config.validation == 0):
        return
    if train + validation == 1:
        raise ValueError(
            "there is one document, and it cannot be in both the training and the validation split: with "
            "--document paragraph or --document line a text file holds many documents; --validation 0 leaves "
            "validation out"
        )
    hashes = np.concatenate(list(part_arrays(work, count, "hashes")))
    low, high = (float(h) / 2.0**64 for h in (hashes.min(), hashes.max()))
    raise ValueError(
        f"none of the {train + validation} documents falls into the {'validation' if train else 'training'} split: "
        f"choose --validation above {low:.4f} and below {high:.4f}, give more documents (--document paragraph or line "
        f"makes many of a text file), or leave validation out with --validation 0"
    )


def _summary(manifest: Manifest) -> None:
    for name, split in manifest.splits.items():
        say(
            f"{name}: {split.documents:,} documents, {split.sentences:,} sentences, {split.tokens:,} tokens, "
            f"{split.bytes:,} bytes, {len(split.shards)} shard{'s' * (len(split.shards) != 1)}"
        )
    skipped = sum(entry["count"] for entry in manifest.skipped.values())
    say(
        f"{manifest.path}: vocabulary of {manifest.vocab['size']:,} ids, {skipped:,} skipped, "
        f"{manifest.provenance['duplicates']:,} exact duplicates (kept)"
    )
    vocab = manifest.load_vocab()
    unknown = int(vocab.unigram_counts[vocab.unk]) / max(manifest.splits["train"].tokens, 1)
    if unknown > _UNKNOWN:
        say(f"warning: {unknown:.1%} of the training tokens are unknown to this tokenizer: was it made for other text?")

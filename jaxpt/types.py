"""The types that every room of the house shares, and the key to its dimension letters.

Dimension letters, used as suffixes in numeric code (``tokens_BL``, ``logits_BKV``):

    R  rows that a function is given (a batch, a microbatch or a slice of one)
    B  rows of a batch          L  tokens of a row            K  predictions of a row
    Q  queries of a row         V  vocabulary                 D  model width
    E  embedding width          F  feed-forward width         H  query heads
    G  key/value heads          C  width of one head          N  stacked layers

This module needs nothing but numpy, so that host-only code can import it cheaply. Everything that crosses
a jit boundary is a NamedTuple, which JAX knows as a pytree; everything static is a frozen dataclass.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, TypeAlias, runtime_checkable

import numpy as np

if TYPE_CHECKING:
    import jax

    Array: TypeAlias = jax.Array
    Key: TypeAlias = jax.Array
else:  # annotations only: importing jax here would cost every worker of the data build a second
    Array = Key = Any

Tree: TypeAlias = Any  # a nest of dicts whose leaves are arrays (or ParamSpecs)
Params: TypeAlias = Tree
Packing: TypeAlias = Literal["concatenate", "best_fit", "one_document", "stream"]
Role: TypeAlias = Literal["kernel", "embedding", "bias", "norm"]

ROW_STATE = "rows"  # what a carry holds under this name leads with the rows of a batch, and is spread over devices so
FROZEN = "frozen"  # the parameter group that no gradient reaches and no optimizer updates

# The one table from logical axis names, which parameters and activations carry, to mesh axes. A mesh axis is
# used at most once per array and only where it divides the dimension; what no rule names is replicated.
MESH_AXES = ("data", "fsdp", "tensor", "context")
AXIS_RULES: Mapping[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp"),
    "length": ("context",),
    "vocab": ("tensor",),
    "embed": ("fsdp",),  # the model width as a dimension of a parameter
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
}


# ---------------------------------------------------------------------------------------- what flows


class Batch(NamedTuple):
    """One batch of packed rows, before any corruption. A pure function of (seed, step).

    A row holds one or more documents one after the other. The texts of a pair or a triple are numbered as
    sentences of one document.
    """

    tokens: Array  # [B, L] i32
    segment_ids: Array  # [B, L] i32: 1, 2, ... per document of the row, 0 = padding
    positions: Array  # [B, L] i32, restart at 0 in each document (each piece, where rows cut one)
    sentence_ids: Array  # [B, L] i32, likewise
    row_ids: Array  # [B] u32: the row's index in the global batch of this step
    source_ids: Array  # [B] i32: which data source the row came from
    valid: Array  # [B] f32: 0 for a filler row at the end of an evaluation
    extras: dict[str, Array] = {}  # noqa: RUF012  arrays that the manifest declares, [B, L] or [B, ...]


class Example(NamedTuple):
    """What the networks read after corruption. Every leaf leads with rows R; fixed shapes.

    Weights say what counts, never a magic label. ``counts`` are the denominators' shares per row; an absent
    term takes the row's summed weights. Neither may depend on what ``loss`` computes.
    """

    inputs: dict[str, Tree]  # whatever the objective's ``loss`` reads: {name: [R, ...]}
    row_ids: Array  # [R] u32
    weights: dict[str, Array]  # {term: [R, ...]} f32
    counts: dict[str, Array] = {}  # noqa: RUF012  {term: [R]} f32


class Out(NamedTuple):
    """What ``loss`` returns: unreduced losses, additive statistics, and features for coupled terms."""

    losses: dict[str, Array]  # {term: [R, ...]} f32, the shape of its weights, UNREDUCED
    stats: dict[str, Array] = {}  # noqa: RUF012  {name: sums over the rows, of any shape} f32
    features: dict[str, Array] = {}  # noqa: RUF012  {name: [R, ...]}


class Sums(NamedTuple):
    """Additive sums of one or many batches, from which every metric is finished by ``summary``."""

    losses: dict[str, Array]  # {term: sum of losses * weights}, unscaled
    counts: dict[str, Array]  # {term: sum of counts}
    stats: dict[str, Array]


class Everyone(NamedTuple):
    """A mark without leaves, so known while tracing: all ranks are 0."""


class RowOrder(NamedTuple):
    """A mark without leaves, so known while tracing: the rank of a query and of a key is its place in the row."""


class AttentionPattern(NamedTuple):
    """Who sees whom, in a few integers per token.

    Key k is visible to query q iff ``segment[q] == segment[k]`` and (``rank[k] <= rank[q]`` or
    ``group[q] == group[k] != 0``). A layer with a window also asks ``|position[q] - position[k]| <= window``.
    Padding is segment 0 and sees padding only. Queries and keys are separate because cross-attention, caches
    and memory need that.
    """

    query_segments: Array  # [R, Q] i32
    key_segments: Array  # [R, L] i32
    query_ranks: Array  # [R, Q] i32
    key_ranks: Array  # [R, L] i32
    query_positions: Array  # [R, Q] i32, for windows and relative biases
    key_positions: Array  # [R, L] i32
    query_groups: Array | None = None  # [R, Q] i32, 0 = none
    key_groups: Array | None = None  # [R, L] i32
    order: Everyone | RowOrder | None = None  # what its maker knows of the ranks, for kernels with static masks


class Readout(NamedTuple):
    """Logits over the vocabulary before they are multiplied out: ``hidden @ table.T + bias``.

    They are the largest arrays of a step, so that the loss takes them in pieces (``linear_cross_entropy``); what
    needs them whole calls ``logits_of``.
    """

    hidden: Array  # [..., E] of the compute dtype, in which the product is taken; sums are float32
    table: Array  # [V, E] f32
    bias: Array | None = None  # [V] f32


class View(NamedTuple):
    """One sequence that a network reads and what is asked of it, for a person to look at (`jaxpt show`)."""

    tokens: Array  # [R, L] i32
    segment_ids: Array  # [R, L] i32, 0 = padding
    positions: Array  # [R, L] i32, as the network is told
    pattern: AttentionPattern | None = None  # who sees whom
    targets: Array | None = None  # [R, K] i32: tokens, or classes where ``classes`` names them
    target_positions: Array | None = None  # [R, K] i32: the places in ``tokens`` that predict; None = place k for k
    weights: Array | None = None  # [R, K] f32
    classes: tuple[str, ...] = ()


class Snapshot(NamedTuple):
    """What an objective may look at."""

    params: Params
    carry: Tree
    step: Array  # [] i32


class Guard(NamedTuple):
    """What the step remembers to tell a spike from the ordinary, and how often it skipped."""

    norm_average: Array  # [] f32: moving average of the gradient norms of applied steps
    applied: Array  # [] i32: applied updates
    skipped: Array  # [] i32: skipped updates in all
    failing: Array  # [] i32: skipped updates in a row


class TrainState(NamedTuple):
    """Everything that a run must not lose. The seed is configuration; the data position is the step."""

    step: Array  # [] i32
    params: Params
    opt_state: Tree
    carry: Tree
    averaged: Params | None  # moving average of the parameters, where configured
    guard: Guard


# ------------------------------------------------------------------------------------ what describes


@dataclass(frozen=True)
class ParamSpec:
    """One parameter: its logical axes, its role and its group.

    Args:
      axes: a logical name or None per dimension; names without a rule in ``AXIS_RULES`` are replicated.
        Stacked layers lead with "layers".
      role: what it is, for weight decay.
      group: "main", a group with its own optimizer settings, or "frozen".
    """

    axes: tuple[str | None, ...]
    role: Role
    group: str = "main"


class RowKind(NamedTuple):
    """Rows of a length of their own among those of a batch (``RowSpec.kinds``)."""

    share: int  # of the rows of every batch, relative to the other kinds
    raw_length: Callable[[int], int]  # model length -> raw tokens of a row of this kind


@dataclass(frozen=True)
class RowSpec:
    """What an objective asks of the data: how raw documents become rows.

    Args:
      packing: "concatenate" (cut anywhere, no padding), "best_fit" (whole documents where they fit),
        "one_document" (a document, or a piece of a long one, per row) or "stream" (concatenated, and row r of a step
        goes on where row r of the step before ended).
      prefix: token ids put before each document, for example [CLS].
      suffix: token ids put after each document, for example [SEP] or EOS.
      reserve: slots of a row that the objective fills itself; the data leaves them out of the row's length.
      raw_length: model length -> raw tokens per row, where that is not ``length - reserve``.
      fields: names in ``Batch.extras`` that the objective reads.
      kinds: where rows differ in length: the rows of every batch are divided among these in contiguous ranges
        (``kind_ranges``), each is read in an order of its own, and the batch is as wide as the longest.
      texts: texts of an example that are read, 2 for pairs: the data must have been built of them, and a row must hold
        a whole example; 0 = any data.
    """

    packing: Packing = "concatenate"
    prefix: tuple[int, ...] = ()
    suffix: tuple[int, ...] = ()
    reserve: int = 0
    raw_length: Callable[[int], int] | None = None
    fields: tuple[str, ...] = ()
    kinds: tuple[RowKind, ...] = ()
    texts: int = 0

    def tokens(self, length: int) -> int:
        """Raw tokens of a row whose model length is ``length``; of the longest kind, where there are kinds."""
        if self.kinds:
            return max(kind.raw_length(length) for kind in self.kinds)
        return self.raw_length(length) if self.raw_length else length - self.reserve

    def each_kind(self) -> tuple[RowSpec, ...]:
        """What rows of each kind are, in order; of rows of one kind, this itself."""
        return tuple(replace(self, raw_length=kind.raw_length, kinds=()) for kind in self.kinds) or (self,)

    def kind_ranges(self, total: int) -> list[slice]:
        """The rows of each kind among ``total``; raises ValueError where they cannot be divided."""
        return divide_rows(total, [kind.share for kind in self.kinds] or [1], "rows of several kinds")


def divide_rows(total: int, shares: Sequence[int], wanted_by: str) -> list[slice]:
    """Divide rows in contiguous ranges, in proportion to whole numbers.

    Args:
      total: rows.
      shares: of each part.
      wanted_by: who divides, for the message.

    Raises:
      ValueError: they cannot be divided so.

    >>> divide_rows(8, [3, 1], "a mixture")
    [slice(0, 6, None), slice(6, 8, None)]
    """
    whole = sum(shares)
    unit = whole // math.gcd(*shares)
    if total % unit:
        raise ValueError(
            f"{wanted_by}: {total} rows cannot be divided as {' : '.join(map(str, shares))}: make batch_size a "
            f"multiple of {unit} times microbatches"
        )
    places = [total * sum(shares[:index]) // whole for index in range(len(shares) + 1)]
    return list(map(slice, places, places[1:]))


@dataclass(frozen=True, eq=False)
class Vocab:
    """What an objective knows of the tokenizer.

    Absent special tokens are None; ``require`` turns an absence into a message that a user can act on.
    """

    size: int
    pad: int
    unk: int | None = None
    bos: int | None = None
    eos: int | None = None
    cls: int | None = None
    sep: int | None = None
    mask: int | None = None
    sentinels: tuple[int, ...] = ()  # in the order of use: first sentinel first
    is_special: np.ndarray = field(default_factory=lambda: np.zeros(0, bool))  # [V] bool
    starts_word: np.ndarray = field(default_factory=lambda: np.zeros(0, bool))  # [V] bool
    unigram_counts: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))  # [V] i64, training split
    token_bytes: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int32))  # [V] i32, UTF-8 bytes

    def require(self, name: str, wanted_by: str) -> int:
        """Return the id of a special token.

        Args:
          name: "bos", "eos", "cls", "sep", "mask" or "unk".
          wanted_by: who needs it, for the message.

        Raises:
          ValueError: the tokenizer has no such token.
        """
        token = getattr(self, name)
        if token is None:
            raise ValueError(
                f"{wanted_by} needs a [{name.upper()}] token and this tokenizer has none: build the data with "
                f"a tokenizer that has it (`jaxpt data build --vocab-size N` trains one with every special token)"
            )
        return token


# -------------------------------------------------------------------------------------- the contract

Schedule: TypeAlias = Callable[[Array], Array]  # step -> value


class Objective(NamedTuple):
    """A pre-training objective: a NamedTuple of pure functions, as ``optax.GradientTransformation`` is one.

    The step forms, once and over the GLOBAL batch,

        loss = sum over terms of  scale[term](step) * sum(losses[term] * weights[term]) / sum(counts[term])

    (0 where the count is 0), so accumulation, packing and sharding are right by construction.
    """

    rows: RowSpec
    specs: Tree  # of ParamSpec, the structure of params
    init: Callable[[Key], Params]  # leaf key = fold_in(key, crc32(path))
    corrupt: Callable[[Snapshot, Batch, Key], Example]  # the whole global batch; fixed shapes
    loss: Callable[[Snapshot, Example, Array], Out]  # keys [R]; rows independent; the step may chunk it
    scale: Mapping[str, float | Schedule]
    couple: Callable[[Snapshot, dict[str, Array], Example], tuple[dict[str, Array], dict[str, Array]]] | None = None
    start: Callable[[Params, Key], Tree] | None = None
    advance: Callable[[Snapshot, dict[str, Array], Example], tuple[Params, Tree]] | None = None
    summary: Callable[[Sums], dict[str, Array]] | None = None
    views: Callable[[Snapshot, Example], dict[str, View]] | None = None  # for people; nothing is trained by it
    # (snapshot, batch, text) -> the vectors [R, E] f32 of texts. Every row of the batch holds one, from its first place
    # on and of at most two tokens less than the model's length; ``text`` says for which of the texts of an example it
    # stands (0: the first, or the only one), where they are read by different networks.
    embed: Callable[[Snapshot, Batch, int], Array] | None = None


@runtime_checkable
class ObjectiveConfig(Protocol):
    """The configuration of an objective: a frozen dataclass in the objective's own file."""

    def build(self, vocab: Vocab) -> Objective:
        """The pure functions for this configuration and tokenizer; raises ValueError for settings that cannot be."""
        ...

    def for_evaluation(self) -> ObjectiveConfig:
        """The same objective as it is evaluated: no dropout, schedules frozen, comparable rates."""
        ...


class Network(NamedTuple):
    """A network as pure functions over a plain nest of arrays; an objective holds one or several, by name."""

    specs: Tree  # of ParamSpec
    init: Callable[[Key], Params]
    apply: Callable[..., Any]

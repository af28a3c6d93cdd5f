"""Parameters that two networks share: who owns which, and both put together again.

The embeddings of a generator and a discriminator; all of an encoder and a decoder but the attention between them.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal

import jax
import jax.numpy as jnp

from jaxpt.types import Network, Params

Embeddings = Literal["none", "tied", "gradient_disentangled"]
TABLES = ("tokens", "positions", "token_types")


def share(trunk: Network, generator: Network, embeddings: Embeddings) -> dict[str, Network]:
    """The networks that sharing changes or adds.

    "tied": the trunk owns the embeddings, all but the projection to each network's width. "gradient_disentangled":
    the generator owns the tables and "delta" holds what the trunk's differ by, 0 at first.

    Args:
      trunk, generator: Transformers as they would stand alone, with embeddings of one width.
      embeddings: what they share.
    """
    names = set(trunk.specs["embed"])
    if embeddings == "none":
        return {}
    if embeddings == "tied":
        return {"generator": _without(generator, names - {"project"})}
    tables = names & set(TABLES)
    delta = Network(
        {name: trunk.specs["embed"][name] for name in tables},
        lambda key: {name: jnp.zeros_like(leaf) for name, leaf in trunk.init(key)["embed"].items() if name in tables},
        trunk.apply,
    )
    return {"trunk": _without(trunk, tables), "delta": delta}


def complete(params: Params) -> tuple[Params, Params]:
    """Return the parameters of trunk and generator, each with all its embeddings.

    Gradient-disentangled (He et al. 2021, arXiv:2111.09543, section 3.3), the trunk's table is
    ``stop_gradient(E_generator) + delta``: it learns through delta alone, and the generator's through its own loss
    alone. So this is also how the trunk is taken out of a finished run.

    Args:
      params: with "trunk", "generator" and, gradient-disentangled, "delta".

    Example:
      >>> embed = {"tokens": jnp.ones((3, 2))}
      >>> trunk, generator = complete({"trunk": {"embed": embed}, "generator": {"layers": {}}})
      >>> generator["embed"]["tokens"] is embed["tokens"]
      True
    """
    trunk, generator = params["trunk"], params["generator"]
    if "delta" in params:
        tables = {name: jax.lax.stop_gradient(generator["embed"][name]) + by for name, by in params["delta"].items()}
        trunk = trunk | {"embed": trunk.get("embed", {}) | tables}
    elif "tokens" not in generator.get("embed", {}):
        given = {name: leaf for name, leaf in trunk["embed"].items() if name != "project"}
        generator = generator | {"embed": generator.get("embed", {}) | given}
    return trunk, generator


def _without(network: Network, names: Collection[str]) -> Network:
    """The same network, whose parameters lack these embeddings."""

    def cut(tree: Params) -> Params:
        embed = {name: leaf for name, leaf in tree["embed"].items() if name not in names}
        rest = {name: leaf for name, leaf in tree.items() if name != "embed"}
        return rest | ({"embed": embed} if embed else {})

    return Network(cut(network.specs), lambda key: cut(network.init(key)), network.apply)


# --------------------------------------------------------------------------------- encoder and decoder

CROSS = ("cross_attention", "cross_attention_norm")  # what a layer of a decoder has that an encoder's has not


def cross_attention_of(decoder: Network) -> Network:
    """The parameters of a decoder's layers that an encoder's lack; ``apply`` is that of the whole decoder."""

    def cut(tree: Params) -> Params:
        return {name: tree["layers"][name] for name in CROSS}

    return Network(cut(decoder.specs), lambda key: cut(decoder.init(key)), decoder.apply)


def with_cross_attention(encoder: Params, cross: Params) -> Params:
    """The parameters of a decoder: an encoder's own, and those of ``cross_attention_of``.

    Example:
      >>> decoder = with_cross_attention({"embed": 1, "layers": {"mlp": 2}}, {"cross_attention": 3})
      >>> decoder
      {'embed': 1, 'layers': {'mlp': 2, 'cross_attention': 3}}
    """
    return encoder | {"layers": encoder["layers"] | cross}

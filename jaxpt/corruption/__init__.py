"""Corruption: (key, row arrays) -> row arrays.

Every corruption is two pure functions over ONE row, batched by ``jax.vmap``: ``draw`` and ``draw_*`` take a key,
or random bits of one, and make the decisions; the others are deterministic in the tokens and the decisions.
Shapes are fixed, decisions are int32 or bool, and counts may be traced.
"""

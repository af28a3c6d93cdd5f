"""jaxpt: pre-training of text models in JAX, every published objective through one sharded train step."""

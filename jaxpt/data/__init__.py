"""The data plane: raw text to token shards (`build`), and token shards to batches (`pipeline`); host only, no JAX."""

"""Networks: one Transformer for encoders, decoders and encoder-decoders, its heads and its published sizes."""

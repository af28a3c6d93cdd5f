"""Losses: arrays -> per-position arrays, in float32 and unreduced; and the statistics that metrics are made of."""

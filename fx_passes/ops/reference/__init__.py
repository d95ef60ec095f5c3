"""The oracle: SUS attention and its gradients, dense, in float64, straight from the definition."""

from fx_passes.ops.reference.dense import Dense, dense_attention, sus_gradients

__all__ = ["Dense", "dense_attention", "sus_gradients"]

"""The oracle: SUS attention and its gradients, dense, in float64, straight from the definition."""

from fx_passes.ops.reference.dense import Dense, dense_attention, sus_gradients
from fx_passes.ops.reference.tile import tile_draw, tile_multiplier

__all__ = ["Dense", "dense_attention", "sus_gradients", "tile_draw", "tile_multiplier"]

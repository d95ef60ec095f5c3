"""The path for any device in vectorised PyTorch: tiles of rows and keys, never an M x N tensor."""

from fx_passes.ops.tiled.backward import backward
from fx_passes.ops.tiled.forward import forward
from fx_passes.ops.tiled.tiles import dense_entries

__all__ = ["backward", "dense_entries", "forward"]

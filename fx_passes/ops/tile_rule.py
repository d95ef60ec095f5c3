"""The rule of the sampler "tile", in numbers that every implementation shares and that the host alone can compute.

A block B of 64 query rows keeps whole tiles t of 64 neighbouring keys. With the weight ``M_it = sum_{j in t} W_ij`` of
row i in a tile::

    s_Bt = sqrt(mean over the probed rows i of M_it^2)         q_Bt = min(1, c * (s_Bt + FLOOR / visible tiles of B))

and every entry of a kept tile has the weight ``W_ij / q_Bt``: unbiased for any known q above 0, whichever rows were
probed. It is the paper's rule (arXiv 2505.15080) with the weight of a tile in place of that of a key.

- Rows: 16 of 64, half of them evenly spaced and half with the largest |dO| of the rest: what is missed then weighs
  little in the gradient. A quarter of the rows costs a quarter of a product Q K^T.
- Floor: rows that were not probed may love a tile that no probed row sees. The floor bounds the weight of such a tile
  by ``visible tiles / (c * FLOOR)`` and costs c * FLOOR tiles per block, whatever the length.
- Rounding: q is rounded down to a multiple of 2^-32, at least 2^-32, and 1 / q is taken of the rounded q.
- Draw: points at distance 1 on the cumulative q of the block from a uniform start (systematic): q_Bt is the chance
  that tile t holds one.
"""

from __future__ import annotations

import math
from functools import lru_cache

ROWS = 64  # query rows of a block
KEYS = 64  # keys of a tile
PROBED = 16  # rows of a block that are probed
FLOOR = 0.1
ONE = 1 << 32  # units of q

# Above this share of the visible pairs the dense backward is faster: its work per pair is less (docs/cuda-kernels.md).
LARGEST_SHARE = 0.5
# By Cauchy-Schwarz the s of a block sum to sqrt(PROBED) at most, but for the rounding of the weights.
_SUM = math.sqrt(PROBED) * 1.01 + FLOOR


def count(length: int, size: int) -> int:
    """Blocks or tiles of a length."""
    return -(-length // size)


def capacity_for(c: float, n: int) -> int:
    """Tiles that one block can keep at most: nothing that is drawn is ever dropped."""
    tiles = count(n, KEYS)
    return tiles if c * _SUM + 1 >= tiles else math.ceil(c * _SUM) + 1


def c_limit(capacity: int, n: int) -> float:
    """The largest c for which `capacity` tiles per block are enough."""
    return math.inf if capacity >= count(n, KEYS) else (capacity - 1) / _SUM


@lru_cache(maxsize=256)
def _visible_tiles(m: int, n: int, left: int | None, right: int | None, diagonal: int) -> tuple[tuple[int, int], ...]:
    """How many blocks see how many tiles of the band: (tiles, blocks) pairs."""
    found: dict[int, int] = {}
    for first in range(0, m, ROWS):
        last = min(first + ROWS, m) - 1
        low = 0 if left is None else max(0, first + diagonal - left) // KEYS
        high = n if right is None else min(n, last + diagonal + right + 1)
        visible = max(0, count(max(high, 0), KEYS) - low)
        found[visible] = found.get(visible, 0) + 1
    return tuple(found.items())


@lru_cache(maxsize=256)
def expected_share(c: float, m: int, n: int, left: int | None, right: int | None, diagonal: int) -> float:
    """Share of the band's tiles that is kept where the attention is diffuse, which is where most is kept.

    Known before anything is computed, so that the choice between this backward and the dense one waits for nothing.
    """
    if math.isinf(c):
        return 1.0
    visible = _visible_tiles(m, n, left, right, diagonal)
    total = sum(tiles * blocks for tiles, blocks in visible)
    kept = sum(min(tiles, c * (1 + FLOOR)) * blocks for tiles, blocks in visible)
    return kept / total if total else 1.0


def keeps_most(c: float, m: int, n: int, left: int | None, right: int | None, diagonal: int) -> bool:
    """Whether tiles would keep so much that the dense backward is faster."""
    return expected_share(c, m, n, left, right, diagonal) > LARGEST_SHARE

"""Device function: the systematic sampler's upper level, which picks (row, tile of keys) by the tiles' masses.

Row i has points at the integer places P = 2^32, 2 * 2^32, ... of the line on which its tiles lie one behind the other,
tile t with a length of ``u_it = floor(c * 2^32 * M_it)`` and the first one at the row's random word. Slot h of a row's
list is point h. Everything after the floor is integer arithmetic: which tile a point is in, and where, is exact.
`columns` finds the key inside the tile.
"""

# Triton's language, not Python's types.
# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def select(
    scratch,  # of this program: log2 of the tiles' masses, [tiles, BM]
    shift,  # [BM]: what to subtract from it (final maximum - anchor, in units of log2)
    total,  # [BM]
    reset,  # [BM]: tiles before it are empty to within 2^-64
    phase,  # uint32 [BM]
    inside,  # [BM]: row exists
    scaled_c,  # c * 2^32
    first_tile,
    last_tile,
    capacity,
    items,  # int64 [BM]: index of slot 0 of every row
    tile_ptr,
    rank_ptr,
    place_ptr,
    units_ptr,
    BM: tl.constexpr,
    TC: tl.constexpr,
):
    """Writes the lists of a block of rows."""
    lane = tl.arange(0, BM)
    carry = phase.to(tl.int64)
    for start in range(first_tile, last_tile, TC):
        tiles = start + tl.arange(0, TC)
        there = (tiles < last_tile)[None, :] & inside[:, None]
        log = tl.load(scratch + tiles[None, :] * BM + lane[:, None], mask=there, other=float("-inf"))
        mass = tl.exp2(log - shift[:, None]) / total[:, None]
        # Not-a-number fails the comparison: broken inputs must not become places outside the lists.
        live = there & (tiles[None, :] >= reset[:, None]) & (mass <= 1.01)
        # A float32 that is an integer: its int64 twin is exact, and 4 bytes store it.
        units = tl.floor(tl.where(live, mass, 0.0) * scaled_c)
        length = units.to(tl.int64)
        ends = tl.cumsum(length, 1) + carry[:, None]
        # Never reached while a row's masses sum to 1 (`Lists.c_limit`); it guards memory, not the estimate.
        last = ((capacity.to(tl.int64) + 1) << 32) - 1
        begins = tl.minimum(ends - length, last)
        ends = tl.minimum(ends, last)
        slot = (begins >> 32).to(tl.int32)
        points = (ends >> 32).to(tl.int32) - slot
        rank = tl.cumsum(points, 0) - points
        # First point of the tile: distance from the tile's left end, which is below 2^32; the others lie 2^32 apart.
        place = (-1 - begins).to(tl.int32)
        for k in range(0, tl.max(tl.max(points, 1), 0)):
            at = items[:, None] + (slot + k)
            hit = points > k
            tl.store(tile_ptr + at, tl.broadcast_to(tiles[None, :] + (k << 16), (BM, TC)).to(tl.int32), mask=hit)
            tl.store(rank_ptr + at, rank + k, mask=hit)
            tl.store(place_ptr + at, place, mask=hit)
            tl.store(units_ptr + at, units, mask=hit)
        carry = tl.max(ends, 1)

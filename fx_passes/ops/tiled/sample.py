"""Which entries a row keeps, with which probability. Both samplers keep key j with probability q_j = min(1, c W_ij).

All comparisons are between integers in units of 2^-32, so q_j is a known number and not a rounded one, and sums do
not depend on their order. See docs/estimator.md.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fx_passes.ops.draws import STREAM_ENTRY, entry_words, row_words
from fx_passes.ops.tiled.tiles import CHUNK, Tile

ONE = 1 << 32
# The systematic sampler orders the keys of a row by sub-tile: sub-tile (chunk, lane) holds the 16 keys
# chunk * 256 + step * 16 + lane. A vectorised forward gets the mass of 16 sub-tiles by 16 vertical additions.
LANES = 16
STEPS = CHUNK // LANES


@dataclass(frozen=True)
class Entries:
    """Kept entries of one tile: `head` is batch * H + head, `row` and `key` count from the tile's corner.

    `weight` is W_ij / q_ij, about max(W_ij, 1 / c).
    """

    head: Tensor
    row: Tensor
    key: Tensor
    weight: Tensor


def row_offsets(seed: Tensor, site: int, heads: int, rows: slice) -> Tensor:
    """The systematic sampler's uniform start of every row, int64 [heads, m] in [0, 2^32)."""
    head = torch.arange(heads, device=seed.device)
    return row_words(seed, site, head[:, None], torch.arange(rows.start, rows.stop, device=seed.device))


def systematic(
    weights: Tensor, c: float, phase: Tensor, layout: tuple[int, int] = (STEPS, LANES)
) -> tuple[Entries, Tensor]:
    """Points with distance 1 / c on the row's cumulative weights; a key is kept if its interval holds a point.

    Args:
        weights: W of a tile, [heads, m, n]; the tile starts at a multiple of `CHUNK` keys.
        c: above 0, finite.
        phase: int64 [heads, m] in [0, 2^32): `row_offsets`, then what the tile to the left returned.
        layout: (steps, lanes) of the sub-tiles: `lanes` of them side by side in each steps * lanes keys, a divisor of
            `CHUNK`. Implementations may choose their own; (64, 1) is 64 neighbouring keys.

    Returns:
        the entries, and the phase for the tile to the right.
    """
    heads, m, n = weights.shape
    length, lanes = layout
    padded = torch.nn.functional.pad(weights, (0, -n % (length * lanes))).view(heads, m, -1, length, lanes)
    units = (padded.sum(3).double() * (c * ONE)).long().flatten(2)
    ends = units.cumsum(2) + phase[..., None]
    starts = ends - units
    chosen = (ends >> 32) > (starts >> 32)
    head, row, sub = chosen.nonzero(as_tuple=True)
    w = padded[head, row, sub // lanes, :, sub % lanes].double()
    # In the sub-tile the weights are scaled to the mass that the choice was made with.
    share = w.cumsum(1)
    bounds = (units[head, row, sub][:, None] * (share / share[:, -1:])).long()
    steps = torch.nn.functional.pad(bounds, (1, 0)).diff(dim=1)
    begin = starts[head, row, sub][:, None] + bounds - steps
    hit, step = (((begin + steps) >> 32) > (begin >> 32)).nonzero(as_tuple=True)
    q = steps[hit, step].double().div_(ONE).clamp_(max=1)
    key = sub[hit] // lanes * (length * lanes) + step * lanes + sub[hit] % lanes
    entries = Entries(head[hit], row[hit], key, (w[hit, step] / q).to(weights.dtype))
    return entries, ends[..., -1] % ONE


def independent(weights: Tensor, c: float, seed: Tensor, site: int, tile: Tile) -> Entries:
    """Every key by a draw of its own: the paper to the letter. Arguments as in `systematic`."""
    heads, m, n = weights.shape
    device = weights.device
    threshold = (weights.double() * (c * ONE)).clamp_(max=ONE).long()
    words = entry_words(
        seed,
        site,
        STREAM_ENTRY,
        torch.arange(heads, device=device),
        torch.arange(tile.row, tile.row + m, device=device),
        torch.arange(tile.key, tile.key + n, device=device),
    )
    head, row, key = (words < threshold).nonzero(as_tuple=True)
    q = threshold[head, row, key].double().div_(ONE)
    return Entries(head, row, key, (weights[head, row, key].double() / q).to(weights.dtype))

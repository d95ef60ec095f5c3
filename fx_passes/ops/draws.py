"""Random numbers as a function of a counter: Philox4x32-10 (Salmon et al., SC 2011) in PyTorch integer arithmetic.

A draw depends on (seed, site, stream, batch, head, row, key) alone, so that a recomputation draws the same, whatever
the tiling, the device or the order of work. Triton's `tl.philox` is the same function.
"""

from __future__ import annotations

import torch
from torch import Tensor

STREAM_ROW = 0  # one word per row: the systematic sampler's offset
STREAM_ENTRY = 1  # one word per (row, key): the independent sampler
STREAM_DROPOUT = 2
STREAM_TILE = 3  # one word per block of rows: the offset of the sampler "tile"
_STREAMS = 4

_M0, _M1 = 0xD2511F53, 0xCD9E8D57
_W0, _W1 = 0x9E3779B9, 0xBB67AE85
_MASK = 0xFFFFFFFF


def _mulhilo(a: Tensor, m: int) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a * m, in int64 lanes: the product of two 32-bit words would pass 2^63."""
    low = a * (m & 0xFFFF)
    high = a * (m >> 16)
    middle = high + (low >> 16)
    return middle >> 16, ((middle & 0xFFFF) << 16) | (low & 0xFFFF)


def philox(seed: Tensor, c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four 32-bit words (in int64 tensors, of the counters' broadcast shape) for a 0-dim int64 seed."""
    k0, k1 = seed & _MASK, (seed >> 32) & _MASK
    for _ in range(10):
        hi0, lo0 = _mulhilo(c0, _M0)
        hi1, lo1 = _mulhilo(c2, _M1)
        c0, c1, c2, c3 = hi1 ^ c1 ^ k0, lo1, hi0 ^ c3 ^ k1, lo0
        k0, k1 = (k0 + _W0) & _MASK, (k1 + _W1) & _MASK
    return c0, c1, c2, c3


def stream_word(site: int, stream: int) -> int:
    """The fourth word of the counter: it keeps call sites and the streams of one site apart."""
    return site * _STREAMS + stream


def row_words(seed: Tensor, site: int, heads: Tensor, rows: Tensor, stream: int = STREAM_ROW) -> Tensor:
    """One word in [0, 2^32) per row: int64 of the broadcast shape of `heads` (batch * H + head) and `rows`."""
    zero = torch.zeros((), dtype=torch.int64, device=rows.device)
    return philox(seed, zero, rows, heads, zero + stream_word(site, stream))[0]


def entry_words(seed: Tensor, site: int, stream: int, heads: Tensor, rows: Tensor, keys: Tensor) -> Tensor:
    """One word in [0, 2^32) per entry: int64 [heads, rows, keys] for 1-D `heads`, `rows` and contiguous `keys`.

    One Philox call serves the four keys 4 g .. 4 g + 3: word number key % 4 of counter key // 4.
    """
    if keys.numel() == 0:
        return torch.empty(len(heads), len(rows), 0, dtype=torch.int64, device=keys.device)
    first, last = int(keys[0]), int(keys[-1])
    groups = torch.arange(first // 4, last // 4 + 1, device=keys.device)
    constant = torch.full((), stream_word(site, stream), dtype=torch.int64, device=keys.device)
    words = torch.stack(philox(seed, groups, rows[:, None], heads[:, None, None], constant), -1).flatten(-2)
    return words[..., first % 4 : first % 4 + len(keys)]

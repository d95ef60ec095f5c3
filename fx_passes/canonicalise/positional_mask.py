"""Masks that are functions of positions alone: bands, prefixes and chunks, recognised by value."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class PositionalMask:
    """A mask of positions: a key may lie `left` before and `right` after its query; `prefix` keys are always seen.

    With `bottom_right` positions count from the last query and the last key.
    """

    left: int | None = None
    right: int | None = None
    prefix: int = 0
    chunk: int | None = None
    bottom_right: bool = False

    @property
    def kind(self) -> str:
        parts = ["causal" if self.right == 0 else f"up to {self.right} ahead"] if self.right is not None else []
        parts += [] if self.left is None else [f"window {self.left + 1}"]
        parts += [] if not self.prefix else [f"prefix {self.prefix}"]
        parts += [] if self.chunk is None else [f"chunk {self.chunk}"]
        return ", ".join(parts)

    def visible(self, m: int, n: int) -> Tensor:
        """Bool [m, n]."""
        i, j = torch.arange(m)[:, None] + (n - m if self.bottom_right else 0), torch.arange(n)[None, :]
        seen = torch.ones(m, n, dtype=torch.bool)
        if self.right is not None:
            seen &= j - i <= self.right
        if self.left is not None:
            seen &= i - j <= self.left
        if self.chunk is not None:
            seen &= i // self.chunk == j // self.chunk
        return seen | (j < self.prefix)


def both(a: PositionalMask, b: PositionalMask) -> PositionalMask | None:
    """The mask of positions where both are visible, or None where that is none."""
    if PositionalMask() in (a, b):
        return a if b == PositionalMask() else b
    banded = [p for p in (a, b) if p.left is not None or p.right is not None]
    if len({p.bottom_right for p in banded}) > 1 or (a.prefix != b.prefix and banded and (a.prefix or b.prefix)):
        return None
    if (a.prefix or b.prefix) and (a.chunk or b.chunk):
        return None
    if a.chunk and b.chunk and a.chunk != b.chunk:
        return None
    bounds = [min((x for x in pair if x is not None), default=None) for pair in ((a.left, b.left), (a.right, b.right))]
    from_the_end = any(p.bottom_right for p in banded)
    return PositionalMask(bounds[0], bounds[1], max(a.prefix, b.prefix), a.chunk or b.chunk, from_the_end)


def positional_mask_of(visible: Tensor) -> PositionalMask | None:
    """The band, prefix or chunks that a constant mask is, or None."""
    m, n = visible.shape
    if bool(visible.all()):
        return PositionalMask()
    i, j = torch.arange(m)[:, None], torch.arange(n)[None, :]
    band = _band(visible, i, j, 0)
    if band is not None:
        return band
    prefix = int(visible.all(0).long().cumprod(0).sum())
    if 0 < prefix < n:
        band = _band(visible, i, j, prefix)
        if band is not None:
            return band
    first = int(visible[:, 0].long().cumprod(0).sum())
    if 1 < first < m:
        for positional in (PositionalMask(chunk=first), PositionalMask(chunk=first, right=0)):
            if torch.equal(visible, positional.visible(m, n)):
                return positional
    return None


def _band(visible: Tensor, i: Tensor, j: Tensor, prefix: int) -> PositionalMask | None:
    beyond = visible & (j >= prefix)
    if not bool(beyond.any()):
        return None
    distance = (j - i).expand(visible.shape)[beyond]
    right, left = int(distance.max()), -int(distance.min())
    m, n = visible.shape
    bounds = (None if left >= m - 1 else left, None if right >= n - 1 else right)
    for positional in (
        PositionalMask(None, bounds[1], prefix),
        PositionalMask(bounds[0], None, prefix),
        PositionalMask(*bounds, prefix),
    ):
        if torch.equal(visible, positional.visible(m, n)):
            return positional
    return None

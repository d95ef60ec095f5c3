"""What the parts of a backward add to."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Sums:
    """Gradients in the accumulation dtype, contiguous."""

    query: Tensor
    key: Tensor
    value: Tensor
    bias: Tensor | None


def add_rows(target: Tensor, batch: Tensor, head: Tensor, place: Tensor, rows: Tensor) -> None:
    """``target[batch, head, place] += rows`` with repeated places added up; target is contiguous.

    Args:
        target: [B, heads, places, width].
        batch, head, place: integers that broadcast to the shape of `rows` without its last dimension. What lies outside
            of the tensor, and was clamped, is 0 in `rows`.
        rows: [..., width].
    """
    _, heads, places, width = target.shape
    if width:  # logits as a whole have empty queries and keys
        target.view(-1, width).index_add_(0, ((batch * heads + head) * places + place).flatten(), rows.flatten(0, -2))

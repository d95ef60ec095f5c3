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

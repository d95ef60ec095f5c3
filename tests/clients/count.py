"""Counts the softmax attentions that run in eager code, by what the dispatcher sees. It knows nothing of the pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
_FUSED = ("_scaled_dot_product", "_flash_attention", "_efficient_attention")
_BATCHED = {aten.bmm, aten.baddbmm}  # products of activations; those with a weight are mm and addmm
_SOFTMAX = {aten._softmax, aten._safe_softmax}
# What scores and weights stay under. A product or sum of elements counts if it keeps the shape.
_PASSES = {
    *(aten.mul, aten.mul_, aten.div, aten.div_, aten.add, aten.add_, aten.sub, aten.masked_fill, aten.masked_fill_),
    *(aten.where, aten.native_dropout, aten.clone, aten._to_copy, aten._unsafe_view, aten.nan_to_num, aten.tanh),
}


class CountAttention(TorchDispatchMode):
    """`count`: softmaxes of a batched product that enter a batched product, and fused attentions, in the forward."""

    def __init__(self) -> None:
        super().__init__()
        self._fused = 0
        self._used: set[int] = set()
        # By identity, with the tensor, so that no other one gets its identity: 0 for scores, or the softmax's number.
        self._known: dict[int, tuple[Tensor, int]] = {}

    @property
    def count(self) -> int:
        return self._fused + len(self._used)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        packet = func.overloadpacket
        name = packet.__name__
        if "backward" in name:
            return out
        first = out[0] if isinstance(out, (tuple, list)) and out else out
        sources = [self._known[id(a)] for a in args if isinstance(a, Tensor) and id(a) in self._known]
        if any(name.startswith(fused) for fused in _FUSED):
            self._fused += 1
        elif packet in _BATCHED:
            self._used.update(number for _, number in sources if number)
            self._known[id(first)] = (first, 0)
        elif packet in _SOFTMAX and sources:
            self._known[id(first)] = (first, len(self._known) + 1)
        elif sources and isinstance(first, Tensor):
            source, number = sources[0]
            if func.is_view or (packet in _PASSES and first.numel() == source.numel()):
                self._known[id(first)] = (first, number)
        return out

"""Graph breaks inside of torch itself that would hide attention, and what Dynamo traces in their place.

nn.TransformerEncoder and nn.TransformerDecoder look at the values of a mask to learn whether it is causal, as a hint
for faster kernels. That breaks the graph, and Dynamo then skips all of their layers, for their code belongs to
torch.nn. The hint changes no result, so that under Dynamo it is given only where the caller has given it.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor
from torch.nn.attention import flex_attention
from torch.nn.modules import transformer


@cache
def mend_graph_breaks() -> None:
    """Registers the substitutes with Dynamo, once in a process; eager code is not touched."""
    original = getattr(transformer, "_detect_is_causal_mask", None)
    if original is None:
        return

    @torch._dynamo.substitute_in_graph(original)
    def _detect_is_causal_mask(mask: Tensor | None, is_causal: bool | None = None, size: int | None = None) -> bool:
        return is_causal is True

    _train_flex_on_the_cpu()


def _train_flex_on_the_cpu() -> None:
    """torch refuses to trace flex_attention where a gradient is wanted on a CPU, for Inductor has no backward for it.

    A rewritten call has one. Inductor itself still refuses a call that was left.
    """
    original = getattr(flex_attention, "_validate_device", None)
    if original is None:
        return

    @torch._dynamo.substitute_in_graph(original)
    def _validate_device(query: Tensor, key: Tensor, value: Tensor) -> None:
        return None

"""Which of PyTorch's transforms a call stands under, and what that means for a backward of one's own."""

from __future__ import annotations

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor
from torch._C import _functorch

NEEDS_EXACT = "inside forward-mode AD or nested gradients"
NEEDS_LIBRARY = "inside a transform of torch.func"


def transform(*tensors: Tensor | None) -> str | None:
    """`NEEDS_EXACT`, `NEEDS_LIBRARY` or None: what the transforms around a call on these tensors ask for."""
    if torch.compiler.is_dynamo_compiling():
        return NEEDS_EXACT if _transformed() else None
    levels = [level.key() for level in _functorch.get_interpreter_stack() or ()]
    gradients = levels.count(_functorch.TransformType.Grad)
    if _functorch.TransformType.Jvp in levels or gradients > 1 or has_tangent(*tensors):
        return NEEDS_EXACT
    if gradients or _functorch.TransformType.Vmap in levels:
        return NEEDS_LIBRARY
    return None


def _transformed() -> bool:
    return bool(_functorch.get_dynamic_layer_stack_depth() > 0)


# Dynamo guards on the stack, and calls this while it traces, as with `torch.compiler.assume_constant_result`, which
# imports Dynamo.
_transformed._dynamo_marked_constant = True  # type: ignore[attr-defined]


def has_tangent(*tensors: Tensor | None) -> bool:
    """Whether one of the tensors is dual (outside of torch.func, whose `jvp` is a level)."""
    if forward_ad._current_level < 0:
        return False
    plain = [x for x in tensors if x is not None and not x.is_inference()]
    # An operator's implementation runs below autograd, which alone can look.
    included, excluded = torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set()
    with torch._C._ForceDispatchKeyGuard(included, excluded - excluded):
        return any(forward_ad.unpack_dual(x).tangent is not None for x in plain)  # type: ignore[no-untyped-call]

"""Where attention may be: softmaxes in every spelling."""

from __future__ import annotations

import torch
from torch.fx import Node

from fx_passes.find.trace import Trace, Value

aten = torch.ops.aten
SDPA = aten.scaled_dot_product_attention.default
_WORDS = ("softmax", "softmin", "exp", "attention", "multi_head")
_NOT = ("expand", "expm1", "explicit", "export")


def is_anchor(node: Node) -> bool:
    """Whether a node's operations may hold a softmax, by its name."""
    if node.op not in ("call_function", "call_method", "call_module"):
        return False
    name = str(node.target) if isinstance(node.target, str) else str(getattr(node.target, "__name__", node.target))
    if node.op == "call_module":
        owner = node.graph.owning_module
        name = type(owner.get_submodule(name)).__name__ if owner is not None else name
    name = name.lower()
    return (
        any(word in name for word in _WORDS) and not any(word in name for word in _NOT) and "sus" not in name.split(".")
    )


def softmaxes(trace: Trace, node: Node) -> list[Value]:
    """The softmaxes, exponentials and scaled_dot_product_attention calls among a node's operations."""
    record = trace.record(node)
    if record is None:
        return []
    return [v for v in record.values if v.op in (aten.softmax.int, aten.exp.default, SDPA)]

"""Calls of F.scaled_dot_product_attention: one node with everything in its arguments."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Node


@dataclass(frozen=True)
class Arguments:
    """Nodes of query, key and value, keyword arguments for `attend`, and the mask's kind for the report."""

    query: Node
    key: Node
    value: Node
    options: dict[str, Any] = field(default_factory=dict)
    mask_kind: str = "none"


_NAMES = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")


def sdpa_arguments(node: Node) -> Arguments | None:
    """The arguments of a call of F.scaled_dot_product_attention, or None for any other node."""
    if node.op != "call_function" or node.target is not F.scaled_dot_product_attention:
        return None
    given = {**dict(zip(_NAMES, node.args, strict=False)), **node.kwargs}
    options: dict[str, Any] = {"scale": given.get("scale"), "dropout_p": given.get("dropout_p", 0.0)}
    kind = "none"
    mask = given.get("attn_mask")
    if given.get("is_causal"):
        options["right"], kind = 0, "causal"
    elif isinstance(mask, Node):
        is_bool = _value(mask).dtype == torch.bool
        options["attn_mask" if is_bool else "attn_bias"] = mask
        kind = "mask" if is_bool else "bias"
    return Arguments(given["query"], given["key"], given["value"], options, kind)  # type: ignore[arg-type]


def _value(node: Node) -> Tensor:
    value = node.meta["example_value"]
    assert isinstance(value, Tensor)
    return value

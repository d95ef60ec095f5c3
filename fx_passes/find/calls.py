"""Calls that are attention as a whole."""

from __future__ import annotations

from torch.fx import Node

from fx_passes.find.flex import is_flex


def is_call(node: Node) -> bool:
    return is_flex(node)

"""The result of a rewritten attention in the place of the one that it replaces: in its memory layout, and its own."""

from __future__ import annotations

from torch.fx import Node

from fx_passes.canonicalise.forms import Attention
from fx_passes.find.calls import is_call
from fx_passes.find.context import Context
from fx_passes.ops.layout import in_order, order_in_memory
from fx_passes.rewrite.build import Builder


def put_in_layout(build: Builder, attention: Attention, new: Node) -> Node:
    """`new` as the code behind it may use what was there: views of it need its strides, and writes a tensor of its own.

    Some of what is replaced keeps its result for the backward, so that the caller must not write to it; some does not.
    """
    value = attention.out.value
    node = value.node if value.node is not None else value.home
    assert node is not None
    if node is value.home and is_call(node):
        return new
    order = order_in_memory(value.fake)
    if order is None:
        return new
    return build.call(in_order, new, order, _is_written(build, node) or _is_returned(build.context, node))


def _is_written(build: Builder, node: Node) -> bool:
    writes = build.context.writes.get(build.context.storages.get(node, -1), ())
    return any(position > build.position for position, _ in writes)


def _is_returned(context: Context, node: Node) -> bool:
    """Whether the caller gets it, or a view of it, and may write to it."""
    storage = context.storages.get(node)
    (output,) = (n for n in node.graph.nodes if n.op == "output")
    return any(context.storages.get(n, -2) == storage for n in output.all_input_nodes)

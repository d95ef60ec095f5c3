"""Puts a new value in the place of an old one, and takes away what nobody reads any more."""

from __future__ import annotations

import operator

import torch
from torch.fx import Graph, Node

from fx_passes.canonicalise.axes import FailedMatch, Operand
from fx_passes.canonicalise.views import after, is_view
from fx_passes.find.calls import is_call
from fx_passes.find.context import Context, fake_of, written
from fx_passes.find.trace import Trace, Value
from fx_passes.rewrite.build import Builder


def end_of_views(trace: Trace, x: Operand) -> Operand:
    """The last value of the same Dynamo node that shows x through views."""
    while x.value.node is None:
        users = [u for u in x.value.users if u.home is x.value.home]
        if len(users) != 1 or not is_view(users[0]):
            break
        try:
            moved = after(users[0], x.layout)
        except FailedMatch:
            break
        if moved is None:
            break
        x = Operand(users[0], moved)
    return x


def replace(trace: Trace, build: Builder, value: Value, new: Node) -> None:
    """`new` in place of a value, which is the result of a Dynamo node or one inside of it."""
    old = value.node
    value.node, value.version = new, None
    if old is not None:
        new.meta = {**dict(old.meta), **{k: v for k, v in new.meta.items() if k == "example_value"}}
        old.replace_all_uses_with(new)
        return
    home = value.home
    assert home is not None
    record = trace.records[home]
    assert record is not None
    if isinstance(record.out, Value):
        _emit_again(build, record.out, home)
        return
    for user in list(home.users):
        if user.target is not operator.getitem or not isinstance(user.args[1], int):
            raise FailedMatch("the results of the operation around it are passed on as a whole")
        result = record.out[user.args[1]]
        if isinstance(result, Value) and user.users:
            _emit_again(build, result, user)


def _emit_again(build: Builder, result: Value, node: Node) -> None:
    result.node = None
    again = build.node(result)
    again.meta = dict(node.meta)
    node.replace_all_uses_with(again)


def other_results(trace: Trace, soft: Value) -> list[Node]:
    """Nodes that take the logsumexp of a call which is attention as a whole, and are read."""
    home = soft.home
    if home is None or not is_call(home):
        return []
    used = [u for u in home.users if u.target is operator.getitem and u.args[1] and u.users]
    if any(u.args[1] != 1 for u in used):
        raise FailedMatch("its largest scores are used")
    return used


def replace_lse(trace: Trace, build: Builder, soft: Value, lse: Node, nodes: list[Node]) -> None:
    """`lse` in place of the logsumexp in a call, and what the call makes of it again."""
    home = soft.home
    record = trace.records[home] if home is not None else None
    assert record is not None
    for value in record.values:
        if value.op is torch.ops.aten.logsumexp.default:
            value.node, value.version = lse, None
    for node in nodes:
        _emit_again(build, record.out[1], node)


def remove_dead(context: Context, graph: Graph, candidates: list[Node]) -> None:
    """Erases the nodes among the candidates that nobody reads, in-place writes into tensors of their own included."""
    for node in sorted(set(candidates), key=lambda n: context.position[n], reverse=True):
        if node not in context.position or node.users or node.op in ("placeholder", "get_attr", "output"):
            continue
        targets = written(node)
        if targets and not all(_is_own(context, graph, node, target) for target in targets):
            continue
        inputs = node.all_input_nodes
        graph.erase_node(node)
        context.position.pop(node, None)
        _ripple(context, inputs)


def _ripple(context: Context, inputs: list[Node]) -> None:
    """Views and constants that only an erased node had read go with it."""
    for node in inputs:
        if node.users or (node.op != "call_function" and node.op != "call_method") or written(node):
            continue
        if node not in context.position or not isinstance(fake_of(node), torch.Tensor):
            continue
        if node.op == "call_function" and getattr(node.target, "__module__", "") not in (
            "_operator",
            "torch",
            "torch._C._nn",
            "torch.nn.functional",
            "builtins",
        ):
            continue
        if node.is_impure():
            continue
        more = node.all_input_nodes
        node.graph.erase_node(node)
        context.position.pop(node, None)
        _ripple(context, more)


def _is_own(context: Context, graph: Graph, node: Node, target: Node) -> bool:
    """Whether the tensor that a node writes into is one that no later node reads and that is no input."""
    storage = context.storages.get(target)
    for other in graph.nodes:
        if storage is None or context.storages.get(other) != storage:
            continue
        if other.op in ("placeholder", "get_attr"):
            return False
        if any(context.position.get(u, 1 << 60) > context.position[node] for u in other.users):
            return False
    return True

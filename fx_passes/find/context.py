"""What holds at each place of a Dynamo graph: autocast, grad mode, writes in place, where values come from."""

from __future__ import annotations

import operator
from bisect import bisect_left
from dataclasses import dataclass, field
from enum import IntEnum
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, maybe_get_fake_mode
from torch.fx import GraphModule, Node
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves

from fx_passes.find.sizes import Symbols, symbols
from fx_passes.torch_compat import signature

_INPLACE = {
    getattr(operator, f"i{name}")
    for name in ["add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor", "matmul"]
}
_CONTRACTIONS = ("linear", "matmul", "bmm", "mm", "einsum", "conv", "addmm", "baddbmm", "bilinear", "attention")


class Level(IntEnum):
    """What a value derives from; the highest of its ancestors' levels."""

    CONSTANT = 0
    PARAMETER = 1  # parameters through views and elementwise operations only
    COMPUTED = 2  # parameters through a product such as a linear layer
    INPUT = 3


@dataclass(frozen=True)
class State:
    """Autocast contexts that are open (arguments of torch.autocast) and grad mode at one node."""

    autocast: tuple[tuple[Any, ...], ...] = ()
    grad: bool = True
    known: bool = True  # False inside regions whose mode is not modelled, such as vmap


@dataclass(eq=False)
class Context:
    """One linear scan of a graph.

    For the body of a higher-order operator `parent` is the graph around it, `calls` are its calls there, and
    `operands` is what the first of them hands to the body's placeholders.
    """

    gm: GraphModule
    example_inputs: dict[Node, Any] = field(default_factory=dict)
    parent: Context | None = None
    calls: tuple[Node, ...] = ()
    operands: tuple[Any, ...] = ()

    def __post_init__(self) -> None:
        self.placeholders = [n for n in self.gm.graph.nodes if n.op == "placeholder"]
        self.position: dict[Node, int] = {}
        self.state: dict[Node, State] = {}
        self.writes: dict[int, list[tuple[int, Node]]] = {}
        self.storages: dict[Node, int] = {}
        self._levels: dict[Node, Level] = {}
        self.relations: dict[Node, Any] = {}  # `relations.Relation`: what the reading of a call relies on
        modes = (maybe_get_fake_mode(x) for n in self.gm.graph.nodes for x in tree_leaves(fake_of(n)))
        self.fake_mode: FakeTensorMode = next((mode for mode in modes if mode is not None), None) or FakeTensorMode()
        outer = self.parent.state.get(self.calls[0]) if self.parent is not None and self.calls else None
        state = outer or State(grad=torch.is_grad_enabled())
        for i, node in enumerate(self.gm.graph.nodes):
            state = _next_state(node, state)
            self.position[node], self.state[node] = i, state
            storage = _storage(fake_of(node))
            if storage is not None:
                self.storages[node] = storage
            for target in written(node):
                where = self.storages.get(target)
                if where is not None:
                    self.writes.setdefault(where, []).append((i, node))

    @cached_property
    def symbols(self) -> Symbols:
        """The symbolic sizes of the outermost graph. Empty without example inputs: then no caller checks sizes."""
        if self.parent is not None:
            return self.parent.symbols
        return symbols(self.placeholders) if self.example_inputs else Symbols()

    def last_write(self, node: Node, before: int) -> Node | None:
        """The last node before a position, and after `node`, that writes into the storage of `node`."""
        writes = self.writes.get(self.storages.get(node, -1), [])
        i = bisect_left(writes, before, key=lambda w: w[0])
        if i and writes[i - 1][0] > self.position[node]:
            return writes[i - 1][1]
        return None

    def outermost(self, node: Node) -> tuple[Context, Node]:
        """The node behind placeholders of higher-order operators' bodies, as far out as it is one, and its graph."""
        context = self
        while context.parent is not None and node.op == "placeholder":
            i = context.placeholders.index(node)
            operand = context.operands[i] if i < len(context.operands) else None
            if not isinstance(operand, Node):
                break
            context, node = context.parent, operand
        return context, node

    def level(self, node: Node) -> Level:
        """What a node derives from."""
        todo = [node]
        while todo:
            top = todo[-1]
            missing = [] if top in self._levels else [n for n in top.all_input_nodes if n not in self._levels]
            if missing:
                todo += missing
                continue
            todo.pop()
            if top not in self._levels:
                self._levels[top] = self._level(top)
        return self._levels[node]

    def _level(self, node: Node) -> Level:
        if node.op == "placeholder":
            context, outer = self.outermost(node)
            if outer is not node:
                return context.level(outer)
            if is_parameter(node):
                return Level.PARAMETER
            return Level.CONSTANT if is_buffer(node) else Level.INPUT
        if node.op == "get_attr":
            value = attribute(self.gm, str(node.target))
            return Level.PARAMETER if isinstance(value, torch.nn.Parameter) else Level.CONSTANT
        level = max((self._levels[n] for n in node.all_input_nodes), default=Level.CONSTANT)
        if node.op == "call_module":
            module = attribute(self.gm, str(node.target))
            return max(level, Level.COMPUTED) if any(True for _ in module.parameters()) else level
        name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
        if level == Level.PARAMETER and any(word in name for word in _CONTRACTIONS):
            return Level.COMPUTED
        return level

    def value(self, node: Node) -> Tensor | None:
        """The real tensor of a buffer, or None where it is not one or cannot be read."""
        found = self.given(node) if is_buffer(self.source(node)) else None
        return None if isinstance(found, torch.nn.Parameter) else found

    def given(self, node: Node) -> Tensor | None:
        """The real tensor of an input at compile time, or None where it is not one or cannot be read."""
        context, source = self.outermost(node)
        found = context.example_inputs.get(source)
        return found if isinstance(found, Tensor) and not isinstance(found, FakeTensor) else None

    def source(self, node: Node) -> Node:
        """The outermost graph's placeholder behind a node that `value` reads."""
        return self.outermost(node)[1]


def attribute(gm: GraphModule, target: str) -> Any:
    value: Any = gm
    for part in target.split("."):
        value = getattr(value, part)
    return value


def fake_of(node: Node) -> Any:
    """The fake value of a node, or None."""
    value = node.meta.get("example_value")
    return node.meta.get("val") if value is None else value


def is_parameter(node: Node) -> bool:
    fake = fake_of(node)
    return (
        node.type is torch.nn.Parameter
        or isinstance(fake, torch.nn.Parameter)
        or node.meta.get("sus_kind") == "parameter"
    )


def is_buffer(node: Node) -> bool:
    if node.meta.get("sus_kind") == "buffer":
        return True
    static = (node.meta.get("tensor_dict") or {}).get("_dynamo_static_input_type")
    return static is not None and not is_parameter(node)


def written(node: Node) -> list[Node]:
    """The nodes into whose tensors a node writes."""
    if node.op == "call_method":
        name = str(node.target)
        if name == "__setitem__" or (name.endswith("_") and not name.endswith("__")):
            return _nodes(node.args[:1])
        return _nodes([node.kwargs.get("out")])
    if node.op != "call_function":
        return []
    target: Any = node.target
    if target in _INPLACE or target is operator.setitem:
        return _nodes(node.args[:1])
    if getattr(target, "__module__", "") == "_operator":
        return []  # `operator.and_` is no in-place operation, though its name is that of one
    if isinstance(target, torch._ops.OpOverload):
        return _written_by_schema(node, target)
    found = _nodes([node.kwargs.get("out")])
    name = getattr(target, "__name__", "")
    inplace = node.kwargs.get("inplace") is True
    if inplace or (name.endswith("_") and not name.endswith("__")):
        found += _nodes(node.args[:1]) or _nodes([node.kwargs.get("input")])
    elif getattr(target, "__module__", "") == "torch.nn.functional" and True in node.args[1:]:
        found += _functional_inplace(node, target)
    return found


def _functional_inplace(node: Node, target: Any) -> list[Node]:
    """F.dropout(x, p, training, True) and the like: `inplace` by position."""
    try:
        names = list(signature(target).parameters)
    except (TypeError, ValueError):
        return []
    i = names.index("inplace") if "inplace" in names else -1
    return _nodes(node.args[:1]) if 0 < i < len(node.args) and node.args[i] is True else []


def _written_by_schema(node: Node, op: torch._ops.OpOverload[Any, Any]) -> list[Node]:
    found: list[Any] = []
    for i, argument in enumerate(op._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            found.append(node.args[i] if i < len(node.args) else node.kwargs.get(argument.name))
    return _nodes(found)


def _nodes(values: Any) -> list[Node]:
    return [v for v in values if isinstance(v, Node)]


def _storage(fake: Any) -> int | None:
    if not isinstance(fake, Tensor):
        return None
    while is_traceable_wrapper_subclass(fake):  # a DTensor: its views share the storage of the local tensor only
        fake = getattr(fake, fake.__tensor_flatten__()[0][0])
    try:
        return int(fake.untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError):
        return None


def _next_state(node: Node, state: State) -> State:
    name = getattr(node.target, "__name__", "") if node.op == "call_function" else ""
    if name == "_enter_autocast":
        return State((*state.autocast, tuple(node.args)), state.grad, state.known)
    if name == "_exit_autocast":
        return State(state.autocast[:-1], state.grad, state.known)
    if name in ("_set_grad_enabled", "set_grad_enabled"):
        return State(state.autocast, bool(node.args[0]), state.known)
    if name == "_vmap_increment_nesting":
        return State(state.autocast, state.grad, False)
    if name == "_vmap_decrement_nesting":
        return State(state.autocast, state.grad, True)
    return state

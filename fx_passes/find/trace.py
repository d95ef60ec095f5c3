"""The ATen operations behind the nodes of a Dynamo graph, recorded node by node and only where somebody asks.

A `Value` is one tensor of the recorded program. Recording is functional: `scores *= s` makes a new value, and whoever
reads `scores` later gets the new one. F.dropout, softmax and F.scaled_dot_product_attention stay one operation each;
matmul, einsum, F.multi_head_attention_forward and the like become views and bmm.
"""

from __future__ import annotations

import contextlib
import logging
import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from fx_passes.find import calls, flex
from fx_passes.find.context import Context, attribute, fake_of
from fx_passes.find.decompositions import DECOMPOSITIONS, masked_by_index, sets_by_mask
from fx_passes.torch_compat import symbolic_sizes

log = logging.getLogger(__name__)
aten = torch.ops.aten

_WHOLE = {
    aten.dropout.default,
    aten.softmax.int,
    aten.log_softmax.int,
    aten.scaled_dot_product_attention.default,
    aten.repeat_interleave.Tensor,
}


def partly_written(old: Tensor, written: Tensor) -> Tensor:
    """The operation behind a tensor of whose elements some were written in place, through another view of them."""
    raise NotImplementedError("it says what a value derives from, and is never run")


@dataclass(eq=False)
class Value:
    """One tensor: the result of `op(*args, **kwargs)`, or a leaf that only its `node` describes (op None).

    Attributes:
        fake: the fake tensor; None for the tuple of an operation with several results.
        node: the graph's node with this value, if there is one.
        version: the last node that had written into the node's storage when the value was read.
        home: the Dynamo node during which the operation was recorded.
        users: operations recorded so far that read it.
    """

    op: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    fake: Any
    node: Node | None = None
    version: Node | None = None
    home: Node | None = None
    users: list[Value] = field(default_factory=list)

    @property
    def shape(self) -> tuple[Any, ...]:
        return tuple(self.fake.shape)

    @property
    def dtype(self) -> torch.dtype:
        return self.fake.dtype  # type: ignore[no-any-return]

    def __repr__(self) -> str:
        shape = list(self.fake.shape) if isinstance(self.fake, Tensor) else self.fake
        return f"Value({self.op or self.node}, {shape})"


@dataclass
class Record:
    """One Dynamo node's operations: its result as values, and the values of inputs after in-place writes."""

    out: Any
    values: list[Value]
    after: dict[Node, Value]


class Trace:
    """Values of one graph, recorded on demand."""

    def __init__(self, context: Context) -> None:
        self.context = context
        self.records: dict[Node, Record | None] = {}
        self.failures: dict[Node, Exception] = {}
        self.leaves: dict[tuple[Node, Node | None], Value] = {}
        self.alive: list[Any] = []  # identities of fake tensors are keys only while the tensors live

    def read(self, node: Node, before: int) -> Any:
        """The value of a node as a reader at a position sees it; a tree of values where the node gives a tuple."""
        writer = self.context.last_write(node, before)
        if writer is not None:
            record = self.record(writer)
            if record is not None:
                for target, value in record.after.items():
                    if target is node or _same_geometry(fake_of(target), fake_of(node)):
                        return value
            return self.leaf(node, writer)
        return self.own(node)

    def own(self, node: Node) -> Any:
        """What a node itself gives."""
        if node.op == "call_function" and node.target is operator.getitem and isinstance(node.args[0], Node):
            source = node.args[0]
            if isinstance(fake_of(source), (tuple, list)):
                record = self.record(source)
                if record is not None:
                    value = record.out[node.args[1]]
                    if isinstance(value, Value) and value.node is None:
                        value.node = node
                    return value
                return self.leaf(node, None)
        record = self.record(node)
        return self.leaf(node, None) if record is None else record.out

    def leaf(self, node: Node, version: Node | None) -> Value:
        key = (node, version)
        if key not in self.leaves:
            self.leaves[key] = Value(None, (), {}, fake_of(node), node, version)
        return self.leaves[key]

    def record(self, node: Node) -> Record | None:
        """The operations of a node; None for placeholders and for what cannot be traced."""
        if node not in self.records:
            self.records[node] = None  # against recursion
            if node.op in ("call_function", "call_method", "call_module") and self.context.state[node].known:
                try:
                    self.records[node] = self._record(node)
                except Exception as error:
                    self.failures[node] = error
                    log.debug("cannot trace %s", node.format_node(), exc_info=True)
        return self.records[node]

    def users(self, value: Value) -> list[Value]:
        """All operations that read a value, those of Dynamo nodes not yet recorded included."""
        todo = [value.node] if value.node is not None else []
        while todo:
            node = todo.pop()
            for user in list(node.users) if node in self.context.position else []:
                if user not in self.context.position:
                    continue
                record = self.record(user)
                several = record is not None and isinstance(record.out, (tuple, list))
                for part in [user, *(user.users if several else ())]:
                    if part.target is operator.getitem:
                        self.own(part)
                if record is not None and record.out is value and user is not value.node:
                    todo.append(user)  # an operation that gives its input back, such as `.to` the same dtype
        return value.users

    def is_live(self, value: Value, apart: set[int]) -> bool:
        """Whether a value is read by something else than the values `apart`, up to an output of its graph."""
        nodes = [] if value.node is None else [value.node]
        if value.home is not None and value.home is not value.node:
            record = self.records.get(value.home)
            if record is not None and isinstance(record.out, (tuple, list)):
                parts = [u for u in value.home.users if u.target is operator.getitem]
                nodes += [u for u in parts if record.out[u.args[1]] is value]  # type: ignore[index]
        for user in (user for node in nodes for user in node.users):
            if user not in self.context.position or self.record(user) is None:
                return True
        return any(id(u) not in apart and self.is_live(u, apart) for u in self.users(value))

    def _record(self, node: Node) -> Record:
        context, position = self.context, self.context.position[node]
        function, given, named = _call(context, node)
        recorder = _Recorder(node)
        read = [n for n in tree_leaves((given, named)) if isinstance(n, Node)]
        inputs: dict[Node, Any] = {n: self.read(n, position) for n in dict.fromkeys(read)}
        for n, value in inputs.items():
            recorder.know(fake_of(n), value)
        args = torch.fx.node.map_arg(given, fake_of)
        kwargs = torch.fx.node.map_arg(named, fake_of)
        if any(
            leaf is None and a is not None
            for leaf, a in zip(_leaves(args, kwargs), _leaves(given, named), strict=False)
        ):
            raise RuntimeError("an argument has no fake value")
        with _modes(self.context, node), recorder, torch._C._AutoDispatchBelowAutograd():
            result = function(*args, **kwargs)
        self.alive.append((recorder.keep, result))
        out = tree_map(recorder.lookup, result)
        if isinstance(out, Value) and out.node is None:
            out.node = node
        after = {}
        if recorder.wrote:
            after = {n: recorder.lookup(fake_of(n)) for n in inputs if isinstance(fake_of(n), Tensor)}
            after = {n: v for n, v in after.items() if v is not inputs[n]}
            for n, v in after.items():
                if v.node is None:
                    v.node, v.version = n, node
        return Record(out, recorder.values, after)


class _Recorder(TorchDispatchMode):
    """Records functional ATen operations on fake tensors."""

    def __init__(self, home: Node) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.home = home
        self.known: dict[int, Any] = {}
        self.keep: list[Any] = []
        self.values: list[Value] = []
        self.wrote = False

    def know(self, fake: Any, value: Any) -> None:
        if isinstance(fake, (tuple, list)) and isinstance(value, (tuple, list)):
            for f, v in zip(fake, value, strict=True):
                self.know(f, v)
        elif isinstance(fake, Tensor):
            self.known[id(fake)] = value
            self.keep.append(fake)

    def lookup(self, x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        if id(x) not in self.known:
            self.know(x, Value(None, (), {}, x, home=self.home))
        return self.known[id(x)]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "prim":
            return func(*args, **kwargs)
        smaller = DECOMPOSITIONS.get(func)
        if smaller is not None:
            with self:
                result = smaller(*args, **kwargs)
            if result is not NotImplemented:
                return result
        composite = torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd")
        if composite and func not in _WHOLE:
            with self:
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        result = func(*args, **kwargs)
        if func is aten.lift_fresh.default and not result.dim() and getattr(result, "constant", None) is not None:
            options = {"dtype": result.dtype, "device": result.device}  # a number, as in torch.tensor(-math.inf)
            self._add(aten.full.default, ([], result.item()), options, result)
        elif func._schema.is_mutable:
            self._write(func, args, kwargs, result)
        elif any(isinstance(x, Tensor) for x in tree_leaves(result)):
            self._add(func, args, kwargs, result)
        return result

    def _add(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        value = self._value(func, args, kwargs, result if isinstance(result, Tensor) else None)
        if isinstance(result, Tensor):
            self.know(result, value)
            return
        for i, x in enumerate(result):
            if isinstance(x, Tensor):
                child = Value(operator.getitem, (value, i), {}, x, home=self.home)
                value.users.append(child)
                self.values.append(child)
                self.know(x, child)

    def _value(self, func: Any, args: Any, kwargs: Any, fake: Any) -> Value:
        args, kwargs = tree_map(self.lookup, tuple(args)), tree_map(self.lookup, dict(kwargs))
        value = Value(func, args, kwargs, fake, home=self.home)
        for used in {id(v): v for v in tree_leaves((args, kwargs)) if isinstance(v, Value)}.values():
            used.users.append(value)
        self.values.append(value)
        return value

    def _write(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        """An in-place operation: its first argument has a new value, other views of its storage derive from it."""
        self.wrote = True
        target = args[0] if args and isinstance(args[0], Tensor) else None
        functional = _functional(func)
        value = None
        if func is aten.copy_.default and args[0].device == args[1].device:
            value = self.lookup(self._copied(args[0], args[1]))
        elif func is aten.index_put_.default and sets_by_mask(*args):
            with self:
                value = self.lookup(masked_by_index(*args))
        elif target is not None and functional is not None and "out" not in kwargs:
            value = self._value(functional, args, kwargs, target)
        written = [target] if target is not None else [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        storages = {x.untyped_storage()._cdata for x in written}
        for fake in list(self.keep):
            if fake.untyped_storage()._cdata in storages:
                same = value is not None and _same_geometry(fake, target)
                self.known[id(fake)] = value if same else self._partly_written(fake, value)

    def _copied(self, target: Tensor, source: Tensor) -> Tensor:
        """What a copy into the target leaves there."""
        with self:
            if source.shape != target.shape:
                source = aten.expand.default(source, list(target.shape))
            if source.dtype != target.dtype:
                source = aten._to_copy.default(source, dtype=target.dtype)
        return source

    def _partly_written(self, fake: Any, written: Value | None) -> Value:
        old = self.known[id(fake)]
        if written is None or not isinstance(old, Value):
            return Value(None, (), {}, fake, home=self.home)
        value = Value(partly_written, (old, written), {}, fake, home=self.home)
        old.users.append(value)
        written.users.append(value)
        self.values.append(value)
        return value


def _functional(func: Any) -> Any:
    """``aten.mul.Tensor`` for ``aten.mul_.Tensor``; None where there is none."""
    packet = getattr(aten, func._schema.name.split("::")[1].removesuffix("_"), None)
    found = getattr(packet, func._overloadname, None) if packet is not None and func.namespace == "aten" else None
    return found if found is not None and not found._schema.is_mutable else None


def _same_geometry(a: Any, b: Any) -> bool:
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return False
    return a is b or (
        a.shape == b.shape
        and a.stride() == b.stride()
        and a.dtype == b.dtype
        and a.untyped_storage()._cdata == b.untyped_storage()._cdata
        and a.storage_offset() == b.storage_offset()
    )


def _leaves(args: Any, kwargs: Any) -> list[Any]:
    return tree_leaves((args, kwargs))


def _call(context: Context, node: Node) -> tuple[Callable[..., Any], Any, Any]:
    """A function with what a node computes, and its arguments as nodes."""
    if flex.is_flex(node):
        return flex.recorded(context, node)
    if calls.is_call(node):
        return calls.recorded(context, node)
    return _callable(context, node), node.args, node.kwargs


def _callable(context: Context, node: Node) -> Callable[..., Any]:
    if node.op == "call_function":
        target: Any = node.target
        if isinstance(target, torch._ops.HigherOrderOperator):
            raise RuntimeError("a higher-order operator")
        return target  # type: ignore[no-any-return]
    if node.op == "call_method":
        name = str(node.target)
        return lambda self, *args, **kwargs: getattr(self, name)(*args, **kwargs)
    module = attribute(context.gm, str(node.target))
    if any(True for _ in module.parameters()) or any(True for _ in module.buffers()):
        raise RuntimeError("a module with tensors of its own")
    return module  # type: ignore[no-any-return]


@contextlib.contextmanager
def _modes(context: Context, node: Node) -> Iterator[None]:
    """Fake tensors and the autocast contexts that are open at a node; parameters stay uncached."""
    mode = context.fake_mode
    with contextlib.ExitStack() as stack:
        stack.enter_context(mode)
        if mode.shape_env is not None:
            stack.enter_context(mode.shape_env.ignore_fresh_unbacked_symbols())
            stack.enter_context(symbolic_sizes())
        stack.enter_context(torch.no_grad())
        stack.callback(torch.set_autocast_cache_enabled, torch.is_autocast_cache_enabled())
        torch.set_autocast_cache_enabled(False)  # of an autocast around the compiled code
        for device, dtype, enabled, *_ in context.state[node].autocast:
            stack.enter_context(torch.autocast(device, dtype=dtype, enabled=enabled, cache_enabled=False))
        yield

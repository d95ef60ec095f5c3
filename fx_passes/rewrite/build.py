"""Builds nodes: values as nodes of the graph, and tensors brought to a wanted order of axes."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import Node, Proxy
from torch.fx.proxy import GraphAppendingTracer
from torch.utils._sympy.interp import sympy_interp
from torch.utils._sympy.reference import PythonReferenceAnalysis

from fx_passes.canonicalise.axes import Axis, Dim, FailedMatch, Layout, Operand, leaves, resolve
from fx_passes.canonicalise.operators import RESHAPES
from fx_passes.find.context import Context
from fx_passes.find.trace import Value, partly_written

aten = torch.ops.aten


class Builder:
    """Inserts nodes in front of one node of a graph."""

    def __init__(self, context: Context, before: Node) -> None:
        self.context = context
        self.graph = before.graph
        self.before = before
        self.position = context.position[before]
        self.sizes: dict[Axis, Any] = {}

    def call(self, target: Any, *args: Any, **kwargs: Any) -> Node:
        with self.graph.inserting_before(self.before):
            node = self.graph.call_function(target, args, kwargs)
        for key in ("stack_trace", "nn_module_stack", "source_fn_stack"):
            if key in self.before.meta:
                node.meta[key] = self.before.meta[key]
        return node

    def node(self, value: Value) -> Node:
        """A node with this value at the place of insertion: an existing one, or the operation emitted again."""
        node = value.node
        if node is not None and self._holds(value, node):
            return node
        if value.op is None:
            raise FailedMatch("a tensor of it is made in a way that cannot be repeated")
        if value.op is partly_written:
            raise FailedMatch("a tensor of it is written in place before its use")
        if torch.Tag.nondeterministic_seeded in getattr(value.op, "tags", ()):
            raise FailedMatch("a random tensor inside of another operation is needed")
        args, kwargs = self._arguments(value.args), self._arguments(value.kwargs)
        target = aten.reshape.default if value.op in RESHAPES else value.op
        node = self.call(operator.getitem if value.op is operator.getitem else target, *args, **kwargs)
        node.meta["example_value"] = value.fake
        value.node, value.version = node, None
        return node

    def _holds(self, value: Value, node: Node) -> bool:
        position = self.context.position.get(node)
        if position is None:
            return True
        return position < self.position and self.context.last_write(node, self.position) is value.version

    def _arguments(self, args: Any) -> Any:
        if isinstance(args, Value):
            return self.node(args)
        if isinstance(args, (tuple, list)):
            return type(args)(self._arguments(a) for a in args)
        if isinstance(args, dict):
            return {k: self._arguments(v) for k, v in args.items()}
        if isinstance(args, (torch.SymInt, torch.SymFloat, torch.SymBool)):
            return self.symbol(args)
        return args

    def symbol(self, number: Any) -> Any:
        """A node for a symbolic number: an existing one, the size of a tensor, or computed from such."""
        wanted = number.node.expr
        found = self._existing(wanted)
        if found is not None:
            return found
        tracer, known = GraphAppendingTracer(self.graph), dict[Any, Proxy]()
        for symbol in wanted.free_symbols:
            node = None if wanted.is_symbol else self._existing(symbol)
            if node is None:
                raise FailedMatch("a dynamic size could not be expressed")
            known[symbol] = Proxy(node, tracer)
        with self.graph.inserting_before(self.before):
            result = sympy_interp(PythonReferenceAnalysis, known, wanted)
        return result.node if isinstance(result, Proxy) else result

    def _existing(self, expression: Any) -> Node | None:
        """A node for an expression, if an input, a computed number or the size of a tensor is that."""
        sized: tuple[Node, int] | None = None
        for node in self.graph.nodes:
            if node is self.before:
                break
            fake = node.meta.get("example_value")
            if isinstance(fake, (torch.SymInt, torch.SymFloat)) and fake.node.expr == expression:
                return node  # type: ignore[no-any-return]
            if sized is None and isinstance(fake, torch.Tensor):
                sized = next(
                    (
                        (node, d)
                        for d, s in enumerate(fake.shape)
                        if not isinstance(s, int) and s.node.expr == expression
                    ),
                    None,
                )
        return None if sized is None else self.call(aten.sym_size.int, *sized)

    def size(self, axis: Axis) -> Any:
        if isinstance(axis.size, int):
            return axis.size
        if axis not in self.sizes:
            self.sizes[axis] = self.symbol(axis.size)
        return self.sizes[axis]

    def total(self, axes: Dim) -> Any:
        """The product of sizes, as a number or a node."""
        result: Any = 1
        for axis in leaves(axes):
            size = self.size(axis)
            if isinstance(result, int) and (isinstance(size, int) or result == 1):
                result = result * size if isinstance(size, int) else size
            else:
                result = self.call(operator.mul, result, size)
        return result

    def arrange(self, operand: Operand, groups: list[Dim], full: tuple[bool, ...]) -> Node:
        """A node whose dimension i runs over the axes of ``groups[i]``.

        A group of which the operand has no axis gives size 1, unless ``full[i]``; missing axes are broadcast.
        """
        groups = [leaves(g) for g in groups]
        node, layout = self._select(self.node(operand.value), resolve(operand.layout))
        have = [a for dim in layout for a in dim]
        order = [a for g in groups for a in g if a in have]
        if set(order) != set(have):
            raise FailedMatch("a tensor has an axis without a role")
        if any(len(dim) != 1 for dim in layout):
            node = self.call(aten.reshape.default, node, [self.size(a) for a in have])
        permutation = [have.index(a) for a in order]
        if permutation != sorted(permutation):
            node = self.call(aten.permute.default, node, permutation)
        return self._merge(node, groups, set(have), full)

    def _select(self, node: Node, layout: Layout) -> tuple[Node, Layout]:
        """Without the axes of which one place is wanted."""
        if all(a.at is None for dim in layout for a in dim):
            return node, layout
        if any(len(dim) != 1 for dim in layout):
            node = self.call(aten.reshape.default, node, [self.size(a) for dim in layout for a in dim])
        rest: list[Dim] = []
        for axis in (a for dim in layout for a in dim):
            if axis.at is None:
                rest.append((axis,))
            else:
                node = self.call(aten.select.int, node, len(rest), axis.at)
        return node, tuple(rest)

    def _merge(self, node: Node, groups: list[Dim], have: set[Axis], full: tuple[bool, ...]) -> Node:
        """From one dimension per axis to one per group, broadcast where axes are missing."""
        dim = 0
        expand: list[Any] = []
        shape: list[Any] = []
        merges = missing = False
        for group, whole in zip(groups, full, strict=True):
            present = [a in have for a in group]
            if not any(present) and not (whole and group):
                node = self.call(aten.unsqueeze.default, node, dim)
                expand.append(-1)
                shape.append(1)
                dim += 1
                continue
            for a, there in zip(group, present, strict=True):
                if not there:
                    node = self.call(aten.unsqueeze.default, node, dim)
                    missing = True
                expand.append(-1 if there else self.size(a))
                dim += 1
            merges = merges or len(group) != 1
            shape.append(self.total(group))
        if missing:
            node = self.call(aten.expand.default, node, expand)
        return self.call(aten.reshape.default, node, shape) if merges else node

    def unmerge(self, node: Node, groups: list[Dim], layout: Layout) -> Node:
        """The inverse: a tensor with one dimension per group as one of a layout."""
        axes = [a for g in groups for a in leaves(g)]
        wanted = resolve(layout)
        if any(len(leaves(g)) != 1 for g in groups):
            node = self.call(aten.reshape.default, node, [self.size(a) for a in axes])
        order = [a for dim in wanted for a in dim]
        missing = [a for a in order if a not in set(axes)]
        if set(axes) - set(order):
            raise FailedMatch("an axis of the result is unknown")
        permutation = [axes.index(a) for a in order if a in set(axes)]
        if permutation != sorted(permutation):
            node = self.call(aten.permute.default, node, permutation)
        if missing:
            for i, a in enumerate(order):
                if a in missing:
                    node = self.call(aten.unsqueeze.default, node, i)
            node = self.call(aten.expand.default, node, [self.size(a) for a in order])
        if any(len(dim) != 1 for dim in wanted):
            sizes = [self.total(dim) if dim else 1 for dim in wanted]
            node = self.call(aten.reshape.default, node, sizes)
        return node

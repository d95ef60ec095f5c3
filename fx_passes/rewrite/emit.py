"""Emits the operator's call in place of an attention that was understood."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from fx_passes.canonicalise.attention_dims import AttentionDims
from fx_passes.canonicalise.axes import Axis, Dim, FailedMatch, Operand, free_axes, leaves, product
from fx_passes.canonicalise.forms import Attention, Bias, Factor, Mask, Plain
from fx_passes.canonicalise.lower import LoweredTerm
from fx_passes.canonicalise.masks.conditions import KeepMask
from fx_passes.ops.documents import both_ids, only_rows
from fx_passes.ops.fully_masked_rows import attend_with_fully_masked_rows
from fx_passes.ops.functional import attend, attend_logits
from fx_passes.rewrite.build import Builder

aten = torch.ops.aten


def attend_as_is(name: str, query: Tensor, *args: Any, **options: Any) -> Tensor:
    """One of `_OPERATORS` with the dtypes of its operands, also under autocast. (A graph holds no functions.)"""
    with torch.autocast(query.device.type, enabled=False):
        return _OPERATORS[name](query, *args, **options)


_OPERATORS: dict[str, Callable[..., Tensor]] = {
    f.__name__: f for f in (attend, attend_logits, attend_with_fully_masked_rows)
}

_MASKS = ("attn_mask", "attn_bias", "query_ids", "key_ids", "sinks")
# Of what is emitted for masks: what never returns a view.
_NEW = {operator.and_, operator.add, operator.mul, operator.truediv, operator.ne, operator.eq, operator.floordiv} | {
    torch.where, torch.logical_not, torch.full, torch.zeros, torch.arange, only_rows,
}  # fmt: skip


class Emitter:
    """Emits one attention.

    Args:
        build: where.
        c, seed: nodes of the draw.
        slots: by the number of a site, where its c is in `c`.
        options: go to every call.
        autocast: the calls stand under autocast.
    """

    def __init__(
        self, build: Builder, c: Node, slots: dict[int, int], seed: Node, options: dict[str, Any], autocast: bool
    ) -> None:
        self.lse: Node | None = None  # of the term emitted last, where `wants_lse`
        self.wants_lse = False
        self.build, self.c, self.slots, self.seed = build, c, slots, seed
        self.options, self.autocast = options, autocast

    def emit(self, attention: Attention, lowered: list[LoweredTerm], numbers: list[int]) -> Node:
        nodes = [self._term(attention, item, number) for item, number in zip(lowered, numbers, strict=True)]
        nodes += [self._plain(attention, plain) for plain in attention.plain]
        total = nodes[0]
        for node in nodes[1:]:
            total = self.build.call(operator.add, total, node)
        return total

    def _term(self, attention: Attention, lowered: LoweredTerm, number: int) -> Node:
        build, dims, term = self.build, lowered.dims, lowered.term
        dtype, computed = attention.out.value.dtype, self._compute_dtype(lowered)
        out = self._call(lowered, number, computed)
        groups = [dims.batch, dims.query_heads, dims.rows, dims.out]
        if self.wants_lse:
            lse, logits = build.call(operator.getitem, out, 1), term.softmax.source
            self.lse = build.unmerge(lse, groups[:3], logits.layout[:-1])
            out = build.call(operator.getitem, out, 0)
        across = [f for f in lowered.on_out if f.over(term.mixed)]
        if leaves(term.mixed):
            axes = [axis for group in groups for axis in leaves(group)]
            out = build.unmerge(out, groups, tuple((axis,) for axis in axes))
            out = self._contract(out, axes, attention, across, computed, term.mixed)
        else:
            out = build.unmerge(out, groups, attention.out.layout)
        for factor in lowered.on_out:
            if factor not in across:
                out = self._factor(out, factor, [*attention.out.layout])
        if term.scale != 1.0:
            out = build.call(operator.mul, out, term.scale)
        return build.call(aten.to.dtype, out, dtype) if lowered.on_out or computed != dtype else out

    def _plain(self, attention: Attention, plain: Plain) -> Node:
        """What a term without softmax gives: factors times value, summed over the keys."""
        build, value, dtype = self.build, attention.value, attention.out.value.dtype
        axes = free_axes(value.layout)
        node = self._cast(build.arrange(value, [(axis,) for axis in axes], (True,) * len(axes)), value, dtype)
        out = self._contract(node, [*axes], attention, plain.factors, dtype, plain.mixed)
        return out if plain.scale == 1.0 else build.call(operator.mul, out, plain.scale)

    def _contract(
        self, node: Node, axes: list[Axis], attention: Attention, factors: Sequence[Factor], dtype: Any, mixed: Dim
    ) -> Node:
        """A node with these axes times factors, summed over what the attention's layout has not."""
        build = self.build
        numbers = {axis: i for i, axis in enumerate(axes)}
        args: list[Any] = [node, list(numbers.values())]
        for factor in factors:
            mine = free_axes(factor.layout)
            other = self._cast(build.arrange(factor, [(axis,) for axis in mine], (True,) * len(mine)), factor, dtype)
            other = other if factor.power == 1 else build.call(aten.reciprocal.default, other)
            args += [other, [numbers.setdefault(axis, len(numbers)) for axis in mine]]
        if any(axis not in numbers for axis in leaves(mixed)):
            raise FailedMatch("the probabilities are repeated and summed again")
        kept = [axis for axis in attention.out.axes if axis in numbers]
        out = build.call(torch.einsum, *args, [numbers[axis] for axis in kept])
        return build.unmerge(out, [(axis,) for axis in kept], attention.out.layout)

    def _compute_dtype(self, lowered: LoweredTerm) -> torch.dtype:
        """The widest of query, key and value; for logits that of the value, unless they are finer."""
        qk = lowered.product
        dtype = lowered.value.value.dtype
        for operand in [lowered.term.softmax.source] if qk is None else [qk.query, qk.key]:
            dtype = torch.promote_types(dtype, operand.value.dtype)
        return dtype

    def _call(self, lowered: LoweredTerm, number: int, dtype: torch.dtype) -> Node:
        build, dims, term = self.build, lowered.dims, lowered.term
        value = self._operand(lowered.value, lowered.on_value, [dims.batch, dims.heads, dims.keys, dims.out], dtype)
        dropout_p = 0.0 if term.dropout is None else term.dropout.p
        options = {**self.options, **self._masks(lowered, dtype), "dropout_p": dropout_p, "site": number}
        if term.softmax.sink is not None:
            options["sinks"] = self._sink(term.softmax.sink, lowered, dtype)
        if lowered.product is None or term.scores is None:
            whole, keys, columns = term.softmax.source, dims.keys, term.softmax.unknown_columns
            if columns is not None:
                whole, keys = columns.source, columns.dim
                after = product(leaves(keys)) - columns.start - product(leaves(dims.keys))
                value = build.call(aten.constant_pad_nd.default, value, [0, 0, columns.start, after])
            logits = build.arrange(whole, [dims.batch, dims.query_heads, dims.rows, keys], (True,) * 4)
            return self._attend(self._cast(logits, whole, dtype), value, None, options)
        groups = [dims.batch, dims.query_heads, dims.rows, dims.features]
        query = self._operand(lowered.product.query, lowered.on_query, groups, dtype, full=True)
        for mask in lowered.mask.fills:
            query = self._quiet(query, mask, dims)
        groups = [dims.batch, dims.heads, dims.keys, dims.features]
        key = self._operand(lowered.product.key, lowered.on_key, groups, dtype)
        options["scale"] = term.scores.scale
        if lowered.mask.fully_masked:
            options["fully_masked"] = lowered.mask.fully_masked
        if term.scores.softcap:
            options["softcap"] = abs(term.scores.softcap)
        return self._attend(query, key, value, options)

    def _operand(
        self, x: Operand, factors: list[Factor], groups: list[Dim], dtype: torch.dtype, full: bool = False
    ) -> Node:
        """Query, key or value times its factors; the last two are broadcast over the batch, unless they are `full`."""
        node = self._cast(self.build.arrange(x, groups, (full, True, True, True)), x, dtype)
        for factor in factors:
            node = self._factor(node, factor, groups, dtype)
        return node

    def _attend(self, first: Node, second: Node, third: Node | None, options: dict[str, Any]) -> Node:
        f = attend_logits if third is None else attend_with_fully_masked_rows if "fully_masked" in options else attend
        c = self.build.call(aten.select.int, self.c, 0, self.slots[options["site"]])
        if not any(self._may_change(options.get(name)) for name in _MASKS):
            options = {**options, "own_masks": True}
        if self.wants_lse:
            if f is attend_with_fully_masked_rows:
                raise FailedMatch("its logsumexp is used, and rows may see no key")
            options = {**options, "return_lse": True}
        operands = (first, second, c, self.seed) if third is None else (first, second, third, c, self.seed)
        if self.autocast:
            return self.build.call(attend_as_is, f.__name__, *operands, **options)
        return self.build.call(f, *operands, **options)

    def _may_change(self, node: Any) -> bool:
        """Whether what a node returns may be written to before the backward: by the graph, or as an input of it."""
        if not isinstance(node, Node) or node.target in _NEW:
            return False
        context = self.build.context
        storage = context.storages.get(node)
        if storage is None:
            return any(self._may_change(x) for x in node.all_input_nodes)
        inputs = (x for x in node.graph.nodes if x.op in ("placeholder", "get_attr"))
        later = (position > self.build.position for position, _ in context.writes.get(storage, ()))
        return any(later) or storage in (context.storages.get(x) for x in inputs)

    def _cast(self, node: Node, operand: Operand, dtype: torch.dtype) -> Node:
        return node if operand.value.dtype == dtype else self.build.call(aten.to.dtype, node, dtype)

    def _factor(self, node: Node, factor: Factor, groups: list[Dim], dtype: torch.dtype | None = None) -> Node:
        """A node times (or over) a factor, whose axes are those of the groups."""
        if isinstance(factor.value.fake, Tensor):
            other = self._narrow(factor, groups)
        else:
            other = self.build.symbol(factor.value.fake)
        node = self.build.call(operator.mul if factor.power == 1 else operator.truediv, node, other)
        return node if dtype is None else self.build.call(aten.to.dtype, node, dtype)

    def _narrow(self, x: Operand, groups: list[Dim]) -> Node:
        """A tensor that is broadcast along the groups that it does not run over."""
        return self.build.arrange(x, groups, (False,) * len(groups))

    def _masks(self, lowered: LoweredTerm, dtype: torch.dtype) -> dict[str, Any]:
        build, dims, found = self.build, lowered.dims, lowered.mask
        groups = [dims.batch, dims.query_heads, dims.rows, dims.keys]
        options: dict[str, Any] = {}
        positional = found.positional
        options |= {} if positional.left is None else {"left": positional.left}
        options |= {} if positional.right is None else {"right": positional.right}
        device = lowered.value.value.fake.device
        if positional.prefix:
            options["prefix"] = build.call(torch.full, (1,), positional.prefix, dtype=torch.int64, device=device)
        options |= {"bottom_right": True} if positional.bottom_right else {}
        ids = self._ids(lowered, device)
        conditions = [
            seen for seen in found.keep if ids is None or found.fully_masked or not self._joins_ids(ids, seen, dims)
        ]
        if ids is not None:
            options |= {"query_ids": ids[0], "key_ids": ids[1]}
        masks = [self._condition(self._narrow(seen, groups), seen) for seen in conditions]
        if masks:
            options["attn_mask"] = self._joined(operator.and_, masks)
        biases = [self._bias(bias, groups, dtype) for bias in found.biases]
        for filled in found.fills:
            node = self._narrow(filled, groups)
            fill = build.call(torch.full, (), max(filled.fill, torch.finfo(dtype).min), dtype=dtype, device=device)
            zero = build.call(torch.full, (), 0.0, dtype=dtype, device=device)
            biases.append(build.call(torch.where, node, *((zero, fill) if filled.keep else (fill, zero))))
        if biases:
            options["attn_bias"] = self._joined(operator.add, biases)
        return options

    def _joined(self, op: Any, nodes: list[Node]) -> Node:
        return functools.reduce(lambda a, b: self.build.call(op, a, b), nodes)

    def _ids(self, lowered: LoweredTerm, device: torch.device) -> list[Node] | None:
        """Numbers of documents for queries and keys: of all documents and chunks together."""
        build, dims, found = self.build, lowered.dims, lowered.mask
        pairs: list[list[Node]] = []
        if found.positional.chunk is not None:
            positions = [build.call(torch.arange, build.total(axes), device=device) for axes in (dims.rows, dims.keys)]
            chunks = [build.call(operator.floordiv, x, found.positional.chunk) for x in positions]
            pairs.append([build.call(aten.unsqueeze.default, x, 0) for x in chunks])
        for documents in found.documents:
            sides = ((documents.query, dims.rows), (documents.key, dims.keys))
            nodes = [build.arrange(side, [dims.batch, axes], (False, True)) for side, axes in sides]
            pairs.append([build.call(aten.to.dtype, x, torch.int64) for x in nodes])
        kinds = {self._over(x, dims) for x in found.keep}
        if not pairs and not found.fully_masked and "rows" in kinds and len(kinds) > 1:
            # Conditions on rows alone and others on keys alone: together they are M x N.
            axes = (dims.rows, dims.keys)
            pairs.append([build.call(torch.zeros, 1, build.total(a), dtype=torch.int64, device=device) for a in axes])
        while len(pairs) > 1:
            both = build.call(both_ids, *pairs.pop(), *pairs.pop())
            pairs.append([build.call(operator.getitem, both, i) for i in (0, 1)])
        return pairs[0] if pairs else None

    def _over(self, seen: KeepMask, dims: AttentionDims) -> str:
        axes, batch = set(seen.axes), leaves(dims.batch)
        if seen.over(dims.rows) and axes <= {*leaves(dims.rows), *batch}:
            return "rows"
        return "keys" if seen.over(dims.keys) and axes <= {*leaves(dims.keys), *batch} else "both"

    def _joins_ids(self, ids: list[Node], seen: KeepMask, dims: AttentionDims) -> bool:
        """Puts a condition on rows alone into the numbers of documents, which change in place of a mask."""
        if self._over(seen, dims) != "rows":
            return False
        node = self._condition(self.build.arrange(seen, [dims.batch, dims.rows], (False, True)), seen)
        ids[0] = self.build.call(only_rows, *ids, node)
        return True

    def _condition(self, node: Node, seen: KeepMask) -> Node:
        """A bool node that is true where a key is visible."""
        if seen.value.dtype != torch.bool:
            return self.build.call(operator.ne if seen.keep else operator.eq, node, 0)
        return node if seen.keep else self.build.call(torch.logical_not, node)

    def _bias(self, bias: Bias, groups: list[Dim], dtype: torch.dtype) -> Node:
        node = self._narrow(bias, groups)
        if not bias.value.dtype.is_floating_point:
            node = self.build.call(aten.to.dtype, node, dtype)
        for factor in bias.factors:
            node = self._factor(node, factor, groups)
        return node if bias.scale == 1.0 else self.build.call(operator.mul, node, bias.scale)

    def _quiet(self, query: Node, mask: Mask, dims: AttentionDims) -> Node:
        """The query with zeros where a mask sets every score of the row to one value: probs equal, no gradient."""
        build = self.build
        node = self._narrow(mask, [dims.batch, dims.query_heads, dims.rows, dims.keys])
        kept = node if mask.keep else build.call(torch.logical_not, node)
        return build.call(operator.mul, query, build.call(torch.any, kept, -1, True))

    def _sink(self, sink: Operand | float, lowered: LoweredTerm, dtype: torch.dtype) -> Node:
        build, heads = self.build, lowered.dims.query_heads
        if isinstance(sink, Operand):
            node = build.arrange(sink, [heads], (True,))
            return node if leaves(heads) else build.call(aten.reshape.default, node, [1])
        device = lowered.value.value.fake.device
        return build.call(torch.full, (build.total(heads),), sink, dtype=dtype, device=device)

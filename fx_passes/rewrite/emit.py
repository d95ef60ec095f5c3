"""Emits the operator's call in place of an attention that was understood."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from fx_passes.canonicalise.attention_dims import AttentionDims
from fx_passes.canonicalise.axes import Axis, Dim, FailedMatch, all_axes, free_axes, leaves
from fx_passes.canonicalise.contraction import Operand
from fx_passes.canonicalise.forms import Attention, Bias, Factor, Mask, Term
from fx_passes.canonicalise.lower import LoweredTerm
from fx_passes.canonicalise.masks import KeepMask
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
        total: Node | None = None
        for item, number in zip(lowered, numbers, strict=True):
            node = self._term(attention, item, number)
            total = node if total is None else self.build.call(operator.add, total, node)
        assert total is not None
        for term in attention.terms:
            if term.plain:
                total = self.build.call(operator.add, total, self._plain(attention, term))
        return total

    def _term(self, attention: Attention, lowered: LoweredTerm, number: int) -> Node:
        build, dims = self.build, lowered.dims
        dtype = attention.out.dtype
        out = self._call(lowered, number, self._compute_dtype(lowered))
        groups = [dims.batch, dims.query_heads, dims.rows, dims.out]
        if self.wants_lse:
            layout = lowered.term.source.layout[:-1]
            lse = build.call(operator.getitem, out, 1)
            self.lse = build.unmerge(lse, groups[:3], layout, lowered.term.source.value.shape[:-1])
            out = build.call(operator.getitem, out, 0)
        mixed = set(leaves(lowered.term.mixed))
        if mixed:
            factors = [f for f in lowered.on_out if mixed & set(f.axes)]
            out = self._mixed(out, groups, attention, factors, self._compute_dtype(lowered), lowered.term.mixed)
        else:
            out = build.unmerge(out, groups, attention.layout, attention.out.shape)
        for factor in lowered.on_out:
            if not mixed & set(factor.axes):
                out = self._factor(out, factor, [*attention.layout])
        if lowered.term.scale != 1.0:
            out = build.call(operator.mul, out, lowered.term.scale)
        if lowered.on_out or self._compute_dtype(lowered) != dtype:
            out = build.call(aten.to.dtype, out, dtype)
        return out

    def _mixed(
        self, out: Node, groups: list[Dim], attention: Attention, factors: list[Factor], dtype: torch.dtype, mixed: Dim
    ) -> Node:
        """Results of several heads times factors, summed over the axes that the attention's layout has not."""
        axes = [axis for group in groups for axis in leaves(group)]
        out = self.build.unmerge(out, groups, tuple((axis,) for axis in axes), None)
        return self._contract(out, axes, attention, factors, dtype, mixed)

    def _plain(self, attention: Attention, term: Term) -> Node:
        """What a term without softmax gives: factors times value, summed over the keys."""
        build, value, dtype = self.build, attention.value, attention.out.dtype
        axes = free_axes(value.layout)
        node = self._cast(build.arrange(value, [(axis,) for axis in axes], (True,) * len(axes)), value, dtype)
        out = self._contract(node, [*axes], attention, term.factors, dtype, term.mixed)
        return out if term.scale == 1.0 else build.call(operator.mul, out, term.scale)

    def _contract(
        self, node: Node, axes: list[Axis], attention: Attention, factors: list[Factor], dtype: torch.dtype, mixed: Dim
    ) -> Node:
        """A node with these axes times factors, summed over what the attention's layout has not."""
        build = self.build
        numbers = {axis: i for i, axis in enumerate(axes)}
        args: list[Any] = [node, list(numbers.values())]
        for factor in factors:
            mine = free_axes(factor.layout)
            other = build.arrange(Operand(factor.value, factor.layout), [(axis,) for axis in mine], (True,) * len(mine))
            other = other if factor.value.dtype == dtype else build.call(aten.to.dtype, other, dtype)
            other = other if factor.power == 1 else build.call(aten.reciprocal.default, other)
            args += [other, [numbers.setdefault(axis, len(numbers)) for axis in mine]]
        if any(axis not in numbers for axis in leaves(mixed)):
            raise FailedMatch("the probabilities are repeated and summed again")
        kept = [axis for axis in all_axes(attention.layout) if axis in numbers]
        out = build.call(torch.einsum, *args, [numbers[axis] for axis in kept])
        return build.unmerge(out, [(axis,) for axis in kept], attention.layout, None)

    def _compute_dtype(self, lowered: LoweredTerm) -> torch.dtype:
        """The widest of query, key and value; for logits that of the value, unless they are finer."""
        dtype = lowered.value.value.dtype
        others = [lowered.query, lowered.key] if lowered.query is not None else [lowered.scores.whole]
        for operand in others:
            if operand is not None:
                dtype = torch.promote_types(dtype, operand.value.dtype)
        return dtype

    def _call(self, lowered: LoweredTerm, number: int, dtype: torch.dtype) -> Node:
        build, dims, scores = self.build, lowered.dims, lowered.scores
        value = self._cast(
            build.arrange(lowered.value, [dims.batch, dims.heads, dims.keys, dims.out], (False, True, True, True)),
            lowered.value,
            dtype,
        )
        for factor in lowered.on_value:
            value = self._factor(value, factor, [dims.batch, dims.heads, dims.keys, dims.out], dtype)
        options = {**self.options, **self._masks(lowered, dtype), "dropout_p": lowered.term.dropout, "site": number}
        if scores.sink is not None:
            options["sinks"] = self._sink(lowered, dtype)
        if lowered.query is None or lowered.key is None:
            whole, keys = scores.whole, dims.keys
            if scores.wide is not None:
                whole, (keys, start) = lowered.term.source, scores.wide
                after = math.prod(a.size for a in leaves(keys)) - start - math.prod(a.size for a in leaves(dims.keys))
                value = build.call(aten.constant_pad_nd.default, value, [0, 0, start, after])
            groups = [dims.batch, dims.query_heads, dims.rows, keys]
            logits = self._cast(build.arrange(whole, groups, (True, True, True, True)), whole, dtype)
            return self._attend(logits, value, None, options)
        query = self._cast(
            build.arrange(lowered.query, [dims.batch, dims.query_heads, dims.rows, dims.features], (True,) * 4),
            lowered.query,
            dtype,
        )
        for factor in lowered.on_query:
            query = self._factor(query, factor, [dims.batch, dims.query_heads, dims.rows, dims.features], dtype)
        for mask in lowered.mask.fills:
            query = self._quiet(query, mask, dims)
        key = self._cast(
            build.arrange(lowered.key, [dims.batch, dims.heads, dims.keys, dims.features], (False, True, True, True)),
            lowered.key,
            dtype,
        )
        for factor in lowered.on_key:
            key = self._factor(key, factor, [dims.batch, dims.heads, dims.keys, dims.features], dtype)
        options["scale"] = scores.scale
        if lowered.mask.fully_masked:
            options["fully_masked"] = lowered.mask.fully_masked
        if scores.softcap:
            options["softcap"] = abs(scores.softcap)
        return self._attend(query, key, value, options)

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
            other = self.build.arrange(Operand(factor.value, factor.layout), groups, (False,) * len(groups))
        else:
            other = self.build.symbol(factor.value.fake)
        node = self.build.call(operator.mul if factor.power == 1 else operator.truediv, node, other)
        return node if dtype is None else self.build.call(aten.to.dtype, node, dtype)

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
        for seen in conditions:
            mask = self._condition(build.arrange(seen.operand, groups, (False,) * 4), seen)
            options["attn_mask"] = (
                build.call(operator.and_, options["attn_mask"], mask) if "attn_mask" in options else mask
            )
        total: Node | None = None
        for bias in found.biases:
            node = self._bias(bias, groups, dtype)
            total = node if total is None else build.call(operator.add, total, node)
        for filled in found.fills:
            node = build.arrange(Operand(filled.value, filled.layout), groups, (False,) * 4)
            fill = build.call(torch.full, (), max(filled.fill, torch.finfo(dtype).min), dtype=dtype, device=device)
            zero = build.call(torch.full, (), 0.0, dtype=dtype, device=device)
            node = build.call(torch.where, node, *((zero, fill) if filled.keep else (fill, zero)))
            total = node if total is None else build.call(operator.add, total, node)
        if total is not None:
            options["attn_bias"] = total
        return options

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
        if not pairs and not found.fully_masked and self._rows_and_keys(found.keep, dims):
            pairs.append(
                [
                    build.call(torch.zeros, 1, build.total(axes), dtype=torch.int64, device=device)
                    for axes in (dims.rows, dims.keys)
                ]
            )
        while len(pairs) > 1:
            both = build.call(both_ids, *pairs.pop(), *pairs.pop())
            pairs.append([build.call(operator.getitem, both, i) for i in (0, 1)])
        return pairs[0] if pairs else None

    def _rows_and_keys(self, seen: list[KeepMask], dims: AttentionDims) -> bool:
        """Whether some conditions are on rows alone and others on keys alone: together they are M x N."""
        kinds = {self._over(x, dims) for x in seen}
        return "rows" in kinds and len(kinds) > 1

    def _over(self, seen: KeepMask, dims: AttentionDims) -> str:
        axes = set(all_axes(seen.operand.layout))
        rows, keys, batch = set(leaves(dims.rows)), set(leaves(dims.keys)), set(leaves(dims.batch))
        if axes & rows and axes <= rows | batch:
            return "rows"
        return "keys" if axes & keys and axes <= keys | batch else "both"

    def _joins_ids(self, ids: list[Node], seen: KeepMask, dims: AttentionDims) -> bool:
        """Puts a condition on rows alone into the numbers of documents, which change in place of a mask."""
        if self._over(seen, dims) != "rows":
            return False
        node = self._condition(self.build.arrange(seen.operand, [dims.batch, dims.rows], (False, True)), seen)
        ids[0] = self.build.call(only_rows, *ids, node)
        return True

    def _condition(self, node: Node, seen: KeepMask) -> Node:
        """A bool node that is true where a key is visible."""
        if seen.operand.value.dtype != torch.bool:
            return self.build.call(operator.ne if seen.keep else operator.eq, node, 0)
        return node if seen.keep else self.build.call(torch.logical_not, node)

    def _bias(self, bias: Bias, groups: list[Dim], dtype: torch.dtype) -> Node:
        build = self.build
        node = build.arrange(Operand(bias.value, bias.layout), groups, (False,) * 4)
        if not bias.value.dtype.is_floating_point:
            node = build.call(aten.to.dtype, node, dtype)
        for factor in bias.factors:
            node = self._factor(node, factor, groups)
        return node if bias.scale == 1.0 else build.call(operator.mul, node, bias.scale)

    def _quiet(self, query: Node, mask: Mask, dims: AttentionDims) -> Node:
        """The query with zeros where a mask sets every score of the row to one value: probs equal, no gradient."""
        build = self.build
        groups = [dims.batch, dims.query_heads, dims.rows, dims.keys]
        node = build.arrange(Operand(mask.value, mask.layout), groups, (False,) * 4)
        kept = node if mask.keep else build.call(torch.logical_not, node)
        alive = build.call(torch.any, kept, -1, True)
        return build.call(operator.mul, query, alive)

    def _sink(self, lowered: LoweredTerm, dtype: torch.dtype) -> Node:
        build, sink, heads = self.build, lowered.scores.sink, lowered.dims.query_heads
        assert sink is not None
        if sink.operand is not None:
            node = build.arrange(sink.operand, [heads], (True,))
            return node if leaves(heads) else build.call(aten.reshape.default, node, [1])
        size = build.total(heads)
        return build.call(torch.full, (size,), sink.number, dtype=dtype, device=lowered.value.value.fake.device)

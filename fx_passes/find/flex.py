"""FlexAttention's call in a Dynamo graph, as the operations on M x N scores that define it.

The call is one higher-order operator with two subgraphs, `score_mod` and `mask_mod`: functions of one score and of the
numbers of its entry, head, query and key. Here they run once on grids of these numbers, [B, 1, 1, 1] to [1, 1, 1, N],
and what they record is read like attention that was written by hand:

    flex_attention(q, k, v, score_mod, block_mask, scale)   # before
    where(mask_mod(b, h, i, j), score_mod(scale * q @ k.mT, b, h, i, j), -inf).softmax(-1) @ v   # as recorded

`mask_mod` decides which keys are visible, as in flex's eager form; the blocks of a BlockMask are derived from it.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fx_passes.find.context import Context, attribute, fake_of

aten = torch.ops.aten
_ARGUMENTS = ("query", "key", "value", "score_mod", "block_mask", "scale", "options", "score_buffers", "mask_buffers")
_WITHOUT_MASK = 1 << 29  # blocks of a BlockMask that no caller gave have 2^30 places

# Beside pointwise operations: what makes constants, and what takes one element for each place of the grid.
_ALLOWED = {
    aten.index.Tensor, aten.select.int, aten.full.default, aten.arange.start_step, aten.scalar_tensor.default,
    aten.new_ones.default, aten.new_zeros.default, aten.new_full.default, aten.ones_like.default,
    aten.zeros_like.default, aten.full_like.default, aten.lift_fresh.default, aten.lift_fresh_copy.default,
    aten._to_copy.default, aten.clone.default, aten.alias.default, aten.detach.default, aten.where.ScalarOther,
    aten.where.ScalarSelf, aten.where.Scalar, aten.masked_fill.Scalar, aten.masked_fill.Tensor, aten.expand.default,
    aten.floor_divide.default, aten.floor_divide.Scalar, aten.__and__.Tensor, aten.__or__.Tensor, aten.__xor__.Tensor,
    aten.__and__.Scalar, aten.__or__.Scalar, aten.__xor__.Scalar, aten.zeros.default,
    aten.ones.default, aten.empty.memory_format, aten.view.default, aten.unsqueeze.default,
}  # fmt: skip


# Of two masks: what it says in other words.
_OF_BOOL = {
    aten.mul.Tensor: aten.bitwise_and.Tensor,
    aten.minimum.default: aten.bitwise_and.Tensor,
    aten.add.Tensor: aten.bitwise_or.Tensor,
    aten.maximum.default: aten.bitwise_or.Tensor,
}


class NotPointwise(Exception):
    """Why a modification cannot be run on grids, in words for the user."""


def is_flex(node: Node) -> bool:
    return node.op == "call_function" and node.target is torch.ops.higher_order.flex_attention


def flex_arguments(node: Node) -> dict[str, Any]:
    return {**dict(zip(_ARGUMENTS, node.args, strict=False)), **node.kwargs}


def recorded(context: Context, node: Node) -> tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]:
    """A function of tensors that computes what the call does, and the nodes that are its arguments."""
    given = flex_arguments(node)
    score_mod = _graph(context, given["score_mod"])
    mask_mod = _graph(context, given["block_mask"][-1])
    score_buffers, mask_buffers = given.get("score_buffers", ()), given.get("mask_buffers", ())

    def dense(q: Tensor, k: Tensor, v: Tensor, scale: Any, more: Any, masks: Any) -> tuple[Tensor, Tensor, Tensor]:
        return _dense(q, k, v, scale, score_mod, more, mask_mod, masks)

    return dense, (given["query"], given["key"], given["value"], given["scale"], score_buffers, mask_buffers), {}


def why_left(context: Context, node: Node) -> str:
    """Why a call of flex_attention cannot be read at all; "" where it can."""
    given = flex_arguments(node)
    block_mask = given["block_mask"]
    block = next((x for x in reversed(block_mask[:-1]) if x is not None), 0)
    block = fake_of(block) if isinstance(block, Node) else block
    trivial = _is_constant_true(_graph(context, block_mask[-1]))
    if trivial and not (isinstance(block, int) and block > _WITHOUT_MASK) and not _one_block(block_mask):
        return "its BlockMask has blocks and no mask_mod, so that the blocks alone would be the mask"
    return ""


def _one_block(block_mask: tuple[Any, ...]) -> bool:
    """Whether all rows and keys are in one block, so that its blocks hide nothing."""
    indices = block_mask[3]
    fake = fake_of(indices) if isinstance(indices, Node) else indices
    return isinstance(fake, Tensor) and all(isinstance(n, int) and n == 1 for n in fake.shape[-2:])


def _graph(context: Context, attr: Any) -> GraphModule:
    found = attribute(context.gm, str(attr.target))
    assert isinstance(found, GraphModule)
    return found


def _is_constant_true(gm: GraphModule) -> bool:
    out = next(n for n in gm.graph.nodes if n.op == "output").args[0]
    name = str(getattr(out, "target", ""))
    return out is True or (isinstance(out, Node) and name.endswith("new_ones"))


def _dense(
    q: Tensor, k: Tensor, v: Tensor, scale: Any, score_mod: GraphModule, more: Any, mask_mod: GraphModule, masks: Any
) -> tuple[Tensor, Tensor, Tensor]:
    batch, heads, m, _ = q.shape
    k, v = (repeated(x, batch, heads) for x in (k, v))
    grid = [
        torch.arange(n, device=q.device).view([n if d == i else 1 for d in range(4)])
        for i, n in enumerate((batch, heads, m, k.shape[2]))
    ]
    scores = q @ k.mT * scale
    scores = _Grids("score_mod", score_mod, 5).run(scores, *grid, *more)
    if not _is_constant_true(mask_mod):
        visible = _Grids("mask_mod", mask_mod, 4).run(*grid, *masks)
        scores = torch.where(visible, scores, -math.inf)
    lse = torch.logsumexp(scores, -1) / math.log(2)
    return scores.softmax(-1) @ v.to(scores.dtype), lse, scores.amax(-1) / math.log(2)


def repeated(x: Tensor, batch: Any, heads: Any) -> Tensor:
    """Key or value with the query's batch and heads."""
    b, g, n, e = x.shape
    if b != batch:
        x = x.expand(batch, g, n, e)
    return x if g == heads else x[:, :, None].expand(batch, g, heads // g, n, e).reshape(batch, heads, n, e)


@dataclass
class _Part:
    """A captured tensor of which some dimensions are indexed already."""

    tensor: Tensor
    index: tuple[Any, ...]


class _Grids(torch.fx.Interpreter):
    """Runs a function of single numbers on grids of them: indexing takes one element for each place.

    What does not depend on its first `numbers` arguments, such as a sum of a captured tensor, is computed as it is.
    """

    def __init__(self, name: str, gm: GraphModule, numbers: int) -> None:
        super().__init__(gm)
        self.name = name
        placeholders = [n for n in gm.graph.nodes if n.op == "placeholder"]
        self.on_grid = set(placeholders[:numbers])

    def run_node(self, n: Node) -> Any:
        if n.op == "output" or not any(x in self.on_grid for x in n.all_input_nodes):
            return super().run_node(n)
        self.on_grid.add(n)
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        if n.op == "call_function" and n.target is operator.getitem:
            return self._take(args[0], args[1])
        if n.op == "call_function" and n.target in (aten.index, aten.index.Tensor):
            return self._take(args[0], tuple(args[1]))
        fake = fake_of(n)
        if isinstance(fake, Tensor) and fake.dim():
            raise NotPointwise(f"its {self.name} makes a tensor of shape {list(fake.shape)} for each score")
        if any(isinstance(x, _Part) for x in tree_leaves((args, kwargs))):
            raise NotPointwise(f"its {self.name} uses a part of a captured tensor as a whole")
        try:
            with _Pointwise():  # type: ignore[no-untyped-call]
                return getattr(self, n.op)(n.target, args, kwargs)
        except NotPointwise as why:
            raise NotPointwise(f"its {self.name} {why}") from None

    def _take(self, source: Tensor | _Part, index: Any) -> Any:
        source = _Part(source, ()) if isinstance(source, Tensor) else source
        index = index if isinstance(index, tuple) else (index,)
        if not all(isinstance(i, (int, torch.SymInt, Tensor)) and not isinstance(i, bool) for i in index):
            raise NotPointwise(f"its {self.name} takes a slice of a captured tensor")
        done = (*source.index, *index)
        if len(done) < source.tensor.dim():
            return _Part(source.tensor, done)
        tensor, rest = source.tensor, []
        for i in done:  # numbers first, for a number between tensors would move dimensions
            if isinstance(i, Tensor):
                rest.append(i)
            else:
                tensor = tensor.select(len(rest), i)
        if any(i.dtype == torch.bool for i in rest):
            raise NotPointwise(f"its {self.name} indexes a captured tensor by a mask")
        return aten.index.Tensor(tensor, rest) if rest else tensor


class _Pointwise(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Stops at operations that do not act on each place of a grid by itself."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _OF_BOOL and all(isinstance(x, Tensor) and x.dtype == torch.bool for x in args):
            return _OF_BOOL[func](*args)
        if func.namespace == "prim" or torch.Tag.pointwise in func.tags or func in _ALLOWED:
            return func(*args, **kwargs)
        if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"):
            with self:
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        raise NotPointwise(f"calls {func.overloadpacket}, which is more than a function of one score")

"""Calls of other packages that are attention as a whole: which they are, and how their arguments map.

Arguments are read by their names, so that one table serves the versions of a package; one that is not known here must
have its default. `Call` is what they mean, and `dense` computes it as the matcher reads it.
"""

from __future__ import annotations

import functools
import inspect
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import Node

from fx_passes.find.context import Context
from fx_passes.find.flex import is_flex, repeated
from fx_passes.find.relations import equal, relation
from fx_passes.ops.documents import ids_of_lengths

_FLASH = (
    "flash_attn_func", "flash_attn_qkvpacked_func", "flash_attn_kvpacked_func", "flash_attn_varlen_func",
    "flash_attn_varlen_qkvpacked_func", "flash_attn_varlen_kvpacked_func", "flash_attn_with_kvcache",
)  # fmt: skip
_XFORMERS = ("memory_efficient_attention",)
# What changes how a kernel works and not what it computes, and what `cu_seqlens` says already.
_WITHOUT_MEANING = {
    "deterministic", "num_splits", "pack_gqa", "sm_margin", "max_seqlen", "max_seqlen_q", "max_seqlen_k",
    "min_seqlen_k", "max_q", "max_k", "op", "scheduler_metadata", "disable_scheduler_metadata",
    "seqlen_k_per_split", "gather_bwd_recompute_p", "gather_bwd_token_chunk", "return_lse", "enable_gqa", "is_causal",
}  # fmt: skip
_MEANING = {
    "q", "k", "v", "qkv", "kv", "query", "key", "value", "softmax_scale", "scale", "causal", "window_size", "softcap",
    "alibi_slopes", "learnable_sink", "s_aux", "dropout_p", "p", "attn_bias", "cu_seqlens", "cu_seqlens_q",
    "cu_seqlens_k", "cu_seq_q", "cu_seq_k",
}  # fmt: skip
_CACHED = "reads a cache of keys, which has no gradient"
# Biases of xformers that carry nothing, and those of packed sequences.
_TRIANGULAR = {"LowerTriangularMask": False, "LowerTriangularFromBottomRightMask": True}
_PACKED = {"BlockDiagonalMask": False, "BlockDiagonalCausalMask": True}


VARLEN = "torch_attn._varlen_attn"


class NotTaken(Exception):
    """Why a call is left as it is, in words for the user."""


@dataclass(frozen=True)
class Call:
    """One call as an attention.

    Attributes:
        query: [B, H, M, D]; key [B, G, N, D]; value [B, G, N, E].
        scale: factor on the products; None is 1 / sqrt(D).
        left, right: a key may lie at most so many positions before or after its query; None is no bound.
        bottom_right: positions count from the last query and the last key.
        softcap: 0 is off.
        slopes: [H] or [B, H], of ALiBi: minus slope times distance is added to the logits.
        bias: float, broadcastable to [B, H, M, N].
        mask: bool, broadcastable to [B, H, M, N].
        sinks: [H], a logit without a value.
        query_ids, key_ids: [1, M] and [1, N], a query sees keys of its own number.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    scale: float | None = None
    left: int | None = None
    right: int | None = None
    bottom_right: bool = False
    softcap: float = 0.0
    slopes: Tensor | None = None
    bias: Tensor | None = None
    mask: Tensor | None = None
    sinks: Tensor | None = None
    dropout_p: float = 0.0
    query_ids: Tensor | None = None
    key_ids: Tensor | None = None

    def operands(self) -> list[Tensor]:
        """The tensors that may have a gradient."""
        found = (self.query, self.key, self.value, self.bias, self.slopes, self.sinks)
        return [x for x in found if x is not None]

    def alibi(self) -> Tensor | None:
        """The bias that slopes mean, [B or 1, H, M, N] in float32 or float64."""
        if self.slopes is None:
            return None
        i, j = self._places()
        slopes = self.slopes if self.slopes.dim() == 2 else self.slopes[None]
        return -slopes[:, :, None, None].to(torch.promote_types(self.query.dtype, torch.float32)) * (i - j).abs()

    def _places(self) -> tuple[Tensor, Tensor]:
        m, n = self.query.shape[2], self.key.shape[2]
        i = torch.arange(m, device=self.query.device)[:, None]
        return (i + (n - m) if self.bottom_right else i), torch.arange(n, device=self.query.device)[None]

    def visible(self) -> Iterator[Tensor]:
        """Bool masks that all must hold, broadcastable to [B, H, M, N]."""
        i, j = self._places()
        if self.right is not None:
            yield j - i <= self.right
        if self.left is not None:
            yield i - j <= self.left
        if self.query_ids is not None and self.key_ids is not None:
            yield self.query_ids[:, None, :, None] == self.key_ids[:, None, None, :]
        if self.mask is not None:
            yield self.mask


@dataclass(frozen=True)
class Known:
    """One function: the form that the report names, its parameters with their defaults, and what it returns.

    `function` is a copy of `original`, in whose place Dynamo and `sus_backward` put others.
    """

    form: str
    defaults: dict[str, Any]
    original: Callable[..., Any]
    function: Callable[..., Any]
    with_lse: bool = False


KNOWN: dict[str, Known] = {}


def copied(f: Any) -> Callable[..., Any]:
    """The same function as another object: Dynamo and `sus_backward` put theirs in place of the one that users hold."""
    import types

    if not isinstance(f, types.FunctionType):
        return f  # type: ignore[no-any-return]
    copy = types.FunctionType(f.__code__, f.__globals__, f.__name__, f.__defaults__, f.__closure__)
    copy.__kwdefaults__ = f.__kwdefaults__
    return copy


def loaded() -> Iterator[tuple[str, Callable[..., Any]]]:
    """Functions of the table in modules that are loaded; nothing is imported."""
    for name, module in list(sys.modules.items()):
        wanted = _FLASH if "flash_attn" in name else _XFORMERS if name.startswith("xformers.ops") else ()
        for function in wanted:
            found = getattr(module, function, None) if module is not None else None
            if inspect.isfunction(found):
                yield f"{found.__module__}.{found.__name__}", found


def know(key: str, function: Callable[..., Any]) -> Known:
    """The entry of a function, made when it is first seen."""
    if key not in KNOWN or KNOWN[key].original is not function:
        defaults = {p.name: p.default for p in inspect.signature(function).parameters.values()}
        form = "xformers" if "xformers" in key else "flash varlen" if "varlen" in key else "flash"
        pair = "flash_attn.cute" in key or ("flash_attn_interface" in key and "return_attn_probs" not in defaults)
        KNOWN[key] = Known(form, defaults, function, copied(function), pair)
    return KNOWN[key]


def why_not(key: str, given: dict[str, Any]) -> str:
    """Why a call's arguments are none that can be rewritten; "" where they are. Dynamo traces it."""
    if key.endswith("with_kvcache"):
        return _CACHED
    if given.get("block_table") is not None or given.get("page_table") is not None:
        return "its keys are pages of a cache (block_table)"
    defaults = KNOWN[key].defaults
    for name, value in given.items():
        if name in _WITHOUT_MEANING or name in _MEANING or value is None or value is False:
            continue
        default = defaults.get(name)
        if not isinstance(value, (int, float, str)) or not isinstance(default, (int, float, str)) or value != default:
            return f"its argument {name} is not understood"
    bias = given.get("attn_bias")
    if bias is not None and not isinstance(bias, Tensor):
        kind = bias if isinstance(bias, str) else type(bias).__name__
        if kind not in _TRIANGULAR and kind not in _PACKED:
            return f"its bias {kind} is not understood"
    return ""


def flat(given: dict[str, Any]) -> dict[str, Any]:
    """Arguments of xformers without objects: a bias as its name, with the tensors that it carries. Dynamo traces it."""
    bias = given.get("attn_bias")
    if bias is None or isinstance(bias, (Tensor, str)):
        return given
    kind = type(bias).__name__
    given = {**given, "attn_bias": kind}
    if kind in _PACKED:
        given["cu_seqlens_q"], given["cu_seqlens_k"] = bias.q_seqinfo.seqstart, bias.k_seqinfo.seqstart
    return given


def call_known(key: str, /, **given: Any) -> Any:
    """A call of the table as one node of a graph."""
    bias = given.get("attn_bias")
    if isinstance(bias, str) or any(isinstance(x, FakeTensor) for x in given.values()):
        return dense_of(key, given)
    return KNOWN[key].function(**given)


def call_left(x: Tensor, key: str, reason: str, /) -> Tensor:
    """Stands before a call that is left, so that the report can say why."""
    return x


def is_call(node: Node) -> bool:
    """Whether a node is attention as a whole."""
    return is_flex(node) or key_of(node) is not None


def key_of(node: Node) -> str | None:
    """The entry of the table that a node calls."""
    if node.op != "call_function":
        return None
    if node.target is call_known:
        return str(node.args[0])
    return VARLEN if is_varlen(node.target) else None


def is_varlen(function: Any) -> bool:
    """Whether a function is the operator behind torch's varlen_attn."""
    return isinstance(function, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)) and str(function) in (
        VARLEN,
        f"{VARLEN}.default",
    )


def form_of(node: Node) -> str:
    if is_flex(node):
        return "flex"
    key = str(node.args[1]) if node.target is call_left else key_of(node)
    return "varlen" if key == VARLEN else KNOWN[key].form if key in KNOWN else ""


def arguments_of(node: Node) -> dict[str, Any]:
    """Arguments by name, as nodes."""
    if node.target is call_known:
        return dict(node.kwargs)
    return varlen_arguments(node.args, node.kwargs)


def varlen_arguments(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    return {**dict(zip(_varlen_names(), args, strict=False)), **kwargs}


@functools.cache
def _varlen_names() -> tuple[str, ...]:
    import torch.nn.attention.varlen

    return tuple(a.name for a in torch.ops.torch_attn._varlen_attn.default._schema.arguments)


def recorded(context: Context, node: Node) -> tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]:
    """A function that computes what a node does from tensors, and the nodes that are its arguments."""
    key = key_of(node)
    assert key is not None
    given = arguments_of(node)
    for queries, keys in (("cu_seqlens_q", "cu_seqlens_k"), ("cu_seq_q", "cu_seq_k")):
        a, b = given.get(queries), given.get(keys)
        if isinstance(a, Node) and isinstance(b, Node) and a is not b:
            found = relation(context, (a, b), equal)
            if found is not None:  # two copies of the same lengths
                context.relations[node] = found
                given[keys] = a
    return lambda **given: dense_of(key, given), (), given


def dense_of(key: str, given: dict[str, Any]) -> Any:
    """What a call of the table computes, M x N, in the layout in which it returns it."""
    call, back = read(key, given)
    out, lse = dense(call)
    return result(key, back(out), lse)


def result(key: str, out: Tensor, lse: Tensor) -> Any:
    """What a call of the table returns."""
    if key == VARLEN:
        return out, lse[0], out.new_zeros((2,), dtype=torch.uint64)
    return (out, lse) if KNOWN[key].with_lse else out


def read(key: str, given: dict[str, Any]) -> tuple[Call, Callable[[Tensor], Tensor]]:
    """A call's meaning, and what brings [B, H, M, E] to the layout of its result."""
    given = flat(given)
    reason = why_not(key, given) if key in KNOWN else _why_not_varlen(given)
    if reason:
        raise NotTaken(reason)
    query, key_, value = _operands(given)
    lengths = given.get("cu_seqlens_q"), given.get("cu_seqlens_k")
    if given.get("cu_seqlens") is not None:
        lengths = (given["cu_seqlens"],) * 2
    if given.get("cu_seq_q") is not None:
        lengths = given["cu_seq_q"], given["cu_seq_q"] if given.get("cu_seq_k") is None else given["cu_seq_k"]
    if isinstance(given.get("attn_bias"), str) or (key in KNOWN and KNOWN[key].form == "xformers"):
        call, back = _xformers(query, key_, value, given)
    else:
        call, back = _flash(query, key_, value, given, lengths[0] is not None)
    if lengths[0] is not None and lengths[1] is not None:
        call = _in_documents(call, lengths[0], lengths[1])
    return call, back


def _operands(given: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    if given.get("qkv") is not None:
        return tuple(given["qkv"].select(-3, i) for i in range(3))
    if given.get("kv") is not None:
        return given["q"], given["kv"].select(-3, 0), given["kv"].select(-3, 1)
    names = ("q", "k", "v") if given.get("q") is not None else ("query", "key", "value")
    return tuple(given[name] for name in names)


def _why_not_varlen(given: dict[str, Any]) -> str:
    if given.get("seqused_k") is not None or given.get("block_table") is not None:
        return "its keys are a cache (seqused_k, block_table)"
    return ""


def _bound(x: Any) -> int | None:
    """A window's bound. A symbolic one is fixed: another window is another graph."""
    return None if x is None or x < 0 else int(x)


def _flash(
    query: Tensor, key: Tensor, value: Tensor, given: dict[str, Any], packed: bool
) -> tuple[Call, Callable[[Tensor], Tensor]]:
    """[B, M, H, D], or packed [T, H, D]; bands from the bottom right corner, as flash-attn has them."""
    window = given.get("window_size") or (None, None)
    left, right = (_bound(x) for x in window)
    if given.get("causal") or given.get("is_causal"):
        right = 0
    if query.dim() == 3:
        query, key, value = (x.transpose(0, 1)[None] for x in (query, key, value))
        back = lambda out: out[0].transpose(0, 1)  # noqa: E731
    else:
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        back = lambda out: out.transpose(1, 2)  # noqa: E731
    scale = given.get("softmax_scale")
    sinks = given.get("learnable_sink")
    call = Call(
        query, key, value,
        scale=given.get("scale") if scale is None else scale,
        left=left, right=right, bottom_right=not packed,
        softcap=float(given.get("softcap") or 0.0), slopes=given.get("alibi_slopes"),
        sinks=given.get("s_aux") if sinks is None else sinks, dropout_p=float(given.get("dropout_p") or 0.0),
    )  # fmt: skip
    return call, back


def _xformers(
    query: Tensor, key: Tensor, value: Tensor, given: dict[str, Any]
) -> tuple[Call, Callable[[Tensor], Tensor]]:
    """[B, M, K], [B, M, H, K] or [B, M, G, H, K]."""
    shape = query.shape
    if query.dim() == 3:
        query, key, value = (x[:, :, None] for x in (query, key, value))
    elif query.dim() == 5:
        query, key, value = (x.flatten(2, 3) for x in (query, key, value))
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    bias = given.get("attn_bias")
    call = Call(query, key, value, scale=given.get("scale"), dropout_p=float(given.get("p") or 0.0))
    if isinstance(bias, str):
        causal = bias in _TRIANGULAR or _PACKED[bias]
        call = replace(call, right=0 if causal else None, bottom_right=_TRIANGULAR.get(bias, False))
    elif bias is not None:
        call = replace(call, bias=bias.flatten(1, 2) if bias.dim() == 5 else bias[:, None] if bias.dim() == 3 else bias)
    return call, lambda out: out.transpose(1, 2).reshape(*shape[:-1], out.shape[-1])


def _in_documents(call: Call, queries: Tensor, keys: Tensor) -> Call:
    """With the ends of documents, one after the other in a single sequence.

    Where queries and keys have the same ends, a band within each document is one of the whole sequence.
    """
    query_ids = ids_of_lengths(queries, call.query.shape[2])
    key_ids = query_ids if keys is queries else ids_of_lengths(keys, call.key.shape[2])
    if call.slopes is not None and keys is not queries:
        raise NotTaken("has ALiBi slopes and other lengths of queries than of keys")
    call = replace(call, query_ids=query_ids, key_ids=key_ids, bottom_right=False)
    if keys is queries or (call.left is None and call.right is None):
        return call
    # Places count from the end of each document: a mask over queries and keys.
    i = torch.arange(call.query.shape[2], device=queries.device) - queries[1:].long().take(
        query_ids[0].clamp(max=queries.shape[0] - 2)
    )
    j = torch.arange(call.key.shape[2], device=keys.device) - keys[1:].long().take(
        key_ids[0].clamp(max=keys.shape[0] - 2)
    )
    distance = j[None] - i[:, None]
    mask = distance == distance
    if call.right is not None:
        mask = mask & (distance <= call.right)
    if call.left is not None:
        mask = mask & (-distance <= call.left)
    return replace(call, left=None, right=None, mask=mask)


def dense(call: Call) -> tuple[Tensor, Tensor]:
    """Out [B, H, M, E] and logsumexp [B, H, M]."""
    q, k, v = call.query, call.key, call.value
    k, v = (repeated(x, q.shape[0], q.shape[1]) for x in (k, v))
    scores = q @ k.mT * (q.shape[-1] ** -0.5 if call.scale is None else call.scale)
    if call.softcap:
        scores = torch.tanh(scores / call.softcap) * call.softcap
    for bias in (call.alibi(), call.bias):
        scores = scores if bias is None else scores + bias
    for mask in call.visible():
        scores = torch.where(mask, scores, -math.inf)
    lse = torch.logsumexp(scores, -1)
    if call.sinks is not None:
        column = call.sinks.to(scores.dtype)[None, :, None, None].expand(*scores.shape[:-1], 1)
        probs = torch.cat([scores, column], -1).softmax(-1)[..., :-1]
    else:
        probs = scores.softmax(-1)
    if call.dropout_p:
        probs = torch.nn.functional.dropout(probs, call.dropout_p)
    return probs.to(v.dtype) @ v, lse

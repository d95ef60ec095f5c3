"""Functions of other packages that are attention as a whole: their names, and what their arguments mean.

Arguments are read by their names, so that one reading serves the versions of a package; one that is not known here must
have its default.
"""

from __future__ import annotations

import dis
import inspect
import itertools
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fx_passes.find.attention_call import Call, NotTaken, in_documents
from fx_passes.ops.documents import WrongEnds, check_ends
from fx_passes.torch_compat import signature

FLEX = "torch.nn.attention.flex_attention.flex_attention"
VARLEN = "torch_attn._varlen_attn"
Given = dict[str, Any]
Reading = tuple[Call, Callable[[Tensor, Tensor], Any]]

_FLASH = (
    "flash_attn_func", "flash_attn_qkvpacked_func", "flash_attn_kvpacked_func", "flash_attn_varlen_func",
    "flash_attn_varlen_qkvpacked_func", "flash_attn_varlen_kvpacked_func", "flash_attn_with_kvcache",
)  # fmt: skip
_XFORMERS = ("memory_efficient_attention",)  # of xformers, which since 0.0.36 has it from the package mslk
# What changes how a kernel works and not what it computes, and what `cu_seqlens` says already.
_WITHOUT_MEANING = {
    "deterministic", "num_splits", "pack_gqa", "gqa_parallel", "sm_margin", "max_seqlen", "max_seqlen_q",
    "max_seqlen_k", "min_seqlen_k", "max_q", "max_k", "op", "scheduler_metadata", "disable_scheduler_metadata",
    "seqlen_k_per_split", "gather_bwd_recompute_p", "gather_bwd_token_chunk", "return_lse", "enable_gqa", "is_causal",
}  # fmt: skip
_MEANING = {
    "q", "k", "v", "qkv", "kv", "query", "key", "value", "softmax_scale", "scale", "causal", "window_size", "softcap",
    "alibi_slopes", "learnable_sink", "s_aux", "dropout_p", "p", "attn_bias", "tensor_bias", "cu_seqlens",
    "cu_seqlens_q", "cu_seqlens_k", "cu_seq_q", "cu_seq_k",
}  # fmt: skip
# The ends of documents, queries first, and of which operand.
_ENDS = {"cu_seqlens": 0, "cu_seqlens_q": 0, "cu_seq_q": 0, "cu_seqlens_k": 1, "cu_seq_k": 1}
# Biases of xformers: whether they are causal, count from the end of a sequence, and belong to packed sequences.
_BIASES = {
    "LowerTriangularMask": (True, False, False),
    "LowerTriangularMaskWithTensorBias": (True, False, False),
    "LowerTriangularFromBottomRightMask": (True, True, False),
    "LowerTriangularFromBottomRightLocalAttentionMask": (True, True, False),
    "LocalAttentionFromBottomRightMask": (False, True, False),
    "BlockDiagonalMask": (False, False, True),
    "BlockDiagonalCausalMask": (True, False, True),
    "BlockDiagonalCausalFromBottomRightMask": (True, True, True),
    "BlockDiagonalCausalLocalAttentionMask": (True, False, True),
    "BlockDiagonalCausalLocalAttentionFromBottomRightMask": (True, True, True),
}


@dataclass(frozen=True)
class Function:
    """One function.

    Attributes:
        form: how the report names it.
        defaults: of its parameters, by name.
        read: what arguments mean, and what makes its result of out [B, H, M, E] and logsumexp [B, H, M].
    """

    form: str
    defaults: Given
    read: Callable[[Given], Reading]


def loaded() -> Iterator[tuple[str, Callable[..., Any]]]:
    """Functions that are known, of modules that are loaded; nothing is imported."""
    for name, module in list(sys.modules.items()):
        xformers = name.startswith(("xformers.ops", "mslk.attention"))
        for wanted in _FLASH if "flash_attn" in name else _XFORMERS if xformers else ():
            found = getattr(module, wanted, None) if module is not None else None
            if inspect.isfunction(found):
                yield f"{found.__module__}.{found.__name__}", found


def function_of(key: str, function: Any) -> Function:
    """What is known of a function by its module and name."""
    name = key.rpartition(".")[2]
    if key == FLEX:
        return Function("flex", {}, _of_flex)
    if key == VARLEN:
        arguments = function.default._schema.arguments
        return Function("varlen", {a.name: a.default_value for a in arguments}, varlen)
    defaults = {p.name: p.default for p in signature(function).parameters.values()}
    if name in _XFORMERS:
        return Function("xformers", defaults, xformers)
    pair, newest = returns_logsumexp(function, defaults), defaults.get("window_size") == (None, None)
    form = "flash varlen" if "varlen" in name else "flash"
    return Function(form, defaults, lambda given: flash(given, pair, newest))


def _of_flex(given: Given) -> Reading:
    raise NotTaken("flex_attention is read from a graph")


def returns_logsumexp(function: Any, defaults: Given) -> bool:
    """Whether a function of flash-attn returns the logsumexp too, without being asked by `return_attn_probs`.

    That of flash-attn 4 always does. That of flash-attn 3 did until July 2025, which its parameters do not tell.
    """
    if "return_attn_probs" in defaults or defaults.get("window_size") == (None, None):
        return "return_attn_probs" not in defaults
    around = [function.__globals__.get(name) for name in function.__code__.co_names]
    inner = [vars(x)["forward"].__func__ for x in around if isinstance(x, type) and "forward" in vars(x)]
    return any(_ends_with_a_tuple(f) for f in (function, *inner))


def _ends_with_a_tuple(function: Any) -> bool:
    steps = [step.opname for step in dis.get_instructions(function)]
    return any(a == "BUILD_TUPLE" and b == "RETURN_VALUE" for a, b in itertools.pairwise(steps))


def why_not(key: str, defaults: Given, given: Given) -> str:
    """Why arguments are none that can be rewritten; "" where they are. Dynamo traces it."""
    if key.endswith("with_kvcache"):
        return "reads a cache of keys, which has no gradient"
    if given.get("block_table") is not None or given.get("page_table") is not None:
        return "its keys are pages of a cache (block_table)"
    for name, value in given.items():
        if name in _WITHOUT_MEANING or name in _MEANING or value is None or value is False:
            continue
        default = defaults.get(name)
        if not isinstance(value, (int, float, str)) or not isinstance(default, (int, float, str)) or value != default:
            return f"its argument {name} is not understood"
    bias = given.get("attn_bias")
    kind = bias if isinstance(bias, str) else type(bias).__name__
    # Biases of xformers before 0.0.31 are tensors; that with a tensor is another one there.
    known = kind in _BIASES and not (kind.endswith("TensorBias") and isinstance(bias, Tensor))
    if bias is not None and not known and (not isinstance(bias, Tensor) or hasattr(bias, "materialize")):
        return f"its bias {kind} is not understood"
    if (given.get("cu_seqlens_q") is None) != (given.get("cu_seqlens_k") is None):
        return "only one of cu_seqlens_q and cu_seqlens_k is given"
    if defaults.get("window_size") == (None, None) and any(x is not None and x < 0 for x in _window(given, True)):
        return "its window_size has a bound below 0"
    return ""


def flat(given: Given) -> Given:
    """Arguments of xformers without objects: a bias as its name, with what it carries. Dynamo traces it."""
    bias: Any = given.get("attn_bias")
    kind = type(bias).__name__
    if kind not in _BIASES:
        return given
    given = {**given, "attn_bias": kind}
    if kind == "LocalAttentionFromBottomRightMask":
        given["window_size"] = (bias.window_left, bias.window_right)
    elif "LocalAttention" in kind:
        given["window_size"] = (bias._window_size - 1, 0)
    elif kind == "LowerTriangularMaskWithTensorBias":
        given["tensor_bias"] = bias._bias
    if kind.startswith("BlockDiagonal"):
        given["cu_seqlens_q"], given["cu_seqlens_k"] = bias.q_seqinfo.seqstart, bias.k_seqinfo.seqstart
    return given


def _operands(given: Given) -> tuple[Tensor, Tensor, Tensor]:
    if given.get("qkv") is not None:
        return tuple(given["qkv"].select(-3, i) for i in range(3))
    if given.get("kv") is not None:
        return given["q"], given["kv"].select(-3, 0), given["kv"].select(-3, 1)
    names = ("q", "k", "v") if given.get("q") is not None else ("query", "key", "value")
    return tuple(given[name] for name in names)


def _ends(given: Given) -> tuple[Tensor, Tensor] | None:
    """The documents' ends of queries and of keys."""
    if given.get("cu_seqlens") is not None:
        return given["cu_seqlens"], given["cu_seqlens"]
    queries, keys = given.get("cu_seqlens_q", given.get("cu_seq_q")), given.get("cu_seqlens_k", given.get("cu_seq_k"))
    return None if queries is None else (queries, queries if keys is None else keys)


def check_ends_of(given: Given) -> Given:
    """Arguments of flash-attn or varlen_attn with checked ends of documents.

    Raises:
        WrongEnds: one of them is none; the message names it.
    """
    names = [name for name in _ENDS if given.get(name) is not None]
    if not names or _operands(given)[0].dim() != 3:
        return given
    checked: dict[int, Tensor] = {}
    for name in names:
        ends, rows = given[name], _operands(given)[_ENDS[name]].shape[0]
        if id(ends) not in checked:
            checked[id(ends)] = check_ends(name, ends, rows)
        given = {**given, name: checked[id(ends)]}
    queries, *keys = (given[name] for name in names)
    if keys and queries.shape != keys[0].shape:
        raise WrongEnds(
            f"{names[1]} must have as many documents as {names[0]}, but their shapes are {tuple(keys[0].shape)} and "
            f"{tuple(queries.shape)}"
        )
    return given


def _window(given: Given, newest: bool) -> tuple[int | None, int | None]:
    """Bounds of the band. A symbolic one is fixed: another window is another graph.

    Below 0 is no bound; with `newest`, as flash-attn 4 has it, None is, and two bounds whose sum is below 0 are none.
    """
    left, right = given.get("window_size") or (None, None)
    if given.get("causal"):
        right = 0
    if newest:
        if left is not None and right is not None and left + right < 0:
            left, right = None, 0 if given.get("causal") else None
        return left if left is None else int(left), right if right is None else int(right)
    return None if left is None or left < 0 else int(left), None if right is None or right < 0 else int(right)


def flash(given: Given, pair: bool = False, newest: bool = False) -> Reading:
    """flash-attn: [B, M, H, D], or packed [T, H, D]; bands from the bottom right corner."""
    given = check_ends_of(given)
    query, key, value = (_four(x) for x in _operands(given))
    left, right = _window(given, newest)
    scale, sinks = given.get("softmax_scale"), given.get("learnable_sink")
    call = Call(
        query, key, value,
        scale=given.get("scale") if scale is None else scale,
        left=left, right=right, bottom_right=True,
        softcap=float(given.get("softcap") or 0.0), slopes=given.get("alibi_slopes"),
        sinks=given.get("s_aux") if sinks is None else sinks, dropout_p=float(given.get("dropout_p") or 0.0),
    )  # fmt: skip
    ends, packed = _ends(given), _operands(given)[0].dim() == 3
    call, back = (call, lambda x: x) if ends is None else in_documents(call, *ends)

    def result(out: Tensor, lse: Tensor) -> Any:
        out = back(out).transpose(1, 2)
        out = out[0] if packed else out
        return (out, back(lse)[0] if packed else back(lse)) if pair else out

    return call, result


def _four(x: Tensor) -> Tensor:
    """[B, M, H, D], or packed [T, H, D], as [B, H, M, D]."""
    return (x[None] if x.dim() == 3 else x).transpose(1, 2)


def varlen(given: Given) -> Reading:
    """torch's varlen_attn, the operator: as flash-attn's, and with a third result."""
    causal = bool(given.get("is_causal"))
    call, result = flash({**given, "causal": causal}, True)
    return call, lambda out, lse: (*result(out, lse), out.new_zeros((2,), dtype=torch.uint64))


def xformers(given: Given) -> Reading:
    """[B, M, K], [B, M, H, K] or [B, M, G, H, K]; bands from the top left corner but where a bias says otherwise."""
    given = flat(given)
    query, key, value = _operands(given)
    shape, bias = query.shape, given.get("attn_bias")
    if query.dim() == 3:
        query, key, value = (x[:, :, None] for x in (query, key, value))
    elif query.dim() == 5:
        query, key, value = (x.flatten(2, 3) for x in (query, key, value))
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    call = Call(query, key, value, scale=given.get("scale"), dropout_p=float(given.get("p") or 0.0))
    back: Callable[[Tensor], Tensor] = lambda x: x  # noqa: E731
    if isinstance(bias, str):
        causal, from_end, packed = _BIASES[bias]
        left, right = given.get("window_size") or (None, None)
        bias = given.get("tensor_bias")
        call = replace(call, left=left, right=0 if causal else right, bottom_right=from_end)
        if packed:
            call, back = in_documents(call, given["cu_seqlens_q"], given["cu_seqlens_k"])
    if bias is not None:
        call = replace(call, bias=bias.flatten(1, 2) if bias.dim() == 5 else bias[:, None] if bias.dim() == 3 else bias)
    return call, lambda out, _: back(out).transpose(1, 2).reshape(*shape[:-1], out.shape[-1])

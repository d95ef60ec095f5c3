"""Calls of other packages that are attention as a whole, as nodes of a graph, and how each is recorded.

What their arguments mean is in `packages`, what they compute in `attention_call`.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.fx import Node

from fx_passes.find import packages
from fx_passes.find.attention_call import Call, NotTaken, dense
from fx_passes.find.context import Context
from fx_passes.find.flex import is_flex
from fx_passes.find.packages import FLEX, VARLEN, Function, flat, loaded
from fx_passes.find.relations import equal, relation

__all__ = ["FLEX", "VARLEN", "Call", "NotTaken", "flat", "loaded"]


@dataclass(frozen=True)
class Known:
    """One function that was seen.

    `function` is a copy of `original`, in whose place Dynamo and `sus_backward` put others.
    """

    about: Function
    original: Callable[..., Any]
    function: Callable[..., Any]


KNOWN: dict[str, Known] = {}


def copied(f: Any) -> Callable[..., Any]:
    """The same function as another object: Dynamo and `sus_backward` put theirs in place of the one that users hold."""
    if not isinstance(f, types.FunctionType):
        return f  # type: ignore[no-any-return]
    copy = types.FunctionType(f.__code__, f.__globals__, f.__name__, f.__defaults__, f.__closure__)
    copy.__kwdefaults__ = f.__kwdefaults__
    return copy


def know(key: str, function: Callable[..., Any]) -> Known:
    """The entry of a function, made when it is first seen."""
    if key not in KNOWN or KNOWN[key].original is not function:
        KNOWN[key] = Known(packages.function_of(key, function), function, copied(function))
    return KNOWN[key]


def _known(key: str) -> Known:
    if key == VARLEN and key not in KNOWN:
        import torch.nn.attention.varlen  # registers the operator

        know(key, torch.ops.torch_attn._varlen_attn)
    return KNOWN[key]


def why_not(key: str, given: dict[str, Any]) -> str:
    """Why a call's arguments are none that can be rewritten; "" where they are. Dynamo traces it."""
    return packages.why_not(key, KNOWN[key].about.defaults, given)


def call_known(key: str, /, **given: Any) -> Any:
    """A call of the table as one node of a graph. Where it stays one, it runs the function, if that can be."""
    if isinstance(given.get("attn_bias"), str) or any(isinstance(x, FakeTensor) for x in given.values()):
        return dense_of(key, given)
    try:
        return KNOWN[key].function(**given)
    except Exception:
        if not any(isinstance(x, FunctionalTensor) for x in given.values()):
            raise
        return dense_of(key, given)  # AOTAutograd traces it, and not all of these functions can be traced


def call_left(x: Tensor, key: str, reason: str, /, **given: Any) -> Any:
    """A call that is left, as one node, so that the report can say why and nothing inside of it is looked at.

    Without arguments it stands before a call that cannot be a node. A function that cannot run without data breaks the
    graph, as it does where nothing is rewritten.
    """
    if not given:
        return x
    try:
        return KNOWN[key].function(**given)
    except Exception:
        if isinstance(x, FakeTensor):
            from fx_passes.find.dynamo_patches import report_left

            report_left(form_of_key(key), reason)
        raise


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
    """How the report names a call that is attention as a whole; "" where the node is none."""
    if is_flex(node):
        return "flex"
    key = str(node.args[1]) if node.target is call_left else key_of(node)
    return "" if key is None else form_of_key(key)


def form_of_key(key: str) -> str:
    return _known(key).about.form


def arguments_of(node: Node) -> dict[str, Any]:
    """Arguments by name, as nodes."""
    if node.target is call_known:
        return dict(node.kwargs)
    return varlen_arguments(node.args, node.kwargs)


def varlen_arguments(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    return {**dict(zip(_known(VARLEN).about.defaults, args, strict=False)), **kwargs}


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
    call, result = read(key, given)
    return result(*dense(call))


def read(key: str, given: dict[str, Any]) -> tuple[Call, Callable[[Tensor, Tensor], Any]]:
    """What a call means, and what makes its result of out [B, H, M, E] and the logsumexp [B, H, M].

    Raises:
        NotTaken: it is not understood.
    """
    about = _known(key).about
    reason = packages.why_not(key, about.defaults, given)
    if reason:
        raise NotTaken(reason)
    return about.read(given)

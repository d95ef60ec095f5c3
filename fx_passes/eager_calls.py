"""Attention calls of other packages and flex_attention inside of `sus_backward`, in eager code.

They are no torch functions, which a mode would see, and users hold them by name, as after an import of
`flash_attn_func`. So the code of the function itself is exchanged while any thread is inside of a block. The new code
asks whether the thread that calls is inside of one, and runs the old code where it is not. The last thread that leaves
puts the old code back.
"""

from __future__ import annotations

import inspect
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from types import CodeType, FunctionType
from typing import Any

import torch
from torch import Tensor, overrides

from fx_passes import recompute
from fx_passes.find import calls
from fx_passes.find.calls import FLEX
from fx_passes.find.dynamo_patches import mend_graph_breaks
from fx_passes.ops.documents import WrongEnds
from fx_passes.ops.functional import attend
from fx_passes.ops.transforms import transform
from fx_passes.torch_compat import signature

_NAME = "__sus_dispatch"
_lock = threading.Lock()
_users: Counter[int] = Counter()  # blocks, by thread
_exchanged: dict[str, tuple[FunctionType, CodeType]] = {}


class NoGradient(calls.NotTaken):
    """No gradient is wanted."""


def enter() -> None:
    """From now on known calls of this thread go to the `sus_backward` in force, whose `call` may raise NotTaken."""
    with _lock:
        _users[threading.get_ident()] += 1
        for key, function in _functions():
            if key not in _exchanged and _exchangeable(function.__code__):
                calls.know(key, function)
                _exchanged[key] = function, function.__code__
                function.__code__ = _asking(key, function)


def leave() -> None:
    with _lock:
        _users[threading.get_ident()] -= 1
        _put_back_if_unused()


def _put_back_if_unused() -> None:
    if not any(_users.values()):
        _users.clear()
        for function, code in _exchanged.values():
            function.__code__ = code
        _exchanged.clear()


def _in_child() -> None:
    """The thread that forked is the only one left: blocks of others are over, and nobody releases their lock."""
    global _lock
    _lock = threading.Lock()
    mine = _users[threading.get_ident()]
    _users.clear()
    _users[threading.get_ident()] = mine
    _put_back_if_unused()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_child)


def _functions() -> Iterator[tuple[str, FunctionType]]:
    from torch.nn.attention import flex_attention

    yield FLEX, flex_attention.flex_attention  # type: ignore[misc]
    yield from calls.loaded()  # type: ignore[misc]


def _exchangeable(code: CodeType) -> bool:
    return not code.co_posonlyargcount and not code.co_flags & inspect.CO_VARARGS


def _asking(key: str, function: FunctionType) -> CodeType:
    """Code with the function's parameters that hands them to `dispatch`. It runs with the function's globals."""
    function.__globals__[_NAME] = dispatch  # it stays: a thread may be about to call it
    whole, empty = signature(function), inspect.Parameter.empty
    parameters = [p.replace(default=empty, annotation=empty) for p in whole.parameters.values()]
    named = whole.replace(parameters=parameters, return_annotation=empty)
    given = ", ".join(f"**{p.name}" if p.kind is p.VAR_KEYWORD else f"{p.name}={p.name}" for p in parameters)
    names: dict[str, Any] = {}
    exec(f"def asks{named}:\n    return {_NAME}({key!r}, {given})", names)
    code: CodeType = names["asks"].__code__
    return code.replace(co_freevars=function.__code__.co_freevars)  # a function and its code must have as many


def dispatch(key: str, /, **given: Any) -> Any:
    """A call of an exchanged function."""
    function = calls.KNOWN[key].function
    if torch.compiler.is_dynamo_compiling():  # the graph's backend may rewrite it
        return function(**given)
    block = recompute.in_force()
    if block is None or not torch.is_grad_enabled():
        return function(**given)
    try:
        return block.call(key, given)
    except calls.NotTaken:
        return function(**given)


def attend_call(call: calls.Call, c: Tensor, seed: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """Out [B, H, M, E] and logsumexp of a call of the table."""
    bias = call.alibi()
    if call.bias is not None:
        bias = call.bias if bias is None else bias + call.bias
    result: tuple[Tensor, Tensor] = attend(
        call.query,
        call.key,
        call.value,
        c,
        seed,
        attn_bias=bias,
        sinks=call.sinks,
        query_ids=call.query_ids,
        key_ids=call.key_ids,
        scale=None if call.scale is None else float(call.scale),
        left=call.left,
        right=call.right,
        bottom_right=call.bottom_right,
        softcap=call.softcap,
        dropout_p=call.dropout_p,
        return_lse=True,
        **options,
    )
    return result


def handle(key: str, given: dict[str, Any], attention: Callable[[calls.Call, str], tuple[Tensor, Tensor]]) -> Any:
    """The result of a call of the table, whose attention is computed by `attention`, which is told the form too."""
    try:
        call, result = calls.read(key, given)
    except (calls.NotTaken, recompute.Stop, WrongEnds):
        raise
    except Exception as error:  # which the function itself says better
        raise calls.NotTaken("wrong arguments") from error
    if not any(x.requires_grad for x in call.operands()):
        raise NoGradient
    return result(*attention(call, calls.form_of_key(key)))


def compiled_flex(backend: Any) -> Callable[..., Any]:
    """flex_attention, compiled with a backend that rewrites it."""
    mend_graph_breaks()
    compiled = torch.compile(calls.KNOWN[FLEX].function, backend=backend, fullgraph=True)

    def flex(**given: Any) -> Any:
        tensors = [x for x in given.values() if isinstance(x, Tensor)]
        if not any(x.requires_grad for x in tensors):
            raise NoGradient
        around = transform(*tensors)
        if around is not None:
            raise calls.NotTaken(around)
        with ExitStack() as without_modes:
            for _ in range(torch._C._len_torch_function_stack()):
                without_modes.enter_context(overrides._pop_mode_temporarily())
            try:
                return compiled(**given)
            except recompute.Stop:
                raise
            except Exception as error:  # what Dynamo cannot trace
                raise calls.NotTaken(f"it cannot be traced ({type(error).__name__})") from error

    return flex

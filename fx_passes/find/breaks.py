"""Graph breaks inside of torch itself that would hide attention, and what Dynamo traces in their place.

nn.TransformerEncoder and nn.TransformerDecoder look at the values of a mask to learn whether it is causal, as a hint
for faster kernels. That breaks the graph, and Dynamo then skips all of their layers, for their code belongs to
torch.nn. The hint changes no result, so that under Dynamo it is given only where the caller has given it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules import transformer

from fx_passes.find import calls


@cache
def mend_graph_breaks() -> None:
    """Registers the substitutes with Dynamo, once in a process; eager code is not touched."""
    original = getattr(transformer, "_detect_is_causal_mask", None)
    if original is None:
        return

    @torch._dynamo.substitute_in_graph(original)
    def _detect_is_causal_mask(mask: Tensor | None, is_causal: bool | None = None, size: int | None = None) -> bool:
        return is_causal is True

    torch._dynamo.assume_constant_result(rewrites)  # type: ignore[no-untyped-call]
    _train_flex_on_the_cpu()
    torch._dynamo.allow_in_graph(calls.call_known)  # type: ignore[no-untyped-call]
    torch._dynamo.allow_in_graph(calls.call_left)  # type: ignore[no-untyped-call]


def _train_flex_on_the_cpu() -> None:
    """torch refuses to trace flex_attention where a gradient is wanted on a CPU, for Inductor has no backward for it.

    A rewritten call has one.
    """
    from torch.nn.attention import flex_attention

    original = getattr(flex_attention, "_validate_device", None)
    if original is None:
        return
    refuse = calls.copied(original)

    @torch._dynamo.substitute_in_graph(original)
    def _validate_device(query: Tensor, key: Tensor, value: Tensor) -> None:
        if not rewrites():
            refuse(query, key, value)


def rewrites() -> bool:
    """Whether the graph that Dynamo traces goes to a backend that rewrites attention."""
    from torch._dynamo.symbolic_convert import InstructionTranslator

    backend: Any = InstructionTranslator.current_tx().output.compiler_fn
    while backend is not None and not getattr(backend, "rewrites_attention", False):
        backend = getattr(backend, "compiler_fn", None) or getattr(backend, "_torchdynamo_orig_backend", None)
    return backend is not None


_seen: dict[str, Callable[..., Any]] = {}


def know_calls() -> None:
    """Has Dynamo put calls of loaded packages into its graphs as one node each, where a backend rewrites attention."""
    for key, function in calls.loaded():
        if _seen.get(key) is not function:
            _seen[key] = function
            known = calls.know(key, function)
            torch._dynamo.substitute_in_graph(function, skip_signature_check=True)(_traced(key, known))


def _traced(key: str, known: calls.Known) -> Callable[..., Any]:
    names, original = tuple(known.defaults), known.function

    def traced(*args: Any, **kwargs: Any) -> Any:
        if not rewrites() or not torch.is_grad_enabled():
            return original(*args, **kwargs)
        given = {**dict(zip(names, args)), **kwargs}  # noqa: B905 - Dynamo traces this
        reason = calls.why_not(key, given)
        if not reason:
            return calls.call_known(key, **calls.flat(given))
        first = calls.call_left(given[names[0]], key, reason)
        return original(**{**given, names[0]: first})

    return traced

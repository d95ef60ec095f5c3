"""Places inside of torch itself where Dynamo would not see attention, and what it does there instead.

- nn.TransformerEncoder and nn.TransformerDecoder look at the values of a mask to learn whether it is causal, as a hint
  for faster kernels. That breaks the graph. The hint changes no result, so that under Dynamo it is given only where the
  caller has given it.
- Dynamo traces the code of torch.nn where other code calls it, and skips it where a compiled region begins with it: in
  ``nn.TransformerEncoder(...).compile()``, and below a graph break. For a backend that rewrites attention it does not.
- What a frame was traced with (fake tensors, their mode, all sizes) stays alive for good where an input is no leaf of
  autograd, or a size is a symbol: both lead back to themselves by way of C++, where Python's garbage collector does not
  see it. For a backend that rewrites attention it is noted, so that `free_traces` can cut these cycles.
"""

from __future__ import annotations

import functools
import sys
import threading
import weakref
from collections.abc import Callable
from functools import cache
from types import CodeType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import transformer

from fx_passes.find import calls
from fx_passes.find.source_location import module_path, source_of
from fx_passes.report import Report, Site
from fx_passes.torch_compat import inner_backend

_RESUMED = "torch_dynamo_resume_in_"
_CLASSES = (
    nn.MultiheadAttention,
    nn.Sequential,
    nn.Transformer,
    nn.TransformerDecoder,
    nn.TransformerDecoderLayer,
    nn.TransformerEncoder,
    nn.TransformerEncoderLayer,
)
_FILES = {sys.modules[c.__module__].__file__ for c in _CLASSES}
_CODES: set[CodeType] = {f.__code__ for c in _CLASSES for f in (vars(c)["forward"],)} | {
    f.__code__
    for c in (nn.TransformerDecoderLayer, nn.TransformerEncoderLayer)
    for f in (vars(c).get("_sa_block"), vars(c).get("_mha_block"))
    if f is not None
}


@cache
def mend_graph_breaks() -> None:
    """Changes Dynamo as described above, once in a process; eager code and other backends are not touched."""
    _give_no_hint()
    _enter_torch_nn()
    _train_flex_on_the_cpu()
    _note_traces()
    torch._dynamo.assume_constant_result(rewrites)  # type: ignore[no-untyped-call]
    torch._dynamo.allow_in_graph(calls.call_known)  # type: ignore[no-untyped-call]
    torch._dynamo.allow_in_graph(calls.call_left)  # type: ignore[no-untyped-call]


def _give_no_hint() -> None:
    original = getattr(transformer, "_detect_is_causal_mask", None)
    if original is None:
        return

    @torch._dynamo.substitute_in_graph(original)
    def _detect_is_causal_mask(mask: Tensor | None, is_causal: bool | None = None, size: int | None = None) -> bool:
        return is_causal is True


class _Entered(threading.local):
    code: CodeType | None = None


def _enter_torch_nn() -> None:
    """Lets frames of the attention classes of torch.nn be compiled, for backends with `rewrites_attention`."""
    from torch._dynamo import convert_frame, trace_rules  # it imports Triton

    wrapper = getattr(convert_frame, "CatchErrorsWrapper", None)
    if wrapper is None:
        return
    entered = _Entered()
    call, check = wrapper.__call__, trace_rules.check

    @functools.wraps(check)
    def checks(obj: Any, *args: Any, **kwargs: Any) -> bool:
        return False if obj is entered.code else check(obj, *args, **kwargs)

    @functools.wraps(call)
    def converts(self: Any, frame: Any, *args: Any, **kwargs: Any) -> Any:
        if not _holds_attention(frame.f_code):
            return call(self, frame, *args, **kwargs)
        if not _rewrites(self):
            result = call(self, frame, *args, **kwargs)
            if getattr(result, "guarded_code", None) is None:
                result.apply_to_code = False  # the decision to skip it is not for all backends
            return result
        before, entered.code = entered.code, frame.f_code
        try:
            return call(self, frame, *args, **kwargs)
        finally:
            entered.code = before

    trace_rules.check, wrapper.__call__ = checks, converts
    for code in _CODES:  # earlier decisions to skip it
        torch._C._dynamo.eval_frame.reset_code(code)


def _holds_attention(code: CodeType) -> bool:
    return code in _CODES or (code.co_name.startswith(_RESUMED) and code.co_filename in _FILES)


def _rewrites(backend: Any) -> bool:
    """Whether a backend, or Dynamo's callback to one, rewrites attention."""
    return _rewriter(backend) is not None


def _rewriter(backend: Any) -> Any:
    """The backend that rewrites attention, or None. Dynamo wraps backends, once or more."""
    while backend is not None and getattr(backend, "rewrites_attention", False) is not True:
        backend = inner_backend(backend)
    return backend


_shape_envs: weakref.WeakKeyDictionary[Any, weakref.WeakSet[Any]] = weakref.WeakKeyDictionary()  # by backend


def _note_traces() -> None:
    from torch._dynamo.output_graph import OutputGraph

    original = OutputGraph.__init__

    @functools.wraps(original)
    def noted(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        backend = _rewriter(self.compiler_fn)
        if backend is not None:
            _shape_envs.setdefault(backend, weakref.WeakSet()).add(self.shape_env)

    OutputGraph.__init__ = noted  # type: ignore[method-assign]


def free_traces(backend: Any) -> None:
    """Frees what the graphs of a backend were traced with, once nothing of it will be compiled any more."""
    for shape_env in _shape_envs.pop(backend, ()):
        shape_env.tracked_fakes = None


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

    return _rewrites(InstructionTranslator.current_tx().output.compiler_fn)


def report_left(form: str, reason: str) -> None:
    """Reports a call that breaks the graph which Dynamo traces, so that no node of it is left."""
    from torch._dynamo.symbolic_convert import InstructionTranslator

    tx = InstructionTranslator.current_tx()
    report = getattr(_rewriter(tx.output.compiler_fn), "report", None)
    if isinstance(report, Report):
        paths = [path for path, _ in tx.nn_module_stack.values()]
        where = module_path(paths[-1] if paths else ""), source_of("".join(tx.format_frame_summary()))
        report.add(Site(*where, form=form, reason=reason, number=report.number((*where, 0))))


_seen: dict[str, Callable[..., Any]] = {}


def know_calls() -> None:
    """Has Dynamo put calls of loaded packages into its graphs as one node each, where a backend rewrites attention."""
    for key, function in calls.loaded():
        if _seen.get(key) is not function:
            _seen[key] = function
            known = calls.know(key, function)
            torch._dynamo.substitute_in_graph(function, skip_signature_check=True)(_traced(key, known))


def _traced(key: str, known: calls.Known) -> Callable[..., Any]:
    names, original = tuple(known.about.defaults), known.function

    def traced(*args: Any, **kwargs: Any) -> Any:
        if not rewrites() or not torch.is_grad_enabled():
            return original(*args, **kwargs)
        given = {**dict(zip(names, args)), **kwargs}  # noqa: B905 - Dynamo traces this
        reason = calls.why_not(key, given)
        if not reason:
            return calls.call_known(key, **calls.flat(given))
        if all(x is None or isinstance(x, (Tensor, int, float, str, tuple, list)) for x in given.values()):
            return calls.call_left(given[names[0]], key, reason, **given)
        first = calls.call_left(given[names[0]], key, reason)
        return original(**{**given, names[0]: first})

    return traced

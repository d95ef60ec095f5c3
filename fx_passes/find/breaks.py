"""Places inside of torch itself where Dynamo would not see attention, and what it does there instead.

- nn.TransformerEncoder and nn.TransformerDecoder look at the values of a mask to learn whether it is causal, as a hint
  for faster kernels. That breaks the graph. The hint changes no result, so that under Dynamo it is given only where the
  caller has given it.
- Dynamo traces the code of torch.nn where other code calls it, and skips it where a compiled region begins with it: in
  ``nn.TransformerEncoder(...).compile()``, and below a graph break. For a backend that rewrites attention it does not.
"""

from __future__ import annotations

import functools
import sys
import threading
from functools import cache
from types import CodeType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import transformer

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


def _rewrites(callback: Any) -> bool:
    """Whether Dynamo's callback belongs to a backend that rewrites attention."""
    backend = torch._dynamo.eval_frame.innermost_backend(callback)
    backend = getattr(backend, "compiler_fn", backend)  # torch.compile's wrapper around it
    return getattr(backend, "rewrites_attention", False) is True

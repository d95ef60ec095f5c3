"""`sus_backward`: SUS for eager code, without a compiler."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fx_passes import eager_calls, recompute
from fx_passes.find.calls import FLEX, VARLEN, Call, NotTaken, form_of_key, is_varlen, varlen_arguments
from fx_passes.handle import CallHandle
from fx_passes.ops.arguments import why_left
from fx_passes.ops.functional import attend, draw
from fx_passes.ops.problem import Forward, Sampler
from fx_passes.ops.snapshot import as_library_keeps, as_library_returns
from fx_passes.ops.transforms import transform


class sus_backward(CallHandle, TorchFunctionMode):
    """Gives F.scaled_dot_product_attention a SUS backward inside a ``with`` block, in eager code.

    It acts on direct calls and on modules that call it, such as nn.TransformerEncoderLayer in training, and also on
    flex_attention, flash-attn, xformers and torch's varlen_attn. Attention written by hand is not seen: compile with
    `SUSBackend` for that. Calls where no gradient is recorded stay as they are. The
    backward may run after the block. Threads may use one block or several at once: nothing outside of a thread's own
    blocks changes.

    A call that it cannot take goes to its own function and is counted in `report`, with the reason: nested
    tensors and other subclasses, devices but CPU and CUDA, empty tensors, a mask together with is_causal, transforms of
    torch.func.

    Args:
        c: expected number of kept entries per query row and head, above 0; `float("inf")` is the exact backward.
            The attribute `c` may be set at any time.
        sampler: as for `SUSBackend`.
        seed: as for `SUSBackend`.
        forward: as for `SUSBackend`.

    Raises:
        TypeError, ValueError: an argument is not allowed; the message names it.

    Examples:
        >>> import torch
        >>> import torch.nn.functional as F
        >>> q = torch.randn(1, 2, 64, 16, requires_grad=True)
        >>> with sus_backward(c=8) as sus:
        ...     F.scaled_dot_product_attention(q, q, q, is_causal=True).sum().backward()
        >>> sus.calls
        1
    """

    def __init__(
        self, c: float = 30.0, sampler: Sampler = "auto", seed: int | None = None, forward: Forward = "auto"
    ) -> None:
        CallHandle.__init__(self, c, sampler, seed, forward)
        TorchFunctionMode.__init__(self)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if not torch.is_grad_enabled() or not self._in_force():
            return func(*args, **kwargs)
        if is_varlen(func):
            try:
                return self.call(VARLEN, varlen_arguments(args, kwargs))
            except NotTaken:
                return func(*args, **kwargs)
        if func is F.scaled_dot_product_attention:
            return self._attention(*args, **kwargs)
        if func is F.multi_head_attention_forward and isinstance(func, FunctionType):
            return self._with_attention(func)(*args, **kwargs)
        return func(*args, **kwargs)

    def _in_force(self) -> bool:
        """False for a block around or inside of another, and in a recomputation of what another one computed."""
        return torch.compiler.is_dynamo_compiling() or recompute.block() is self

    def _with_attention(self, func: FunctionType) -> Callable[..., Any]:
        """A function of torch.nn.functional that calls `_attention` instead of F.scaled_dot_product_attention.

        The mode is off inside of the call. A copy of the function with other globals sees the exchange; nobody else
        does, in whatever thread.
        """
        names = {**func.__globals__, "scaled_dot_product_attention": self._attention}
        copy = FunctionType(func.__code__, names, func.__name__, func.__defaults__, func.__closure__)
        copy.__kwdefaults__ = func.__kwdefaults__
        return copy

    def _attention(self, *args: Any, **kwargs: Any) -> Tensor:
        given = _arguments(*args, **kwargs)
        reason = "wrong arguments" if given is None else why_left(**given)
        if given is None or reason is not None:
            self.state.note_left(str(reason))
            return F.scaled_dot_product_attention(*args, **kwargs)
        tensors = (given["query"], given["key"], given["value"], given["attn_mask"])
        if transform(*tensors) is None:
            if not any(x is not None and x.requires_grad for x in tensors):
                return F.scaled_dot_product_attention(*args, **kwargs)
            self.state.note_call()
        return self._attend(**given)

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None,
        dropout_p: float,
        is_causal: bool,
        scale: float | None,
        enable_gqa: bool,
    ) -> Tensor:
        c, seed = draw(query, self.state.id, [0])
        query, key, attn_mask, own_masks, keeps_result = as_library_keeps(
            query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa
        )
        is_bool = attn_mask is not None and attn_mask.dtype == torch.bool
        out: Tensor = attend(
            query,
            key,
            value,
            c[0],
            seed,
            attn_mask=attn_mask if is_bool else None,
            attn_bias=None if is_bool else attn_mask,
            scale=scale,
            right=0 if is_causal else None,
            dropout_p=float(dropout_p),
            sampler=self.sampler,
            forward=self.forward,
            state=self.state.id,
            own_masks=own_masks,
        )
        return as_library_returns(out, query, keeps_result)

    def __enter__(self) -> sus_backward:
        eager_calls.enter()
        recompute.enter(self)
        return super().__enter__()  # type: ignore[no-any-return, no-untyped-call]

    def __exit__(self, *args: Any) -> None:
        super().__exit__(*args)  # type: ignore[no-untyped-call]
        recompute.leave()
        eager_calls.leave()

    def call(self, key: str, given: dict[str, Any]) -> Any:
        """A call of flex_attention, flash-attn, xformers or varlen_attn."""
        try:
            if key != FLEX:
                return eager_calls.handle(key, given, self._attend_call)
            result = self._flex(**given)
        except eager_calls.NoGradient:
            raise
        except NotTaken as why:
            self.state.note_left(str(why), form_of_key(key))
            raise
        self.state.note_call("flex")
        return result

    def _attend_call(self, call: Call, form: str) -> tuple[Tensor, Tensor]:
        reason = why_left(call.query, call.key, call.value, call.bias, call.dropout_p, False, call.scale, True)
        if reason is not None:
            raise NotTaken(reason)
        around = transform(*call.operands())
        if around is None:
            self.state.note_call(form)
        else:
            self.state.note_left(around, form)
        c, seed = draw(call.query, self.state.id, [0])
        options = {"sampler": self.sampler, "forward": self.forward, "state": 0 if around else self.state.id}
        return eager_calls.attend_call(call, c[0], seed, **options)

    @cached_property
    def _flex(self) -> Callable[..., Any]:
        from fx_passes.backend import SUSBackend

        backend = SUSBackend(self.c, self.sampler, "eager", forward=self.forward)
        backend.state = self.state
        return eager_calls.compiled_flex(backend)


def _arguments(*args: Any, **kwargs: Any) -> dict[str, Any] | None:
    """The arguments of F.scaled_dot_product_attention by name; None where they do not fit its signature."""
    if len(args) > len(_POSITIONAL) or not kwargs.keys() <= _DEFAULTS.keys():
        return None
    given = dict(zip(_POSITIONAL, args))  # noqa: B905 - Dynamo of torch 2.8 takes strict=False for True
    if given.keys() & kwargs.keys():
        return None
    return {**_DEFAULTS, **given, **kwargs}


_DEFAULTS: dict[str, Any] = {
    "query": None,
    "key": None,
    "value": None,
    "attn_mask": None,
    "dropout_p": 0.0,
    "is_causal": False,
    "scale": None,
    "enable_gqa": False,
}
_POSITIONAL = tuple(_DEFAULTS)[:6]

"""`sus_backward`: SUS for eager code, without a compiler."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property, partial
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fx_passes import eager_calls
from fx_passes.find import calls
from fx_passes.ops.functional import check_choice, sus_attention
from fx_passes.ops.problem import FORWARDS, SAMPLERS
from fx_passes.state import State, draw


class sus_backward(TorchFunctionMode):
    """Gives F.scaled_dot_product_attention a SUS backward inside a ``with`` block, in eager code.

    It also acts on flex_attention, flash-attn, xformers and torch's varlen_attn, in the thread that is inside of the
    block. It acts on direct calls and on modules that call it, such as nn.TransformerEncoderLayer in training.
    Attention
    written by hand is not seen: compile with `SUSBackend` for that. Calls where no gradient is recorded stay as they
    are. The backward may run after the block.

    Args:
        c: expected number of kept entries per query row and head, above 0; `float("inf")` is the exact backward.
            The attribute `c` may be set at any time.
        sampler, seed, forward: as for `SUSBackend`.

    Raises:
        TypeError, ValueError: an argument is not allowed; the message names it.

    >>> import torch
    >>> import torch.nn.functional as F
    >>> q = torch.randn(1, 2, 64, 16, requires_grad=True)
    >>> with sus_backward(c=8) as sus:
    ...     F.scaled_dot_product_attention(q, q, q, is_causal=True).sum().backward()
    >>> sus.calls
    1
    """

    def __init__(
        self, c: float = 30.0, sampler: str = "systematic", seed: int | None = None, forward: str = "auto"
    ) -> None:
        check_choice("sampler", sampler, SAMPLERS)
        check_choice("forward", forward, FORWARDS)
        super().__init__()
        self.state = State(c, seed)
        self.sampler, self.forward = sampler, forward
        self.calls = 0
        self.left: dict[str, int] = {}  # calls of other packages that went to their own function, by reason

    @property
    def c(self) -> float:
        return self.state.c

    @c.setter
    def c(self, value: float) -> None:
        self.state.c = value

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if torch.is_grad_enabled() and calls.is_varlen(func):
            try:
                return self._call(calls.VARLEN, calls.varlen_arguments(args, kwargs))
            except calls.NotTaken:
                return func(*args, **kwargs)
        if torch.is_grad_enabled() and func is F.scaled_dot_product_attention:
            return self._attention(*args, **kwargs)
        if torch.is_grad_enabled() and func is F.multi_head_attention_forward:
            # The mode is off inside the call, so what the function calls is replaced by name.
            with mock.patch.object(F, "scaled_dot_product_attention", self._attention):
                return func(*args, **kwargs)
        return func(*args, **kwargs)

    def _attention(self, *args: Any, **kwargs: Any) -> Tensor:
        self.calls += 1
        query = args[0] if args else kwargs["query"]
        c, seed = draw(query, self.state.id, [0])
        attention = partial(sus_attention, c=c[0], seed=seed, sampler=self.sampler, forward=self.forward)
        return attention(*args, **kwargs, state=self.state.id)

    def __enter__(self) -> sus_backward:
        eager_calls.enter(self._call)
        return super().__enter__()  # type: ignore[no-any-return, no-untyped-call]

    def __exit__(self, *args: Any) -> None:
        super().__exit__(*args)  # type: ignore[no-untyped-call]
        eager_calls.leave()

    def _call(self, key: str, given: dict[str, Any]) -> Any:
        """A call of flex_attention, flash-attn, xformers or varlen_attn."""
        try:
            result = (
                self._flex(**given) if key == eager_calls.FLEX else eager_calls.handle(key, given, self._attend_call)
            )
        except calls.NotTaken as why:
            self._note_left(str(why))
            raise
        self.calls += 1
        return result

    def _note_left(self, reason: str) -> None:
        """A call goes to its own function."""
        self.left[reason] = self.left.get(reason, 0) + 1

    def _attend_call(self, call: calls.Call) -> tuple[Tensor, Tensor]:
        c, seed = draw(call.query, self.state.id, [0])
        options = {"sampler": self.sampler, "forward": self.forward, "state": self.state.id}
        return eager_calls.attend_call(call, c[0], seed, **options)

    @cached_property
    def _flex(self) -> Callable[..., Any]:
        from fx_passes.backend import SUSBackend

        backend = SUSBackend(self.c, self.sampler, "eager", forward=self.forward)
        backend.state = self.state
        return eager_calls.compiled_flex(backend)

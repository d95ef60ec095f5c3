"""`sus_backward`: SUS for eager code, without a compiler."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fx_passes.ops.functional import check_choice, sus_attention
from fx_passes.ops.problem import FORWARDS, SAMPLERS
from fx_passes.state import State, draw


class sus_backward(TorchFunctionMode):
    """Gives F.scaled_dot_product_attention a SUS backward inside a ``with`` block, in eager code.

    It acts on direct calls and on modules that call it, such as nn.TransformerEncoderLayer in training. Attention
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

    def __init__(self, c: float = 30.0, sampler: str = "auto", seed: int | None = None, forward: str = "auto") -> None:
        check_choice("sampler", sampler, SAMPLERS)
        check_choice("forward", forward, FORWARDS)
        super().__init__()
        self.state = State(c, seed)
        self.sampler, self.forward = sampler, forward
        self.calls = 0

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

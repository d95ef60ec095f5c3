"""Calls of F.scaled_dot_product_attention: what it takes in eager, and what it refuses.

A case gives positional and keyword arguments; tensors that can require a gradient do.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode


def t(*shape: int, dtype: torch.dtype = torch.float32, grad: bool = True, device: str = "cpu") -> Tensor:
    x = torch.randn(shape, dtype=torch.float32, device=device)
    x = torch.complex(x, x) if dtype.is_complex else x.to(dtype)
    return x.requires_grad_() if grad and (dtype.is_floating_point or dtype.is_complex) else x


class Named(Tensor):
    """A subclass without behaviour of its own."""


@dataclass
class Call:
    """One call.

    Attributes:
        build: makes the arguments.
        taken: whether a SUS backward is expected.
        around: a context for the call.
    """

    build: Callable[[], tuple[tuple[Any, ...], dict[str, Any]]]
    taken: bool
    around: Callable[[], AbstractContextManager[Any]] = nullcontext


def call(*shapes: Any, taken: bool = True, around: Any = nullcontext, **kwargs: Any) -> Call:
    """A call on tensors of these shapes; functions among the arguments are called when it is built."""

    def build() -> tuple[tuple[Any, ...], dict[str, Any]]:
        torch.manual_seed(0)
        args = tuple(t(*s) if isinstance(s, tuple) else s() if callable(s) else s for s in shapes)
        return args, {k: v() if callable(v) else v for k, v in kwargs.items()}

    return Call(build, taken, around)


S = (2, 4, 6, 8)


def bf16() -> AbstractContextManager[Any]:
    return torch.autocast("cpu", torch.bfloat16)


def _nested(layout: torch.layout) -> Tensor:
    parts = [torch.randn(n, 2, 8) for n in (3, 5)]
    return torch.nested.nested_tensor(parts, layout=layout, requires_grad=True).transpose(1, 2)


def _expanded() -> Tensor:
    return t(1, 1, 6, 8).expand(S)


def _overlapping() -> Tensor:
    return t(200).as_strided(S, (40, 10, 4, 1))


def _inference() -> Tensor:
    with torch.inference_mode():
        return torch.randn(S)


def _fake() -> Tensor:
    with FakeTensorMode(allow_non_fake_inputs=True):
        return torch.randn(S).requires_grad_()


_MODE = FakeTensorMode(allow_non_fake_inputs=True)


def _fake_of_one_mode() -> Tensor:
    with _MODE:
        return torch.randn(S).requires_grad_()


CALLS: dict[str, Call] = {
    "plain": call(S, S, S),
    "causal": call(S, S, S, is_causal=True),
    "positional": call(S, S, S, None, 0.0, True),
    "by keyword": call(query=lambda: t(*S), key=lambda: t(*S), value=lambda: t(*S)),
    "scale": call(S, S, S, scale=0.3),
    "scale int": call(S, S, S, scale=1),
    "scale negative": call(S, S, S, scale=-0.5),
    "scale zero": call(S, S, S, scale=0.0),
    "scale zero, causal, GQA": call((4, 6, 8), (2, 6, 8), (2, 6, 8), is_causal=True, scale=0.0, enable_gqa=True),
    "scale negative, causal": call(*[lambda: t(2, 4, 8, 6).mT] * 3, is_causal=True, scale=-0.5),
    "scale inf": call(S, S, S, scale=float("inf"), taken=False),
    "bool mask": call(S, S, S, lambda: torch.rand(6, 6) > 0.3),
    "bool mask of heads": call(S, S, S, lambda: torch.rand(2, 4, 6, 6) > 0.3),
    "row without keys": call(S, S, S, lambda: torch.ones(6, 6, dtype=torch.bool).tril(-1)),
    "float mask": call(S, S, S, (6, 6)),
    "float mask, -inf": call(S, S, S, lambda: torch.zeros(6, 6).masked_fill(torch.rand(6, 6) > 0.6, -torch.inf)),
    "float64 mask": call(S, S, S, lambda: t(6, 6, dtype=torch.float64), taken=False),
    "int mask": call(S, S, S, lambda: torch.ones(6, 6, dtype=torch.long), taken=False),
    "mask of one dimension": call(S, S, S, lambda: torch.ones(6, dtype=torch.bool), taken=False),
    "mask of five dimensions": call(S, S, S, lambda: torch.ones(1, 1, 1, 6, 6, dtype=torch.bool), taken=False),
    "mask that does not fit": call(S, S, S, lambda: torch.ones(6, 5, dtype=torch.bool), taken=False),
    "mask on meta": call(S, S, S, lambda: torch.ones(6, 6, dtype=torch.bool, device="meta"), taken=False),
    "sparse mask": call(S, S, S, lambda: torch.eye(6).to_sparse(), taken=False),
    "mask with is_causal": call(S, S, S, lambda: torch.rand(6, 6) > 0.3, is_causal=True, taken=False),
    "float mask with is_causal": call(S, S, S, lambda: torch.randn(6, 6), is_causal=True, taken=False),
    "more keys": call(S, (2, 4, 9, 8), (2, 4, 9, 8)),
    "more keys, causal": call(S, (2, 4, 9, 8), (2, 4, 9, 8), is_causal=True),
    "fewer keys, causal": call(S, (2, 4, 3, 8), (2, 4, 3, 8), is_causal=True),
    "value dim": call(S, S, (2, 4, 6, 5)),
    "head_dim 1": call((2, 4, 6, 1), (2, 4, 6, 1), (2, 4, 6, 1)),
    "head_dim 0": call((2, 4, 6, 0), (2, 4, 6, 0), (2, 4, 6, 5), taken=False),
    "head_dim 0, value dim 0": call((2, 4, 6, 0), (2, 4, 6, 0), (2, 4, 6, 0), taken=False),
    "value dim 0": call(S, S, (2, 4, 6, 0), taken=False),
    "no keys": call(S, (2, 4, 0, 8), (2, 4, 0, 8), taken=False),
    "no queries": call((2, 4, 0, 8), S, S, taken=False),
    "empty batch": call((0, 4, 6, 8), (0, 4, 6, 8), (0, 4, 6, 8), taken=False),
    "no heads": call((2, 0, 6, 8), (2, 0, 6, 8), (2, 0, 6, 8), taken=False),
    "one query": call((2, 4, 1, 8), S, S),
    "2-D": call((6, 8), (6, 8), (6, 8)),
    "3-D": call((4, 6, 8), (4, 6, 8), (4, 6, 8)),
    "5-D": call((2, 3, 4, 6, 8), (2, 3, 4, 6, 8), (2, 3, 4, 6, 8)),
    "5-D, mask": call((2, 3, 4, 6, 8), (2, 3, 4, 6, 8), (2, 3, 4, 6, 8), lambda: torch.rand(3, 1, 6, 6) > 0.3),
    "1-D": call((8,), (8,), (8,), taken=False),
    "3-D keys": call(S, (4, 6, 8), (4, 6, 8)),
    "3-D keys, mask": call(S, (4, 6, 8), (4, 6, 8), lambda: torch.rand(2, 1, 6, 6) > 0.3),
    "2-D keys": call(S, (6, 8), (6, 8), taken=False),
    "3-D query": call((4, 6, 8), S, S, taken=False),
    "batch of keys broadcasts": call(S, (1, 4, 6, 8), (1, 4, 6, 8)),
    "batch of the query broadcasts": call((1, 4, 6, 8), S, S),
    "batch does not fit": call(S, (3, 4, 6, 8), (3, 4, 6, 8), taken=False),
    "one key head": call(S, (2, 1, 6, 8), (2, 1, 6, 8)),
    "one key head, causal": call(S, (2, 1, 6, 8), (2, 1, 6, 8), is_causal=True),
    "one key head, value heads": call(S, (2, 1, 6, 8), S, taken=False),
    "one query head": call((2, 1, 6, 8), S, S, taken=False),
    "GQA": call(S, (2, 2, 6, 8), (2, 2, 6, 8), enable_gqa=True),
    "GQA, one key head": call(S, (2, 1, 6, 8), (2, 1, 6, 8), enable_gqa=True),
    "GQA, equal heads": call(S, S, S, enable_gqa=True),
    "GQA, value heads": call(S, (2, 2, 6, 8), S, enable_gqa=True, taken=False),
    "GQA, 3-D keys": call(S, (2, 6, 8), (2, 6, 8), enable_gqa=True, taken=False),
    "GQA that does not fit": call(S, (2, 3, 6, 8), (2, 3, 6, 8), enable_gqa=True, taken=False),
    "heads do not fit": call(S, (2, 2, 6, 8), (2, 2, 6, 8), taken=False),
    "head_dim does not fit": call(S, (2, 4, 6, 7), S, taken=False),
    "float64": call(*[lambda: t(*S, dtype=torch.float64)] * 3),
    "bfloat16": call(*[lambda: t(*S, dtype=torch.bfloat16)] * 3),
    "float16": call(*[lambda: t(*S, dtype=torch.float16)] * 3),
    "float32 mask with bfloat16": call(*[lambda: t(*S, dtype=torch.bfloat16)] * 3, lambda: torch.randn(6, 6)),
    "complex": call(*[lambda: t(*S, dtype=torch.complex64)] * 3, taken=False),
    "int64": call(*[lambda: torch.ones(S, dtype=torch.int64)] * 3, taken=False),
    "float8": call(*[lambda: torch.ones(S).to(torch.float8_e4m3fn)] * 3, taken=False),
    "mixed dtypes": call(S, S, lambda: t(*S, dtype=torch.bfloat16), taken=False),
    "autocast": call(S, S, S, around=bf16),
    "autocast, bfloat16 value": call(S, S, lambda: t(*S, dtype=torch.bfloat16), around=bf16),
    "autocast, float mask": call(S, S, S, (6, 6), around=bf16),
    "autocast, float64": call(*[lambda: t(*S, dtype=torch.float64)] * 3, around=bf16),
    "autocast, float64 value": call(S, S, lambda: t(*S, dtype=torch.float64), around=bf16, taken=False),
    "transposed": call(*[lambda: t(2, 6, 4, 8).transpose(1, 2)] * 3),
    "last dimension strided": call(*[lambda: t(2, 4, 8, 6).mT] * 3),
    "every second": call(*[lambda: t(2, 4, 6, 16)[..., ::2]] * 3),
    "offset": call(*[lambda: t(2, 4, 7, 9)[..., 1:, 1:]] * 3),
    "expanded": call(_expanded, _expanded, _expanded),
    "overlapping": call(_overlapping, _overlapping, _overlapping),
    "expanded mask": call(S, S, S, lambda: (torch.rand(6) > 0.3).expand(2, 4, 6, 6)),
    "negative bit": call(*[lambda: torch.complex(t(*S), t(*S)).conj().imag] * 3),
    "parameter": call(*[lambda: nn.Parameter(torch.randn(S))] * 3),
    "subclass": call(*[lambda: torch.randn(S).as_subclass(Named).requires_grad_()] * 3, taken=False),
    "nested, strided": call(*[lambda: _nested(torch.strided)] * 3, taken=False),
    "nested, jagged": call(*[lambda: _nested(torch.jagged)] * 3, taken=False),
    "meta": call(*[lambda: t(*S, device="meta")] * 3, taken=False),
    "query on meta": call(lambda: t(*S, device="meta"), S, S, taken=False),
    "fake": call(_fake_of_one_mode, _fake_of_one_mode, _fake_of_one_mode, taken=False),
    "fake of several modes": call(_fake, _fake, _fake, taken=False),
    "inference tensors": call(_inference, _inference, _inference, taken=False),
    "inference query": call(_inference, S, S, taken=False),
    "only value has a gradient": call(lambda: t(*S, grad=False), lambda: t(*S, grad=False), S),
    "dropout 0": call(S, S, S, dropout_p=0),
    "dropout 1": call(S, S, S, dropout_p=1.0, taken=False),
    "dropout 2": call(S, S, S, dropout_p=2.0, taken=False),
    "dropout negative": call(S, S, S, dropout_p=-0.1, taken=False),
    "dropout nan": call(S, S, S, dropout_p=float("nan"), taken=False),
    "dropout of a string": call(S, S, S, dropout_p="x", taken=False),
    "scale of a string": call(S, S, S, scale="x", taken=False),
    "is_causal int": call(S, S, S, is_causal=1, taken=False),
    "is_causal None": call(S, S, S, is_causal=None, taken=False),
    "no arguments": call(taken=False),
    "two arguments": call(S, S, taken=False),
    "seven arguments": call(S, S, S, None, 0.0, False, 0.3, taken=False),
    "twice": call(S, S, S, query=lambda: t(*S), taken=False),
    "unknown argument": call(S, S, S, causal=True, taken=False),
    "query of numbers": call(lambda: [[1.0]], S, S, taken=False),
    "query None": call(None, S, S, taken=False),
    "mask of numbers": call(S, S, S, lambda: [[True]], taken=False),
}

"""Where eager attention has no error, neither has what replaces it; where it has one, it is of the same type."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses import FakeTensor

from fx_passes import SUSBackend, sus_backward
from tests.sdpa_calls import CALLS, Call


def run(call: Call, attention: Any, backward: bool = True) -> tuple[Any, list[Tensor | None]]:
    """Result (or the exception's type) and gradients of the arguments."""
    args, kwargs = call.build()
    leaves = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.requires_grad]
    for x in leaves:
        x.retain_grad()
    try:
        with call.around():
            out = attention(*args, **kwargs)
        if backward and out.requires_grad:
            torch.manual_seed(1)
            weights = torch.randn(out.shape, device=out.device) if not out.is_nested else 1.0
            total = (out * weights).values().sum() if out.is_nested and out.layout == torch.jagged else None
            if total is None:
                total = torch.nested.to_padded_tensor(out, 0.0).sum() if out.is_nested else (out * weights).sum()
            total.abs().backward()
    except Exception as error:
        return type(error), []
    return out, [x.grad for x in leaves]


def same(found: Any, expected: Any, close: float = 1e-5) -> None:
    """Equal results, gradients or types of exceptions; uninitialised and absent memory is not looked at."""
    if isinstance(expected, type) or isinstance(found, type):
        assert found is expected
        return
    assert (type(found), found.device, found.dtype) == (type(expected), expected.device, expected.dtype)
    if expected.is_nested:
        for a, b in zip(found.unbind(), expected.unbind(), strict=True):
            torch.testing.assert_close(a, b)
        return
    assert found.shape == expected.shape
    if found.device.type == "meta" or isinstance(found, FakeTensor):
        return
    torch.testing.assert_close(found, expected, rtol=close, atol=close, equal_nan=True)


def same_runs(found: tuple[Any, list[Tensor | None]], expected: tuple[Any, list[Tensor | None]], name: str) -> None:
    if name == "mask on meta":  # PyTorch reads uninitialised memory there
        return
    halves = "bfloat16" in name or "autocast" in name or "float16" in name
    close = 3e-2 if halves else 1e-5
    same(found[0], expected[0], close)
    assert len(found[1]) == len(expected[1])
    for a, b in zip(found[1], expected[1], strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            same(a, b, close)


@pytest.mark.parametrize("name", CALLS)
def test_sus_backward(name: str) -> None:
    call = CALLS[name]
    expected = run(call, F.scaled_dot_product_attention)
    with sus_backward(c=float("inf")) as sus:
        found = run(call, F.scaled_dot_product_attention)
    same_runs(found, expected, name)
    left = sum(sus.state.left.values())
    assert sus.calls == int(call.taken)
    if not isinstance(expected[0], type):  # what PyTorch refuses may not even come to us
        assert left == int(not call.taken)
        assert (sus.report.rewritten, sus.report.left) == (sus.calls, left)


FAST = ("plain", "GQA, value heads", "dropout 1", "dropout nan", "nested, jagged", "autocast, bfloat16 value", "meta")


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in FAST else pytest.mark.slow) for n in CALLS])
def test_backend(name: str) -> None:
    call, backend = CALLS[name], SUSBackend(c=float("inf"), compiler="eager")
    runs = []
    for how in ("eager", backend):
        torch._dynamo.reset()
        attention = torch.compile(lambda *args, **kwargs: F.scaled_dot_product_attention(*args, **kwargs), backend=how)
        runs.append(run(call, attention))
    if name != "mask of five dimensions":  # the pass is more lenient: it drops leading ones
        same_runs(runs[1], runs[0], name)

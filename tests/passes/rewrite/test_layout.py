"""The result of a rewritten attention is used as that which it replaces: viewed, written to, given to the caller."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fx_passes import SUSBackend
from tests.uses import USES

Form = Callable[[Tensor, Tensor, Tensor], Tensor]


def by_hand(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(q @ k.mT / math.sqrt(q.shape[-1]), -1) @ v


def einsum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    probabilities = torch.softmax(torch.einsum("bhid,bhjd->bhij", q, k) * 0.3, -1)
    return torch.einsum("bhij,bhjd->bhid", probabilities, v)


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v)


def sdpa_dropout(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, dropout_p=1e-9)


FORMS = {f.__name__: f for f in (by_hand, einsum, sdpa, sdpa_dropout)}


def inputs(heads: int, e: int) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(min(heads, 2), heads, 8, d, requires_grad=True) for d in (8, 8, e)]


def run(
    f: Callable[..., Tensor], sizes: tuple[int, int], outside: Callable[[Tensor], Tensor] = lambda out: out
) -> list[Tensor]:
    x = inputs(*sizes)
    out = outside(f(*x))
    return [out.detach(), *torch.autograd.grad(out.square().sum(), x)]


CASES = [  # heads and width of values; a batch of one head comes in the right layout, and must still be copied
    ("by_hand", (3, 8)),
    ("by_hand", (3, 5)),
    ("by_hand", (1, 8)),
    ("einsum", (3, 8)),
    ("sdpa", (3, 8)),
    ("sdpa", (3, 5)),
    ("sdpa_dropout", (3, 8)),
    ("sdpa_dropout", (1, 8)),
]


@pytest.mark.parametrize("outside", [False, True], ids=["inside", "outside"])
@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
@pytest.mark.parametrize(("form", "sizes"), CASES)
def test_uses(form: str, sizes: tuple[int, int], compiler: Any, outside: bool) -> None:
    """Those that plain eager allows; some forms let their result be written to, some do not."""
    f, tried = FORMS[form], 0
    backend = SUSBackend(c=math.inf, compiler=compiler)
    compiled = torch.compile(f, backend=backend)
    for name, use in USES.items():
        try:
            expected = run(f, sizes, use)
        except RuntimeError:
            continue
        if outside:
            found = run(compiled, sizes, use)
        else:
            torch._dynamo.reset()
            backend = SUSBackend(c=math.inf, compiler=compiler)
            found = run(torch.compile(lambda *x, use=use: use(f(*x)), backend=backend), sizes)  # type: ignore[misc]
        assert backend.report.rewritten == 1, name
        for a, b in zip(expected, found, strict=True):
            torch.testing.assert_close(b, a, msg=lambda text, name=name: f"{name}: {text}")
        tried += 1
    assert tried >= 4


def in_order(order: list[int], n: int = 6) -> list[Tensor]:
    """Query, key and value [B, H, N, D] with their dimensions in this order in memory."""
    torch.manual_seed(0)
    x = [torch.empty_permuted((2, 3, n, 8), order).normal_().requires_grad_() for _ in range(3)]
    assert x[0].permute(order).is_contiguous()
    return x


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
@pytest.mark.parametrize("order", [[0, 1, 2, 3], [0, 2, 1, 3], [2, 0, 1, 3]])
@pytest.mark.parametrize("form", FORMS)
def test_strides(form: str, order: list[int], compiler: Any) -> None:
    backend = SUSBackend(c=math.inf, compiler=compiler)
    found = torch.compile(FORMS[form], backend=backend)(*in_order(order))
    assert backend.report.rewritten == 1
    assert found.stride() == FORMS[form](*in_order(order)).stride()


@pytest.mark.parametrize("form", FORMS)
def test_strides_of_dynamic_shapes(form: str) -> None:
    backend = SUSBackend(c=math.inf, compiler="eager")
    compiled = torch.compile(FORMS[form], backend=backend, dynamic=True)
    for n in (6, 9):
        x = in_order([0, 2, 1, 3], n)
        assert compiled(*x).stride() == FORMS[form](*x).stride()
    assert backend.report.rewritten == 1


def test_no_copy_before_a_merge_of_heads() -> None:
    """Where queries have heads and rows swapped in memory, so has our result: it is merged as it is."""
    backend = SUSBackend(c=math.inf, compiler="eager")
    compiled = torch.compile(lambda *x: sdpa(*x).transpose(1, 2).view(2, 6, 24).sin(), backend=backend)
    x = in_order([0, 2, 1, 3])
    compiled(*x)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        compiled(*x)
    assert backend.report.rewritten == 1
    assert not {"aten::clone", "aten::copy_"} & {event.key for event in profile.key_averages()}

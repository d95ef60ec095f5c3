"""The op as PyTorch sees it: opcheck, autograd, layouts, compilation."""

from __future__ import annotations

import pytest
import torch

from fx_passes import sus_attention
from tests.ops.cases import CASES


def _op_arguments(name: str, c: float, dropout_p: float = 0.0) -> tuple:
    tensors, static, _ = CASES[name].build()
    names = ("query", "key", "value", "attn_mask", "attn_bias", "sinks", "query_ids", "key_ids", "prefix")
    seed = torch.tensor(3)
    return (
        *(tensors.get(key) for key in names),
        torch.tensor(c, dtype=torch.float64),
        seed,
        seed,
        static.get("scale", 0.25),
        static.get("left"),
        static.get("right"),
        static.get("bottom_right", False),
        static.get("softcap", 0.0),
        dropout_p,
        "systematic",
        "auto",
        True,
        0,
        0,
    )


@pytest.mark.parametrize("c", [float("inf"), 6.0])
@pytest.mark.parametrize("name", ["plain", "GQA", "padding", "bias", "sinks", "packed", "value width"])
def test_opcheck(name: str, c: float) -> None:
    torch.library.opcheck(torch.ops.sus.attention.default, _op_arguments(name, c))


def test_opcheck_dropout() -> None:
    torch.library.opcheck(torch.ops.sus.attention.default, _op_arguments("causal", 6.0, 0.2))


@pytest.mark.parametrize("shape", [(5, 7, 40, 16), (6, 40, 16), (40, 16), (2, 3, 2, 40, 16)])
def test_any_number_of_dimensions(shape: tuple[int, ...]) -> None:
    q, k, v = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for _ in range(3))
    grad = torch.randn(shape, dtype=torch.float64)
    out = sus_attention(q, k, v, is_causal=True, c=float("inf"))
    true = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    torch.testing.assert_close(out, true)
    for found, expected in zip(
        torch.autograd.grad(out, (q, k, v), grad), torch.autograd.grad(true, (q, k, v), grad), strict=True
    ):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("mask", [(40, 40), (3, 1, 40), (2, 1, 1, 40), (2, 3, 40, 40)])
def test_mask_shapes(mask: tuple[int, ...]) -> None:
    q, k, v = (torch.randn(2, 3, 40, 16, dtype=torch.float64) for _ in range(3))
    for attn_mask in (torch.rand(mask) > 0.3, torch.randn(mask, dtype=torch.float64)):
        out = sus_attention(q, k, v, attn_mask, c=3)
        torch.testing.assert_close(out, torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask))


def test_strides_do_not_matter() -> None:
    base = [torch.randn(2, 4, 40, 16, dtype=torch.float64) for _ in range(3)]
    layouts = [
        lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
        lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
        lambda x: torch.stack([x, x], -1)[..., 0],
    ]
    results = []
    for layout in [lambda x: x, *layouts]:
        q, k, v = (layout(x.clone()).requires_grad_() for x in base)
        out = sus_attention(q, k, v, c=5, seed=1)
        results.append((out.detach(), *torch.autograd.grad(out.pow(2).sum(), (q, k, v))))
    for other in results[1:]:
        for found, expected in zip(other, results[0], strict=True):
            torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("is_causal", [False, True])
def test_library_bits(dtype: torch.dtype, is_causal: bool) -> None:
    q, k, v = (torch.randn(2, 4, 100, 32, dtype=dtype) for _ in range(3))
    out = sus_attention(q, k, v, is_causal=is_causal, c=4, forward="library")
    assert torch.equal(out, torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=is_causal))


def test_autocast() -> None:
    q, k, v = (torch.randn(2, 4, 40, 16, requires_grad=True) for _ in range(3))
    with torch.autocast("cpu", torch.bfloat16):
        out = sus_attention(q, k, v, c=5)
        true = torch.nn.functional.scaled_dot_product_attention(q, k, v)
        again = sus_attention(q, k, v, c=5)
    assert out.dtype == true.dtype == torch.bfloat16
    assert torch.equal(out, again)
    out.float().sum().backward()
    assert q.grad is not None
    assert q.grad.dtype == torch.float32


def test_saved_copies_draw_the_same() -> None:
    """Whoever copies what autograd saved (offloading, for one) gets the gradients of the same draw."""
    base = [torch.randn(1, 2, 300, 32) for _ in range(3)]

    def gradients() -> tuple[torch.Tensor, ...]:
        q, k, v = (x.clone().requires_grad_() for x in base)
        return torch.autograd.grad(sus_attention(q, k, v, c=5, seed=1, is_causal=True).pow(2).sum(), (q, k, v))

    plain = gradients()
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x.clone(), lambda x: x):
        copied = gradients()
    for found, expected in zip(copied, plain, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("c", [5.0, float("inf")])
def test_activation_checkpointing_draws_the_same(c: float) -> None:
    q, k, v = (torch.randn(1, 2, 64, 16, requires_grad=True) for _ in range(3))

    def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return sus_attention(q, k, v, c=c, seed=9, dropout_p=0.2).pow(2)

    torch.manual_seed(0)
    plain = torch.autograd.grad(attention(q, k, v).sum(), (q, k, v))
    torch.manual_seed(0)
    again = torch.utils.checkpoint.checkpoint(attention, q, k, v, use_reentrant=False)
    for found, expected in zip(torch.autograd.grad(again.sum(), (q, k, v)), plain, strict=True):
        assert torch.equal(found, expected)


def test_no_gradient_needs_no_backward() -> None:
    q = torch.randn(1, 2, 8, 4)
    assert not sus_attention(q, q, q, c=3).requires_grad
    k = q.clone().requires_grad_()
    (grad,) = torch.autograd.grad(sus_attention(q, k, q, c=float("inf")).sum(), k)
    assert grad.shape == k.shape

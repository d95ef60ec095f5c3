"""`sus_backward`: eager attention inside a block."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fx_passes import sus_backward


def _gradient(module: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    module.zero_grad()
    y = module(x)
    (y * torch.sin(torch.arange(y.numel())).view_as(y)).sum().backward()  # a norm's output has a constant square
    return y.detach(), torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None])


def test_transformer_layer() -> None:
    torch.manual_seed(0)
    module = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
    x = torch.randn(2, 100, 32)
    y0, exact = _gradient(module, x)
    with sus_backward(c=float("inf")) as sus:
        y, grad = _gradient(module, x)
        torch.testing.assert_close(y, y0)
        torch.testing.assert_close(grad, exact, rtol=1e-4, atol=1e-5)
        sus.c = 3
        y, grad = _gradient(module, x)
        other = _gradient(module, x)[1]
    assert sus.calls == 3
    torch.testing.assert_close(y, y0)
    assert float((grad - exact).norm() / exact.norm()) > 0.01
    assert not torch.equal(grad, other)
    assert sus.state.pop_kept().entries < 3 * 2 * 4 * 100 * 101
    torch.testing.assert_close(_gradient(module, x)[1], exact)


def test_gqa_backward_after_the_block_and_no_grad() -> None:
    q, k = torch.randn(1, 4, 50, 8, requires_grad=True), torch.randn(1, 2, 50, 8, requires_grad=True)
    with sus_backward(c=2, seed=1, forward="library") as sus:
        out = F.scaled_dot_product_attention(q, k, k, is_causal=True, enable_gqa=True)
        with torch.no_grad():
            F.scaled_dot_product_attention(q, q, q)
    assert sus.calls == 1
    (sparse,) = torch.autograd.grad(out.sum(), k)
    true = F.scaled_dot_product_attention(q, k, k, is_causal=True, enable_gqa=True)
    (exact,) = torch.autograd.grad(true.sum(), k)
    assert torch.equal(out, true)
    assert not torch.allclose(sparse, exact)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"c": 0}, "c must be above 0"), ({"sampler": "x"}, "sampler must be"), ({"forward": "x"}, "forward must be")],
)
def test_bad_arguments(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sus_backward(**arguments)

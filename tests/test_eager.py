"""`sus_backward`: eager attention inside a block."""

from __future__ import annotations

import threading

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fx_passes import SUSBackend, sus_attention, sus_backward
from fx_passes.torch_compat import CPU_KERNEL_HAS_GQA


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
    tolerance = 0 if CPU_KERNEL_HAS_GQA else 1e-5  # without, eager forms all weights
    torch.testing.assert_close(out, true, rtol=tolerance, atol=tolerance)
    assert not torch.allclose(sparse, exact)


def test_threads_do_not_see_each_other() -> None:
    """nn.MultiheadAttention calls attention inside of a function where the mode is off."""
    original, seen, errors = F.scaled_dot_product_attention, [], []
    start, stop = threading.Barrier(9), threading.Event()

    def layer() -> nn.Module:
        return nn.MultiheadAttention(16, 2, batch_first=True)

    def outside() -> None:
        module, x = layer(), torch.randn(1, 20, 16)
        start.wait(60)
        while not stop.is_set():
            out, _ = module(x, x, x, need_weights=False)
            names, nodes = set(), [out.grad_fn]
            while nodes:
                node = nodes.pop()
                names.add(type(node).__name__)
                nodes += [n for n, _ in node.next_functions if n is not None]
            if any("sus" in name.lower() for name in names) or F.scaled_dot_product_attention is not original:
                errors.append(names)

    def inside() -> None:
        module, x = layer(), torch.randn(1, 20, 16)
        start.wait(60)
        for _ in range(20):
            with sus_backward(c=2) as sus:
                module(x, x, x, need_weights=False)[0].sum().backward()
            seen.append(sus.calls)

    watcher = threading.Thread(target=outside)
    threads = [threading.Thread(target=inside) for _ in range(8)]
    for thread in (watcher, *threads):
        thread.start()
    for thread in threads:
        thread.join(120)
    stop.set()
    watcher.join(60)
    assert seen == [1] * 160
    assert not errors
    assert F.scaled_dot_product_attention is original


def _operands() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, 2, 40, 8, generator=generator).requires_grad_() for _ in range(3)]


def _query_gradient(operands: list[Tensor]) -> Tensor:
    out = F.scaled_dot_product_attention(*operands)
    return torch.autograd.grad((out * torch.sin(torch.arange(out.numel())).view_as(out)).sum(), operands[0])[0]


@pytest.mark.parametrize("fresh", [True, False])
def test_the_mean_over_steps_is_the_gradient(fresh: bool) -> None:
    """As much with an object per step as with one for all: 200 draws leave a noise of 0.07 of one draw's."""
    torch.manual_seed(0)
    operands = _operands()
    exact = _query_gradient(operands)
    one, draws = sus_backward(c=2), []
    for _ in range(200):
        with sus_backward(c=2) if fresh else one:
            draws.append(_query_gradient(operands))
    stacked = torch.stack(draws)
    error = (stacked.mean(0) - exact).norm()
    expected = (stacked.var(0).sum() / 200).sqrt()
    assert float(expected / exact.norm()) < 0.3
    assert float(error / expected) < 2


def test_two_ways_at_once_draw_apart() -> None:
    def run() -> list[Tensor]:
        torch.manual_seed(0)
        operands = _operands()
        ways = [
            torch.compile(F.scaled_dot_product_attention, backend=SUSBackend(c=2, compiler="eager")) for _ in range(2)
        ]
        found = [torch.autograd.grad(way(*operands).sin().sum(), operands[0])[0] for way in ways]
        found.append(torch.autograd.grad(sus_attention(*operands, c=2).sin().sum(), operands[0])[0])
        with sus_backward(c=2):
            found.append(torch.autograd.grad(F.scaled_dot_product_attention(*operands).sin().sum(), operands[0])[0])
        return found

    first = run()
    assert all(not torch.equal(a, b) for i, a in enumerate(first) for b in first[:i])
    torch._dynamo.reset()
    assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True))


def test_the_report_counts_what_was_left() -> None:
    x = torch.randn(1, 2, 6, 4, requires_grad=True)
    with sus_backward(c=2) as sus:
        F.scaled_dot_product_attention(x, x, x)
        for _ in range(2):
            F.scaled_dot_product_attention(x, x, x, torch.ones(6, 6, dtype=torch.bool), is_causal=True)
        F.scaled_dot_product_attention(x[:, :, :0], x, x)
        torch.func.grad(lambda y: F.scaled_dot_product_attention(y, x, x).sum())(x.detach())
    text = str(sus.report)
    assert (sus.report.rewritten, sus.report.left) == (1, 3)
    assert {site.mask for site in sus.report.sites} == {"-"}  # calls of all masks are counted together
    assert "2 calls" in text
    assert "attn_mask with is_causal" in text
    assert "empty tensors" in text
    assert "inside a transform of torch.func" in text


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_compiled_inside_and_around(compiler: str) -> None:
    operands = _operands()

    def inside(*operands: Tensor) -> Tensor:
        with sus:
            return F.scaled_dot_product_attention(*operands)

    sus = sus_backward(c=2)
    for function in (inside, F.scaled_dot_product_attention):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        compiled = torch.compile(function, backend=compiler, fullgraph=True)
        with sus:
            found = [torch.autograd.grad(compiled(*operands).sin().sum(), operands[0])[0] for _ in range(3)]
        assert all(not torch.equal(a, b) for i, a in enumerate(found) for b in found[:i])
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"c": 0}, "c must be above 0"), ({"sampler": "x"}, "sampler must be"), ({"forward": "x"}, "forward must be")],
)
def test_bad_arguments(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sus_backward(**arguments)

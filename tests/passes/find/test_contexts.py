"""Where attention stands: checkpoints, buffers, autocast, dropout, export, plain graphs, shared code, other passes."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fx_passes import Report, SUSBackend, explain
from fx_passes.rewrite import Options, rewrite_graph
from fx_passes.state import State
from tests.passes.harness import compare, run, tensors

SHAPE = (2, 3, 10, 5)


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).softmax(-1) @ v


def test_checkpointed_body_draws_the_same_in_its_recomputation() -> None:
    def f(q, k, v):
        return checkpoint(attention, q, k, v, use_reentrant=False)

    assert compare(f, *tensors(SHAPE, SHAPE, SHAPE)).rewritten == 1

    def gradients(g: Any) -> list[Tensor]:
        torch._dynamo.reset()
        return run(
            torch.compile(g, backend=SUSBackend(c=2, compiler="aot_eager", seed=3)), tensors(SHAPE, SHAPE, SHAPE)
        )[1]

    for a, b in zip(gradients(f), gradients(attention), strict=True):
        torch.testing.assert_close(a, b)


def test_checkpoint_in_checkpoint() -> None:
    def inner(q, k, v):
        return checkpoint(attention, q, k, v, use_reentrant=False) + 1

    def f(q, k, v):
        return checkpoint(inner, q, k, v, use_reentrant=False)

    assert compare(f, *tensors(SHAPE, SHAPE, SHAPE)).rewritten == 1


class Buffered(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("bias", torch.ones(10, 10).tril().view(1, 1, 10, 10))

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.mT).masked_fill(self.bias == 0, float("-inf")).softmax(-1) @ v


def test_causal_buffer_is_proven_and_guarded() -> None:
    model, args = Buffered(), tensors(SHAPE, SHAPE, SHAPE)
    backend = SUSBackend(c=float("inf"), compiler="eager")
    compiled = torch.compile(model, backend=backend)
    compiled(*args)
    assert [s.mask for s in backend.report.sites] == ["causal"]
    changes = [
        lambda: model.bias.fill_(1),
        lambda: model.bias.copy_(torch.ones(10, 10).triu()),
        lambda: setattr(model, "bias", torch.ones(1, 1, 10, 10).tril(2)),
        lambda: setattr(model, "bias", torch.ones(1, 1, 10, 10).tril()),
    ]
    for change in changes:
        change()
        torch.testing.assert_close(compiled(*args), model(*args))


def test_autocast_inside_and_outside() -> None:
    def inside(q, k, v):
        with torch.autocast("cpu", torch.bfloat16):
            return attention(q, k, v).float()

    args = tensors(SHAPE, SHAPE, SHAPE, dtype=torch.float32)
    assert compare(inside, *args, tol=0.05).rewritten == 1
    backend = SUSBackend(c=float("inf"), compiler="eager")
    compiled = torch.compile(attention, backend=backend)
    with torch.autocast("cpu", torch.bfloat16):
        got, expected = compiled(*args), attention(*args)
    assert got.dtype == expected.dtype
    torch.testing.assert_close(got, expected, rtol=0.05, atol=0.05)


def test_float32_island_in_autocast_stays_float32() -> None:
    def f(q, k, v):
        with torch.autocast("cpu", torch.bfloat16):
            p = (q[..., :, None, :] * k[..., None, :, :]).sum(-1).softmax(-1)
            return (p[..., None] * v[..., None, :, :]).sum(-2)

    assert compare(f, *tensors(SHAPE, SHAPE, SHAPE, dtype=torch.float32), tol=1e-5).rewritten == 1


def test_float32_softmax_of_low_precision_scores() -> None:
    def f(q, k, v):
        q, k, v = q.bfloat16(), k.bfloat16(), v.bfloat16()
        return (F.softmax(q @ k.mT, -1, dtype=torch.float32).to(q.dtype) @ v).float()

    assert compare(f, *tensors(SHAPE, SHAPE, SHAPE, dtype=torch.float32), tol=0.1).rewritten == 1


def test_dropout_keeps_the_mean() -> None:
    def f(q, k, v):
        return F.dropout((q @ k.mT).softmax(-1), 0.3, True) @ v

    backend = SUSBackend(c=4, compiler="eager")
    q, k, v = tensors((1, 1, 4, 3), (1, 1, 6, 3), (1, 1, 6, 3))
    compiled = torch.compile(f, backend=backend)
    mean = torch.stack([compiled(q, k, v) for _ in range(600)]).mean(0)
    assert backend.report.rewritten == 1
    torch.testing.assert_close(mean, attention(q, k, v), rtol=0.2, atol=0.12)


def test_dropped_weights_that_are_returned_are_left() -> None:
    def f(q, k, v):
        p = F.dropout((q @ k.mT).softmax(-1), 0.3, True)
        return p @ v, p

    backend = SUSBackend(c=4, compiler="eager")
    torch.compile(f, backend=backend)(*tensors(SHAPE, SHAPE, SHAPE))
    assert backend.report.left == 1
    assert "dropout" in backend.report.sites[0].reason


def test_multihead_attention_with_weights() -> None:
    module = nn.MultiheadAttention(12, 3, batch_first=True).double()

    def f(x):
        y, w = module(x, x, x, need_weights=True)
        return y, w

    assert compare(f, *tensors((2, 9, 12))).rewritten == 1


def test_plain_and_exported_graphs_and_idempotence() -> None:
    class M(nn.Module):
        def forward(self, q, k, v):
            return attention(q, k, v)

    args = tensors(SHAPE, SHAPE, SHAPE)
    options = Options(State(float("inf")))
    for gm in (torch.fx.symbolic_trace(M()), torch.export.export(M(), args).module()):
        report = Report()
        assert rewrite_graph(gm, options, report, args).rewritten == 1
        torch.testing.assert_close(gm(*args), attention(*args))
        before = str(gm.graph)
        assert rewrite_graph(gm, options, report, args).rewritten == 0
        assert str(gm.graph) == before


def test_uuid_follows_the_configuration() -> None:
    state = State(1.0)
    assert Options(state).uuid() == Options(state).uuid()
    assert Options(state).uuid() != Options(state, sampler="independent").uuid()


def test_custom_autograd_function_is_left_alone() -> None:
    class Mine(torch.autograd.Function):
        @staticmethod
        def forward(ctx, q, k, v):
            ctx.save_for_backward(v)
            return (q @ k.mT).softmax(-1) @ v

        @staticmethod
        def backward(ctx, g):
            return g, g, g * 2

    assert compare(lambda q, k, v: Mine.apply(q, k, v), *tensors(SHAPE, SHAPE, SHAPE)).rewritten == 0


def test_a_failure_of_the_pass_leaves_the_site(monkeypatch: Any) -> None:
    import fx_passes.rewrite.graph as graph

    def broken(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError("as a test")

    monkeypatch.setattr(graph, "Emitter", broken)
    report = compare(attention, *tensors(SHAPE, SHAPE, SHAPE))
    assert report.left == 1
    assert "ZeroDivisionError" in report.sites[0].reason


def test_explain_reports_and_rewrites_nothing() -> None:
    report = explain(attention, *tensors(SHAPE, SHAPE, SHAPE))
    assert report.rewritten == 1
    assert "would be rewritten" in str(report)


def test_nothing_as_large_as_the_scores_is_left() -> None:
    seen: list[Any] = []

    class Spy(SUSBackend):
        def __call__(self, gm, example_inputs, **kwargs):
            result = super().__call__(gm, example_inputs, **kwargs)
            seen.append(gm)
            return result

    def f(q, k, v):
        i = torch.arange(10)
        s = q @ k.mT
        s *= 0.5
        return s.masked_fill(i[None] > i[:, None], float("-inf")).softmax(-1) @ v

    torch._dynamo.reset()
    torch.compile(f, backend=Spy(c=2, compiler="eager"))(*tensors(SHAPE, SHAPE, SHAPE))
    names = [str(n.target) for n in seen[0].graph.nodes if n.op != "placeholder"]
    assert not any(word in name for name in names for word in ("softmax", "matmul", "masked_fill", "imul", "gt"))


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, 24)

    def forward(self, x: Tensor) -> Tensor:
        return x + attention(*self.qkv(x).chunk(3, -1))


class Broken(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
            torch._dynamo.graph_break()
        return x


def test_layers_that_share_one_graph_count_each() -> None:
    torch._dynamo.reset()
    model, backend = Broken(), SUSBackend(c=2, compiler="eager")
    compiled = torch.compile(model, backend=backend)
    for n in (6, 6, 9):  # the third is compiled again
        compiled(torch.randn(2, n, 8)).sum().backward()
    assert backend.report.rewritten == 3
    assert "3 of 3 attentions" in str(backend.report)
    assert explain(model, torch.randn(2, 6, 8)).rewritten == 3


def test_a_mask_that_is_used_again_is_not_taken_for_written() -> None:
    def f(q, k, v):
        seen = q[:, :1, :, :1] > -1
        for i in range(3):
            mask = seen & (k[:, :1, None, :, 0] > -i - 1)
            q = F.scaled_dot_product_attention(q, k, v, mask)
        return q

    assert compare(f, *tensors(SHAPE, SHAPE, SHAPE)).rewritten == 3


def test_mask_of_nn_transformer_breaks_no_graph() -> None:
    torch._dynamo.reset()
    model = nn.Transformer(16, 2, 1, 1, 16, dropout=0.0, batch_first=True)
    mask = nn.Transformer.generate_square_subsequent_mask(6)
    source, target = torch.randn(2, 7, 16), torch.randn(2, 6, 16)
    right = model(source, target, tgt_mask=mask)
    backend = SUSBackend(c=float("inf"), compiler="eager")
    torch.testing.assert_close(torch.compile(model, backend=backend)(source, target, tgt_mask=mask), right)
    assert backend.report.rewritten == 3


def test_autocast_around_the_compiled_code_of_torch_nn() -> None:
    """Autocast keeps the casts of parameters, which are then tensors that no operation of the trace has made."""
    module = nn.MultiheadAttention(16, 2, batch_first=True)
    for dtype in (torch.bfloat16, torch.float16):
        torch._dynamo.reset()
        backend, x = SUSBackend(c=float("inf"), compiler="eager"), torch.randn(2, 12, 16)
        with torch.autocast("cpu", dtype):
            found = torch.compile(lambda x: module(x, x, x, need_weights=False)[0], backend=backend)(x)
            exact = module(x, x, x, need_weights=False)[0]
            assert torch.is_autocast_cache_enabled()
        assert (backend.report.rewritten, backend.report.left) == (1, 0)
        torch.testing.assert_close(found, exact, atol=0.02, rtol=0.02)

"""What is compiled below a LightningModule: torch.nn's own classes, layers behind graph breaks, many fits."""

from __future__ import annotations

import gc
import pickle
import sys
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from models import LM, Attention, Plain, loader, loss_of, trainer
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from fx_passes import SUSBackend
from sus_lightning import SUSBackprop, VarianceTarget
from sus_lightning.compilation import plan

WIDTH, ROWS = 16, 24
MASK = nn.Transformer.generate_square_subsequent_mask(ROWS)
PADDING = torch.zeros(2, ROWS, dtype=torch.bool)
PADDING[:, -3:] = True


class Count(TorchFunctionMode):
    """Counts attentions in eager mode."""

    def __init__(self) -> None:
        super().__init__()
        self.count = self.inside = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        hit = getattr(func, "__name__", "") in ("scaled_dot_product_attention", "multi_head_attention_forward")
        self.count += hit and not self.inside
        self.inside += hit
        try:
            return func(*args, **(kwargs or {}))
        finally:
            self.inside -= hit


def layer(**options: Any) -> nn.Module:
    return nn.TransformerEncoderLayer(WIDTH, 2, 32, dropout=0.0, batch_first=True, **options)


def transformer(batch_first: bool) -> nn.Module:
    return nn.Transformer(WIDTH, 2, 1, 1, 32, dropout=0.0, batch_first=batch_first)


def decoder() -> nn.Module:
    return nn.TransformerDecoderLayer(WIDTH, 2, 32, dropout=0.0, batch_first=True)


def heads(**options: Any) -> nn.Module:
    return nn.MultiheadAttention(WIDTH, 2, batch_first=True, **options)


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = layer()

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.inner, x, use_reentrant=False)


class Breaks(nn.Module):
    """A layer whose attention stands behind a graph break; without `width`, it has no parameter."""

    def __init__(self, width: int = 0) -> None:
        super().__init__()
        self.project = nn.Linear(width, width) if width else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.project(x)
        torch._dynamo.graph_break()
        return x + F.scaled_dot_product_attention(y, y, y)


class BreakingActivation(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        return F.relu(x)


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = layer()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(self.inner(x))


class Methods(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = layer()

    def encode(self, x: Tensor) -> Tensor:
        return self.inner(x)


def own(module: nn.Module, x: Tensor) -> Tensor:
    return module(x)


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[Any, Tensor], Tensor]]] = {
    "Transformer": (lambda: transformer(True), lambda m, x: m(x, x, tgt_mask=MASK, src_key_padding_mask=PADDING)),
    "Transformer, rows first": (lambda: transformer(False), lambda m, x: m(x.transpose(0, 1), x.transpose(0, 1))),
    "TransformerEncoder, nested": (
        lambda: nn.TransformerEncoder(layer(), 2, enable_nested_tensor=True),
        lambda m, x: m(x, src_key_padding_mask=PADDING),
    ),
    "TransformerEncoderLayer": (layer, own),
    "TransformerDecoderLayer": (decoder, lambda m, x: m(x, x, tgt_mask=MASK)),
    "MultiheadAttention": (heads, lambda m, x: m(x, x, x, need_weights=False)[0]),
    "weights": (lambda: heads(add_zero_attn=True), lambda m, x: m(x, x, x, average_attn_weights=False)[0]),
    "bias_kv": (lambda: heads(add_bias_kv=True), lambda m, x: m(x, x, x, need_weights=False)[0]),
    "Sequentials": (lambda: nn.Sequential(layer(), nn.Sequential(layer(), BreakingActivation(), layer())), own),
    "ModuleDict": (lambda: nn.ModuleDict({"a": layer(), "b": layer()}), lambda m, x: m["b"](m["a"](x))),
    "breaking activation": (lambda: layer(activation=BreakingActivation()), own),
    "shared": (Shared, own),
    "checkpoint": (Checkpointed, own),
    "other method": (Methods, lambda m, x: m.encode(x)),
    "frozen": (lambda: nn.Sequential(layer().requires_grad_(False), layer()), own),
    "twelve behind breaks": (lambda: nn.Sequential(*(Breaks(WIDTH) for _ in range(12))), own),
    "no parameters": (lambda: nn.Sequential(*(Breaks() for _ in range(3))), own),
}


class Body(pl.LightningModule):
    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)


@pytest.mark.parametrize("case", CASES)
def test_attention_of_any_child_is_found_and_exact(case: str) -> None:
    make, call = CASES[case]
    root, x, direction = Body(make()), torch.randn(2, ROWS, WIDTH), torch.randn(2, ROWS, WIDTH)

    def gradient(c: float | None) -> Tensor:
        backend.c = c or 1.0
        given = x.clone().requires_grad_()
        y = call(root.body, given)
        (y * direction.view_as(y)).sum().backward()
        found = [given.grad, *(p.grad for p in root.parameters() if p.grad is not None)]
        root.zero_grad()
        return torch.cat([g.flatten() for g in found if g is not None])

    backend = SUSBackend(compiler="eager")
    with Count() as count:
        exact = gradient(None)
    compilation = plan(root, backend)
    compilation.enable()
    assert (gradient(float("inf")) - exact).norm() < 1e-5 * exact.norm()
    assert (gradient(2) - exact).norm() > 1e-3 * exact.norm()
    assert backend.report.rewritten == count.count > 0
    assert {site.module for site in backend.report.sites} <= dict(root.named_modules()).keys() - {""}
    compilation.clear()
    assert not any("_compiled_call_impl" in vars(m) or "forward" in vars(m) for m in root.modules())


class Mixed(Plain):
    """Two layers, and attention in the training step itself, in a disabled module, and in a frozen one."""

    def __init__(self) -> None:
        super().__init__(nn.Sequential(nn.Embedding(32, WIDTH), layer(), layer(), nn.Linear(WIDTH, 32)))
        self.disabled = heads()
        self.disabled.forward = torch.compiler.disable(self.disabled.forward)  # type: ignore[method-assign]

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        y = self.model[2](self.model[1](self.model[0](batch)))
        p = torch.softmax(y @ y.mT / 4, -1)
        y = F.dropout(p, 0.1) @ y + self.disabled(y, y, y)[0]
        with torch.no_grad():
            F.scaled_dot_product_attention(y, y, y)
        return loss_of(self.model[3](y), batch)


def test_attention_under_no_site_is_named() -> None:
    callback = SUSBackprop(4, compiler="eager", variance_every_n_steps=0)
    named = (
        r"2 of 4 attentions of this model train with SUS; these do not: Mixed \(.*test_compilation.py:\d+\), disabled"
    )
    with pytest.warns(UserWarning, match=named):
        trainer(callbacks=[callback], max_steps=1).fit(Mixed(), loader())


def test_no_warning_where_all_train() -> None:
    import warnings

    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="SUSBackprop")
        trainer(callbacks=[SUSBackprop(4, compiler="eager")], max_steps=1).fit(Plain(), loader())


class NoParameters(Plain):
    def __init__(self) -> None:
        body = nn.Sequential(*(Breaks() for _ in range(3)))
        super().__init__(nn.Sequential(nn.Embedding(32, WIDTH), body, nn.Linear(WIDTH, 32)))


@pytest.mark.parametrize("modules", [None, "attention"])
def test_each_attention_has_a_c_of_its_own(modules: Any) -> None:
    target = VarianceTarget(0.05, start=6, per="layer")
    callback = SUSBackprop(target, compiler="eager", variance_every_n_steps=2, modules=modules)
    module = NoParameters()
    trainer(callbacks=[callback], max_steps=4).fit(module, loader())
    assert [site.module for site in callback.backend.report.sites] == [f"model.1.{i}" for i in range(3)]
    assert len(set(callback.backend.state.site_c.values())) == 3
    assert not any("forward" in vars(m) for m in module.modules())
    pickle.dumps(module)


class NoLog(Plain):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return loss_of(self.model(batch), batch)


def test_equal_blocks_share_a_graph() -> None:
    torch._dynamo.utils.counters.clear()
    callback = SUSBackprop(4, compiler="eager", variance_every_n_steps=0, modules="attention")
    trainer(callbacks=[callback], max_steps=2, log_every_n_steps=100).fit(NoLog(LM(layers=5)), loader())
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert [s.module for s in callback.backend.report.sites] == [f"model.layers.{i}.attention" for i in range(5)]


def broken() -> Plain:
    module = NoLog()
    for block in module.model.layers:
        block.attention = nn.Sequential(Breaks(WIDTH), Attention())
    return module


def as_it_is(module: Plain) -> Any:
    return module


def compile_outer(module: Plain) -> Any:
    return torch.compile(module, backend="eager")


def compile_child(module: Plain) -> Any:
    module.model = torch.compile(module.model, backend="eager")
    return module


def compile_in_place(module: Plain) -> Any:
    module.model.compile(backend="eager")
    return module


def fits(count: int) -> list[int]:
    """Fits in turn: plain, compiled by the user, with probes, with graph breaks. The objects alive after each."""
    alive = []
    for i in range(count):
        make, how = (broken if i % 5 == 4 else NoLog), (as_it_is, compile_outer, compile_child, compile_in_place)[i % 4]
        callback = SUSBackprop(4, compiler="eager", variance_every_n_steps=2 if i % 3 == 0 else 0)
        # The sanity check runs what the user compiled, with Dynamo's own limit of 8.
        fit = trainer(callbacks=[callback], max_steps=4, num_sanity_val_steps=1, log_every_n_steps=100)
        fit.fit(how(make()), loader(), loader(4))
        assert callback.backend.report.rewritten == (4 if make is broken else 2)
        assert callback.backend.state.counter > 0
        gc.collect()
        alive.append(len(gc.get_objects()))
    assert torch._dynamo.config.recompile_limit == 8
    return alive


def test_fits_of_all_kinds_in_one_process() -> None:
    fits(5)


def test_no_graph_is_left_behind_graph_breaks() -> None:
    def made() -> set[str]:
        scopes = (globals(), vars(sys.modules["models"]), vars(sys.modules["fx_passes.rewrite.module_counts"]))
        return {name for scope in scopes for name in scope if name.startswith(("__compiled_fn", "__resume_at"))}

    callback = SUSBackprop(4, compiler="eager", variance_every_n_steps=0)
    before = made()  # of other tests
    trainer(callbacks=[callback], max_steps=1, log_every_n_steps=100).fit(broken(), loader())
    assert callback.backend.report.rewritten == 4
    assert made() <= before


@pytest.mark.xfail(
    reason="a fit with graph breaks keeps about 9,400 objects alive (ShapeEnvs and their caches), others about 200"
)
@pytest.mark.slow
def test_sixty_fits_in_one_process() -> None:
    alive = fits(60)
    assert alive[-1] - alive[39] < 20 * 4000  # Dynamo itself keeps some objects of each compilation

"""What is compiled below a LightningModule: torch.nn's own classes, layers behind graph breaks, many fits."""

from __future__ import annotations

import gc
import json
import pickle
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from models import LM, Attention, Plain, loader, loss_of, trainer
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
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


@dataclass
class Left:
    """What is there after a fit: objects that Python's garbage collector knows, and memory in MiB."""

    objects: int
    memory: float
    step: float  # CPU seconds of the fit's last step


class LastStep(pl.Callback):
    def on_train_batch_start(self, *args: Any) -> None:
        self.start = time.process_time()

    def on_train_batch_end(self, *args: Any) -> None:
        self.seconds = time.process_time() - self.start


def fits(count: int) -> list[Left]:
    """Fits in turn: plain, compiled by the user, with probes, with graph breaks."""
    left = []
    for i in range(count):
        make, how = (broken if i % 5 == 4 else NoLog), (as_it_is, compile_outer, compile_child, compile_in_place)[i % 4]
        callback = SUSBackprop(4, compiler="eager", variance_every_n_steps=2 if i % 3 == 0 else 0)
        # The sanity check runs what the user compiled, with Dynamo's own limit of 8.
        step = LastStep()
        fit = trainer(callbacks=[step, callback], max_steps=4, num_sanity_val_steps=1, log_every_n_steps=100)
        fit.fit(how(make()), loader(), loader(4))
        assert callback.backend.report.rewritten == (4 if make is broken else 2)
        assert callback.backend.state.counter > 0
        del fit
        gc.collect()
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        left.append(Left(len(gc.get_objects()), pages * resource.getpagesize() / 2**20, step.seconds))
    assert torch._dynamo.config.recompile_limit == 8
    return left


def test_fits_of_all_kinds_in_one_process() -> None:
    fits(5)


class Lengths(nn.Module):
    """A graph break, and an input whose length changes, so that it becomes a symbol."""

    def forward(self, x: Tensor) -> Tensor:
        y = x.sin()
        torch._dynamo.graph_break()
        y = y * x
        return F.scaled_dot_product_attention(y, y, y)


def test_what_was_traced_is_freed() -> None:
    def alive() -> int:
        gc.collect()
        return sum(type(o) in (FakeTensor, FakeTensorMode) for o in gc.get_objects())

    before = alive()
    root, backend = Body(Lengths()), SUSBackend(4, compiler="eager")
    compilation = plan(root, backend)
    compilation.enable()
    for length in (24, 32):
        x = torch.randn(2, length, WIDTH, requires_grad=True)
        root.body(x * 2).sum().backward()  # not a leaf: its fake tensor has a history, in C++
    assert alive() > before
    compilation.clear()
    assert alive() <= before


def test_sizes_of_one_module_make_none_of_another_dynamic() -> None:
    root, backend = Body(nn.ModuleDict({"a": Attention(), "b": Attention()})), SUSBackend(4, compiler="eager")
    compilation = plan(root, backend)
    compilation.enable()
    torch._dynamo.utils.counters.clear()
    root.body["a"](torch.randn(2, 24, WIDTH))
    root.body["b"](torch.randn(3, 32, WIDTH))
    root.body["b"](torch.randn(3, 40, WIDTH))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 3  # static, static, and then dynamic
    compilation.clear()


def test_no_graph_is_left_behind_graph_breaks() -> None:
    def made() -> set[str]:
        scopes = (globals(), vars(sys.modules["models"]), vars(sys.modules["fx_passes.rewrite.module_counts"]))
        return {name for scope in scopes for name in scope if name.startswith(("__compiled_fn", "__resume_at"))}

    callback = SUSBackprop(4, compiler="eager", variance_every_n_steps=0)
    before = made()  # of other tests
    trainer(callbacks=[callback], max_steps=1, log_every_n_steps=100).fit(broken(), loader())
    assert callback.backend.report.rewritten == 4
    assert made() <= before


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read from Linux's /proc")
def test_sixty_fits_in_one_process() -> None:
    """In a process without pytest, which keeps what is logged and warned of in each fit."""
    script = "import json, test_compilation as t; print(json.dumps([vars(x) for x in t.fits(60)]))"
    done = subprocess.run([sys.executable, "-c", script], cwd=Path(__file__).parent, capture_output=True, text=True)
    assert not done.returncode, done.stderr
    left = [Left(**row) for row in json.loads(done.stdout.splitlines()[-1])]
    # Dynamo itself keeps some objects of each compilation: 94, and 0.08 MiB, of these.
    assert left[-1].objects - left[19].objects < 40 * 300
    assert left[-1].memory - left[19].memory < 40 * 0.25
    steps = [median(fit.step for fit in part) for part in (left[10:30], left[40:])]
    assert steps[1] < 1.5 * steps[0]

"""Which submodules are compiled where the user names none: children, and of a stack of equal blocks its blocks."""

from __future__ import annotations

import sys
import warnings
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from models import LM, WIDTH, Attention, Block, Plain, equal, loader, loss_of, trainer, weights
from torch import Tensor, nn

from sus_lightning import SUSBackprop, VarianceTarget
from sus_lightning.targets import is_stack, targets


class Masked(Block):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return super().forward(x)


class Wider(Block):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(WIDTH, width), nn.GELU(), nn.Linear(width, WIDTH))


def compiled() -> nn.Module:
    block = Block()
    block.compile(backend="eager")
    return block


def stack(*blocks: nn.Module) -> nn.Module:
    model = LM(layers=0)
    model.layers.extend(blocks)
    return model


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (stack(*(Block() for _ in range(4))), True),
        (nn.Sequential(*(Block() for _ in range(5)), nn.Linear(WIDTH, 2)), True),
        (stack(*(Block() for _ in range(3))), False),
        (stack(*(Masked() for _ in range(4))), False),
        (stack(*(Wider(8 * i) for i in range(1, 5))), False),
        (stack(*(Block() for _ in range(3)), compiled()), False),
        (nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2), 6), False),
        (nn.Sequential(*(nn.Linear(2, 2) for _ in range(6))), False),
    ],
)
def test_a_stack_has_equal_blocks_of_one_argument(model: nn.Module, expected: bool) -> None:
    assert is_stack(model) is expected


@pytest.mark.skipif(sys.version_info < (3, 14), reason="annotations are evaluated where a function is defined")
def test_annotations_for_type_checkers_alone() -> None:
    source = "def forward(self, x: Missing) -> Missing: return Block.forward(self, x)"
    names: dict[str, Any] = {"Block": Block}
    exec(compile(source, "annotated.py", "exec", dont_inherit=True), names)
    annotated = type("Annotated", (Block,), {"forward": names["forward"]})
    with pytest.raises(NameError):
        _ = annotated.forward.__annotations__
    assert is_stack(stack(*(annotated() for _ in range(4))))


def paths(root: nn.Module, modules: Any = None, blocks: bool = True) -> list[str]:
    return [target.path for target in targets(root, modules, blocks)]


def test_names_win() -> None:
    module = Plain(LM(layers=4))
    assert paths(module) == [f"model.layers.{i}" for i in range(4)]
    assert paths(module, blocks=False) == ["model"]
    assert paths(module, ["model"]) == ["model"]
    module.model, module.layers = nn.Linear(2, 2), module.model.layers
    assert paths(module) == [f"layers.{i}" for i in range(4)]


class NoLog(Plain):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return loss_of(self.model(batch), batch)


def fit(module: Plain, steps: int = 2) -> SUSBackprop:
    torch._dynamo.utils.counters.clear()
    callback = SUSBackprop(4, compiler="eager", variance_every_n_steps=0)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="SUSBackprop")
        trainer(callbacks=[callback], max_steps=steps, log_every_n_steps=100).fit(module, loader())
    return callback


def test_a_stack_is_compiled_once() -> None:
    callback = fit(NoLog(LM(layers=4)))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert [s.module for s in callback.backend.report.sites] == [f"model.layers.{i}.attention" for i in range(4)]
    assert callback.backend.report.rewritten == 4


class Pooled(LM):
    """Attention in a method of the module that holds the stack."""

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.head(F.scaled_dot_product_attention(x, x, x))


@pytest.mark.skipif(
    not hasattr(torch.utils._python_dispatch.TorchDispatchMode, "ignore_compile_internals"), reason="no watch"
)
def test_attention_beside_the_blocks_trains_too() -> None:
    module = NoLog(Pooled(layers=4))
    callback = fit(module, steps=3)
    assert [s.module for s in callback.backend.report.sites] == [
        *(f"model.layers.{i}.attention" for i in range(4)),
        "model",
    ]
    assert callback.backend.report.rewritten == 5
    assert callback.backend.state.counter > 0
    assert callback.state_dict()["by_blocks"] is False
    resumed = SUSBackprop(4, compiler="eager")
    resumed.load_state_dict(callback.state_dict())
    assert not resumed._by_blocks  # a resumed run compiles the whole child at once
    assert not any("_compiled_call_impl" in vars(m) for m in module.modules())


def test_module_that_is_a_stack_itself() -> None:
    module = NoLog(nn.Sequential(nn.Embedding(32, WIDTH), *(Attention() for _ in range(4)), nn.Linear(WIDTH, 32)))
    assert fit(module).backend.report.rewritten == 4


def compiled_model(module: NoLog) -> NoLog:
    module.model = torch.compile(module.model)  # type: ignore[assignment]
    return module


def compiled_blocks(module: NoLog) -> NoLog:
    for layer in module.model.layers:
        layer.compile()
    return module


@pytest.mark.slow
@pytest.mark.parametrize("make", [lambda module: module, compiled_model, compiled_blocks])
@pytest.mark.parametrize("per", ["model", "layer"])
def test_a_stack_under_inductor(make: Any, per: Any) -> None:
    """bf16-mixed, accumulation and probes; c = inf trains as eager code does."""

    def losses(c: Any) -> list[float]:
        torch.manual_seed(0)
        module, seen = make(NoLog(LM(layers=4))), []
        callback = SUSBackprop(c, variance_every_n_steps=2)
        torch._dynamo.reset()
        options = {"precision": "bf16-mixed", "accumulate_grad_batches": 2, "max_steps": 4, "log_every_n_steps": 100}
        fit = trainer(callbacks=[callback, Seen(seen)], **options)
        fit.fit(module, loader())
        assert callback.backend.report.rewritten == 4
        if isinstance(c, VarianceTarget):
            assert len(callback.backend.state.site_c) == (4 if per == "layer" else 0)
        return seen

    exact, noisy = losses(float("inf")), losses(VarianceTarget(0.05, start=4, per=per))
    torch.manual_seed(0)
    eager: list[float] = []
    options = {"precision": "bf16-mixed", "accumulate_grad_batches": 2, "max_steps": 4, "log_every_n_steps": 100}
    trainer(callbacks=[Seen(eager)], **options).fit(NoLog(LM(layers=4)), loader())
    assert exact == pytest.approx(eager, rel=2e-2)
    assert noisy == pytest.approx(eager, rel=0.2)
    assert noisy != exact


class Seen(pl.Callback):
    """Losses of the training steps."""

    def __init__(self, losses: list[float]) -> None:
        self.losses = losses

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, *args: Any) -> None:
        self.losses.append(float(outputs["loss"]))


class Listed(Plain):
    """A model in a plain list, which the optimizer knows and the module does not; optimized by hand."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(2, 2))
        self.hidden, self.automatic_optimization = [LM()], False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()
        loss = loss_of(self.hidden[0](batch), batch)
        self.manual_backward(loss / 2)
        if batch_idx % 2:
            optimizer.step()
            optimizer.zero_grad()

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.hidden[0].parameters(), lr=1e-2)


def test_modules_in_plain_lists_train_and_probes_leave_their_gradients() -> None:
    def trained(every: int) -> dict[str, Tensor]:
        torch.manual_seed(0)
        module, callback = Listed(), SUSBackprop(4, compiler="eager", variance_every_n_steps=every, seed=0)
        trainer(callbacks=[callback], max_steps=4).fit(module, loader())
        assert [s.module for s in callback.backend.report.sites] == [f"hidden.0.layers.{i}.attention" for i in range(2)]
        assert "_compiled_call_impl" not in vars(module.hidden[0])
        return weights(module.hidden[0])

    assert equal(trained(0), trained(2))

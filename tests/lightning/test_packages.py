"""Projects import `lightning.pytorch` or `pytorch_lightning`: the same code, other classes. Both work, and mixed."""

from __future__ import annotations

import csv
from importlib import import_module
from pathlib import Path
from typing import Any

import lightning.pytorch
import pytest
import torch
from models import LM, Nasty, Plain, equal, loader, loss_of, weights
from torch import nn
from torchmetrics import MeanMetric

from fx_passes import SUSBackend
from sus_lightning import SUSBackprop, _lightning_compat
from sus_lightning.gradients import muted
from sus_lightning.snapshot import _device
from sus_lightning.strategies import check_strategy, is_sharded

pytorch_lightning = pytest.importorskip("pytorch_lightning")
PACKAGES = [lightning.pytorch, pytorch_lightning]
each = pytest.mark.parametrize("package", PACKAGES, ids=lambda p: p.__name__)


class Twin(pytorch_lightning.LightningModule):  # type: ignore[misc, name-defined]
    """`Nasty` of the other package."""

    def __init__(self) -> None:
        super().__init__()
        self.model, self.lr = LM(dropout=0.1, batch_norm=True), 1e-2
        self.mean, self.calls = MeanMetric(), 0
        self.losses: list[Any] = []
        self.by_name: dict[str, Any] = {"seen": [], "sum": torch.zeros(())}
        self.register_buffer("average", torch.zeros(()))

    training_step = Nasty.training_step
    validation_step = Plain.validation_step
    configure_optimizers = Plain.configure_optimizers


def module_of(package: Any) -> Any:
    return Nasty() if package is lightning.pytorch else Twin()


def trainer_of(package: Any, **options: Any) -> Any:
    defaults = {"accelerator": "cpu", "devices": 1, "logger": False, "enable_checkpointing": False, "max_epochs": 2}
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0}
    return package.Trainer(**{**defaults, **quiet, "log_every_n_steps": 1, **options})


def sus(every: int = 2, c: Any = 4) -> SUSBackprop:
    return SUSBackprop(c, compiler="eager", variance_every_n_steps=every)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch._dynamo.reset()
    lightning.pytorch.seed_everything(0, verbose=False)


@each
def test_probes_leave_no_trace_in_weights_and_logs(package: Any, tmp_path: Path) -> None:
    def run(every: int) -> tuple[dict[str, Any], list[dict[str, str]], Any]:
        torch._dynamo.reset()
        package.seed_everything(0, verbose=False)
        module = module_of(package)
        logger = package.loggers.CSVLogger(tmp_path, version=every)
        fit = trainer_of(package, callbacks=[sus(every)], logger=logger)
        fit.fit(module, loader(24), loader(4))
        with (Path(logger.log_dir) / "metrics.csv").open() as file:
            rows = list(csv.DictReader(file))
        own = [{k: v for k, v in row.items() if not k.startswith("sus/")} for row in rows]
        return weights(module), [row for row in own if any(v for k, v in row.items() if k != "step")], fit

    probed, logged, fit = run(2)
    plain, expected, _ = run(0)
    assert fit.callback_metrics["sus/relative_variance"] > 0
    assert equal(probed, plain)
    assert any(row["loss_epoch"] for row in logged)
    assert [{k: v for k, v in row.items() if k != "epoch"} for row in logged] == [
        {k: v for k, v in row.items() if k != "epoch"} for row in expected
    ]


@each
def test_a_trainer_takes_it_without_a_list(package: Any) -> None:
    callback = sus(0)
    assert isinstance(callback, package.Callback)
    fit = trainer_of(package, callbacks=callback, max_steps=1)
    fit.fit(module_of(package), loader(4))
    assert callback.backend.report.rewritten == 2


@each
def test_errors_are_of_the_project_s_own_package(package: Any) -> None:
    error = package.utilities.exceptions.MisconfigurationException
    module = module_of(package)
    module.model = nn.Sequential(nn.Embedding(32, 8), nn.Sequential(nn.Linear(8, 32)))
    with pytest.raises(error, match="rewrote no attention"):
        trainer_of(package, callbacks=[sus(0)], max_steps=1).fit(module, loader(4))


@each
def test_strategies_are_known_by_either_package(package: Any) -> None:
    def with_strategy(name: str) -> Any:
        cls = getattr(package.strategies, name)

        class Pretends:
            strategy = cls.__new__(cls)

        return Pretends()

    assert is_sharded(with_strategy("FSDPStrategy"))
    assert is_sharded(with_strategy("ModelParallelStrategy"))
    assert not is_sharded(with_strategy("DDPStrategy"))
    with pytest.raises(package.utilities.exceptions.MisconfigurationException, match="DeepSpeedStrategy"):
        check_strategy(with_strategy("DeepSpeedStrategy"))


@each
def test_a_lightning_module_is_known_and_muted(package: Any) -> None:
    module = module_of(package)
    inner = module_of(next(p for p in PACKAGES if p is not package))  # as where a library's model is a part of another
    module.inner = inner
    assert _lightning_compat.is_lightning_module(module)
    assert not _lightning_compat.is_lightning_module(module.model)
    assert _device(module) == torch.device("cpu")
    fit = trainer_of(package)
    with muted(fit, module):
        assert "log" in vars(module)
        assert "log_dict" in vars(inner)
    assert "log" not in vars(module)


def test_one_callback_in_fits_of_both_packages() -> None:
    callback = sus()
    for package in PACKAGES:
        fit = trainer_of(package, callbacks=[callback], max_steps=4)
        fit.fit(module_of(package), loader(24))
        assert callback.backend.report.rewritten == 2
        assert fit.callback_metrics["sus/relative_variance"] > 0


@each
def test_private_attributes_of_lightning(package: Any) -> None:
    """What `_lightning_compat` reads, at each batch of a fit that accumulates two and logs every second step."""
    seen: list[tuple[bool, bool, int, int]] = []

    class Look(SUSBackprop):
        def on_train_batch_end(self, fit: Any, *args: Any) -> None:
            super().on_train_batch_end(fit, *args)
            read = _lightning_compat
            optimizers = read.wrapped_optimizers(fit)
            assert [o.optimizer for o in optimizers] == fit.optimizers
            seen.append((read.logs_now(fit), read.accumulates(fit), read.logged_step(fit), fit.global_step))

    module = module_of(package)
    fit = trainer_of(
        package,
        callbacks=[Look(4, compiler="eager", variance_every_n_steps=0)],
        max_epochs=1,
        accumulate_grad_batches=2,
        log_every_n_steps=2,
    )
    fit.fit(module, loader(32))
    assert [accumulates for _, accumulates, _, _ in seen] == [True, False] * 4
    assert [step for _, _, _, step in seen] == [0, 1, 1, 2, 2, 3, 3, 4]
    written = [(now, logged) for now, accumulates, logged, _ in seen if not accumulates]
    assert written == [(False, 0), (True, 1), (False, 2), (True, 3)]  # at every second step, from 0
    assert vars(module).keys() >= {"_trainer", "_compiler_ctx", "_fabric"} == _lightning_compat.OWN_ATTRIBUTES


@each
def test_what_torch_compile_made_of_a_lightning_module(package: Any) -> None:
    module = module_of(package)
    forward, training_step = module.forward, module.training_step
    assert _lightning_compat.compiled_as(module) == (None, {})
    from_compiled = import_module(f"{package.__name__}.utilities.compile").from_compiled  # as Trainer.fit calls it
    compiled, originals = _lightning_compat.compiled_as(from_compiled(torch.compile(module, backend="eager")))
    assert callable(compiled)
    assert originals == {"forward": forward, "training_step": training_step}
    assert module.training_step != training_step


@pytest.mark.parametrize("fabric_package", ["lightning.fabric", "lightning_fabric"])
@each
def test_fabric_with_modules_of_either_package(package: Any, fabric_package: str) -> None:
    fabric = pytest.importorskip(fabric_package).Fabric(accelerator="cpu", devices=1)
    module, backend = module_of(package), SUSBackend(c=4, compiler="eager")
    optimizer = torch.optim.Adam(module.parameters(), 1e-2)
    module.forward = lambda tokens: module.model(tokens)
    module.model.compile(backend=backend)
    ready, optimizer = fabric.setup(module, optimizer)
    for tokens in loader(8):
        loss = loss_of(ready(tokens), tokens)
        fabric.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
    assert backend.report.rewritten == 2
    kept = backend.state.pop_kept()
    assert 0 < kept.entries / kept.rows <= 4

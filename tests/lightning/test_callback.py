"""SUSBackprop: enabling and restoring, what the user compiled, schedules, checkpoints, logging."""

from __future__ import annotations

from inspect import signature
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, seed_everything
from lightning.pytorch.callbacks import (
    EarlyStopping,
    GradientAccumulationScheduler,
    LearningRateMonitor,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import DeepSpeedStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from models import LM, Plain, equal, loader, loss_of, trainer, weights
from torch import nn

from sus_lightning import ConstantSchedule, LinearSchedule, SUSBackprop, VarianceTarget
from sus_lightning.compilation import plan


def sus(c: Any = 4, **options: Any) -> SUSBackprop:
    return SUSBackprop(c, **{"compiler": "eager", "variance_every_n_steps": 0, **options})


def compiled_attributes(module: nn.Module) -> dict[str, Any]:
    found = {}
    for name, m in module.named_modules():
        found[name] = [vars(m).get(key) for key in ("_compiled_call_impl", "forward", "training_step")]
    return found


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch._dynamo.reset()  # the tests share the models' code, and each has a backend of its own
    seed_everything(0, verbose=False)


def test_sus_trains_and_the_module_is_given_back() -> None:
    module, callback = Plain(), sus()
    keys, before = list(module.state_dict()), compiled_attributes(module)
    inside = {}

    class Look(Callback):
        def on_train_batch_end(self, fit: Any, pl_module: Any, *_: Any) -> None:
            inside["compiled"] = pl_module.model._compiled_call_impl is not None
            inside["keys"] = list(pl_module.state_dict())

    fit = trainer(callbacks=[callback, Look()])
    fit.fit(module, loader())
    assert inside == {"compiled": True, "keys": keys}
    assert callback.backend.report.rewritten == 2
    assert compiled_attributes(module) == before
    assert list(module.state_dict()) == keys
    assert fit.callback_metrics["sus/attention_rewritten"] == 2
    assert 0 < fit.callback_metrics["sus/kept_per_row"] <= 4
    assert 0 < fit.callback_metrics["sus/kept_fraction"] < 1


def test_c_changes_the_gradient_and_infinity_is_exact() -> None:
    def trained(callbacks: list[Callback]) -> dict[str, torch.Tensor]:
        seed_everything(0, verbose=False)
        module = Plain()
        trainer(callbacks=callbacks, max_steps=4).fit(module, loader())
        return weights(module)

    exact = trained([])
    sparse, infinite = trained([sus(2)]), trained([sus(float("inf"))])
    # A bias of all keys does not change the softmax: its gradient is rounding, of which Adam makes whole steps.
    names = [name for name in exact if not name.endswith("k_proj.bias")]
    difference = max(float((sparse[k] - exact[k]).abs().max()) for k in names)
    rounding = max(float((infinite[k] - exact[k]).abs().max()) for k in names)
    assert difference > 1e-3
    assert rounding < 1e-4


ROWS_PER_LAYER = 4 * 2 * 48  # batch, heads, length


def compile_outer(module: Plain) -> Any:
    return torch.compile(module, backend="eager")


def compile_child(module: Plain) -> Any:
    module.model = torch.compile(module.model, backend="eager")
    return module


def compile_in_place(module: Plain) -> Any:
    module.model.compile(backend="eager")
    return module


def compile_outer_in_place(module: Plain) -> Any:
    module.compile(backend="eager")
    return module


def compile_layers(module: Plain) -> Any:
    for layer in module.model.layers:
        layer.compile(backend="eager")
    return module


def compile_layers_as_modules(module: Plain) -> Any:
    module.model.layers = nn.ModuleList(torch.compile(layer, backend="eager") for layer in module.model.layers)
    return module


class NoLog(Plain):
    """Dynamo cannot trace `self.log` in a training step that the user compiled."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        logits = self.model(batch)
        return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten())


@pytest.mark.parametrize(
    "how",
    [compile_outer, compile_child, compile_in_place, compile_outer_in_place, compile_layers, compile_layers_as_modules],
)
def test_what_the_user_compiled_trains_with_sus_and_is_given_back(how: Any) -> None:
    module = NoLog()
    given = how(module)
    keys = list(module.state_dict())
    callback = sus()
    seen: dict[str, Any] = {}

    class Look(Callback):
        def on_fit_start(self, fit: Any, pl_module: Any) -> None:
            seen["before"] = compiled_attributes(pl_module)

        def on_train_batch_end(self, *_: Any) -> None:
            seen["rows"] = callback.backend.state.kept.rows

    # Before SUSBackprop's hooks run, so as to see what from_compiled leaves.
    fit = trainer(callbacks=[Look(), callback], max_steps=2, log_every_n_steps=100)
    fit.fit(given, loader())
    # Layers that are compiled one by one share a graph, hence a site; each call of it draws anew.
    assert callback.backend.report.rewritten in (1, 2)
    assert seen["rows"] == 2 * 2 * ROWS_PER_LAYER
    assert compiled_attributes(module) == seen["before"]
    assert list(module.state_dict()) == keys


def test_the_users_mode_is_kept() -> None:
    module = Plain()
    module.model = torch.compile(module.model, options={"epilogue_fusion": False}, dynamic=True, fullgraph=True)
    recorded: list[Any] = []

    def backend(gm: Any, inputs: Any, **kwargs: Any) -> Any:
        recorded.append(kwargs)
        return gm

    compilation = plan(module, backend)
    compilation.enable()
    module.model(next(iter(loader())))
    compilation.disable()
    assert recorded == [{"options": {"epilogue_fusion": False}}]


def test_validation_runs_the_untouched_forward() -> None:
    outputs: list[torch.Tensor] = []

    class Validates(Plain):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            assert self.model._compiled_call_impl is None
            outputs.append(self.model(batch))
            with torch.no_grad():
                assert torch.equal(outputs[-1], self.model.forward(batch))

    module = Validates()
    trainer(callbacks=[sus(compiler="aot_eager")], max_steps=4, val_check_interval=2).fit(module, loader(), loader(4))
    assert len(outputs) == 2
    # and training goes on with SUS between and after validations
    assert outputs[0].shape == outputs[1].shape
    assert not torch.equal(outputs[0], outputs[1])


def test_training_after_a_validation_has_sus_again() -> None:
    callback = sus()
    rows: list[float] = []

    class Rows(Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            rows.append(callback.backend.state.kept.rows)

    trainer(callbacks=[Rows(), callback], max_steps=4, val_check_interval=2, log_every_n_steps=1000).fit(
        Plain(), loader(), loader(4)
    )
    assert all(b > a for a, b in pairwise(rows))


def test_a_schedule_never_recompiles() -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled, cs = [], []

    class Count(Callback):
        def on_train_batch_end(self, fit: Any, *_: Any) -> None:
            counters = torch._dynamo.utils.counters
            compiled.append((sum(counters["frames"].values()), counters["stats"]["unique_graphs"]))
            cs.append(callback.c)

    callback = sus(LinearSchedule(40, 4, steps=6), compiler="aot_eager")
    trainer(callbacks=[callback, Count()]).fit(Plain(), loader())
    assert compiled[0][1] > 0
    assert len(set(compiled)) == 1
    assert cs == [40, 34, 28, 22, 16, 10, 4, 4]


class Resumable:
    """A loader that says where it is, as mid-epoch checkpoints need it."""

    def __init__(self) -> None:
        self.batches, self.at = list(loader(32)), 0

    def __iter__(self) -> Any:
        if self.at >= len(self.batches):  # a loader with a length is not run to its end
            self.at = 0
        while self.at < len(self.batches):
            self.at += 1
            yield self.batches[self.at - 1]

    def __len__(self) -> int:
        return len(self.batches)

    def state_dict(self) -> dict[str, int]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.at = state["at"]


def saved_run(folder: Path, schedule: Any, data: Any, resume: str | None = None, **options: Any) -> Any:
    """A run of three epochs that saves after step 6 or each epoch: module, callback, path of the first checkpoint."""
    seed_everything(5, verbose=False)
    module, callback = Plain(), sus(schedule, variance_every_n_steps=2)
    every = {"every_n_train_steps": 5} if isinstance(data, Resumable) else {"save_on_train_epoch_end": True}
    checkpoint = ModelCheckpoint(folder, filename="{step}", save_top_k=-1, **every)
    fit = trainer(callbacks=[callback, checkpoint], max_steps=-1, max_epochs=2, enable_checkpointing=True, **options)
    # Lightning 2.5 has no such argument, and loads whole objects by default.
    whole = {"weights_only": False} if resume and "weights_only" in signature(fit.fit).parameters else {}
    fit.fit(module, data, ckpt_path=resume, **whole)
    return module, callback, str(min(folder.glob("*.ckpt"), key=lambda p: int(p.stem.split("=")[1])))


@pytest.mark.parametrize("case", ["constant", "target", "target accumulated", "target per layer", "mid-epoch"])
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path: Path, case: str) -> None:
    def run(folder: str, resume: str | None = None) -> Any:
        per = "layer" if "layer" in case else "model"
        schedule = VarianceTarget(0.05, start=6, per=per) if "target" in case else 4
        data = Resumable() if case == "mid-epoch" else loader(32)
        accumulate = 2 if "accumulated" in case else 1
        return saved_run(tmp_path / folder, schedule, data, resume, accumulate_grad_batches=accumulate)

    whole, a, checkpoint = run("whole")
    resumed, b, _ = run("resumed", checkpoint)
    assert a.backend.state.counter == b.backend.state.counter
    assert a.c == b.c
    assert equal(weights(resumed), weights(whole))
    assert a.backend.state.site_c == b.backend.state.site_c
    assert (len(a.backend.state.site_c) == 2) == ("layer" in case)
    if "target" in case:
        assert a.c != 6


def test_a_checkpoint_keeps_c_and_counter(tmp_path: Path) -> None:
    callback = sus(VarianceTarget(0.05, start=6), variance_every_n_steps=2)
    fit = trainer(callbacks=[callback])
    fit.fit(Plain(), loader())
    fit.save_checkpoint(tmp_path / "a.ckpt")
    saved = torch.load(tmp_path / "a.ckpt", weights_only=True)["callbacks"]["SUSBackprop"]
    assert saved["c"] == callback.c
    assert saved["counter"] == callback.backend.state.counter > 0
    assert saved["schedule"] == callback.schedule.state_dict()
    assert saved["schedule"]["c"] == callback.c


def test_a_run_per_layer_can_go_on_with_one_c() -> None:
    per_layer = sus(VarianceTarget(0.05, start=6, per="layer"), variance_every_n_steps=2)
    trainer(callbacks=[per_layer], max_steps=3).fit(Plain(), loader())
    assert len(per_layer.state_dict()["site_c"]) == 2
    constant = sus(7)
    constant.load_state_dict(per_layer.state_dict())
    trainer(callbacks=[constant], max_steps=1).fit(Plain(), loader())
    assert [constant.backend.state.c_of(site) for site in (0, 1)] == [7, 7]


def test_fit_twice_and_with_another_module() -> None:
    callback, module = sus(), Plain()
    trainer(callbacks=[callback], max_steps=2).fit(module, loader())
    counter = callback.backend.state.counter
    trainer(callbacks=[callback], max_steps=2).fit(module, loader())
    assert callback.backend.state.counter > counter  # other draws than in the first fit
    without = Plain(nn.Sequential(nn.Embedding(32, 8), nn.Sequential(nn.Linear(8, 32))))
    with pytest.raises(MisconfigurationException, match="rewrote no attention of Plain"):
        trainer(callbacks=[callback], max_steps=2).fit(without, loader())


@pytest.mark.parametrize("error", [ArithmeticError, KeyboardInterrupt])
def test_an_exception_in_fit_gives_the_module_back(error: type[BaseException]) -> None:
    class Fails(Callback):
        def on_train_batch_end(self, fit: Any, *_: Any) -> None:
            if fit.global_step == 2:
                raise error("planted")

    module = Plain()
    before = compiled_attributes(module)
    with pytest.raises((error, SystemExit)):
        trainer(callbacks=[sus(), Fails()]).fit(module, loader())
    assert compiled_attributes(module) == before


def test_modules_created_in_configure_model() -> None:
    class Late(Plain):
        def __init__(self) -> None:
            super().__init__(nn.Identity())

        def configure_model(self) -> None:
            if isinstance(self.model, nn.Identity):
                self.model = LM()

    callback = sus()
    trainer(callbacks=[callback], max_steps=2).fit(Late(), loader())
    assert callback.backend.report.rewritten == 2


def test_attention_in_items_of_a_module_list_of_the_lightning_module() -> None:
    class Flat(Plain):
        def __init__(self) -> None:
            super().__init__(nn.Identity())
            inner = LM()
            self.embedding, self.layers, self.head = inner.embedding, inner.layers, inner.head
            self.criterion = nn.CrossEntropyLoss()

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            x = self.embedding(batch)
            for layer in self.layers:
                x = layer(x)
            return self.criterion(self.head(x)[:, :-1].flatten(0, 1), batch[:, 1:].flatten())

    callback = sus()
    trainer(callbacks=[callback], max_steps=2).fit(Flat(), loader())
    assert callback.backend.report.rewritten > 0
    assert callback.backend.state.counter == 4  # two layers, two steps


def test_many_fits_in_one_process() -> None:
    for _ in range(10):  # Dynamo's own limit is 8 compilations per code object
        callback = sus()
        trainer(callbacks=[callback], max_steps=1).fit(Plain(), loader())
        assert callback.backend.report.rewritten == 2
    assert torch._dynamo.config.recompile_limit == 8


def test_no_attention_is_an_error_with_the_report() -> None:
    module = Plain(nn.Sequential(nn.Embedding(32, 8), nn.Linear(8, 32)))
    with pytest.raises(MisconfigurationException, match=r"(?s)rewrote no attention of Plain.*No softmax attention"):
        trainer(callbacks=[sus()]).fit(module, loader())
    assert module.model._compiled_call_impl is None


def test_many_callbacks_at_once(tmp_path: Path) -> None:
    """Among them one that changes accumulation in mid-run, and one that copies the module."""
    batches: list[int] = []

    class Accumulation(SUSBackprop):
        def on_train_batch_end(self, *args: Any) -> None:
            super().on_train_batch_end(*args)
            batches.append(self._probe.metric.batches_per_step)  # type: ignore[union-attr]

    def run(every: int) -> tuple[Plain, Any]:
        torch._dynamo.reset()
        seed_everything(0, verbose=False)
        module, callback = Plain(), (Accumulation if every else SUSBackprop)(4, "systematic", "eager", every)
        others = [
            GradientAccumulationScheduler({1: 3}),
            StochasticWeightAveraging(1e-2, swa_epoch_start=1),
            EarlyStopping("sus/kept_per_row", patience=100, check_on_train_epoch_end=True),
            ModelCheckpoint(tmp_path, monitor="val_loss"),
            LearningRateMonitor(),
        ]
        fit = trainer(
            callbacks=[*others[:2], callback, *others[2:]],
            max_steps=-1,
            max_epochs=3,
            logger=CSVLogger(tmp_path),
            enable_checkpointing=True,
        )
        fit.fit(module, loader(40), loader(4))
        return module, fit

    probed, fit = run(2)
    plain, _ = run(0)
    assert fit.callback_metrics["sus/relative_variance"] > 0
    assert {1, 3} <= set(batches)
    assert equal(weights(probed), weights(plain))


def test_two_of_it_are_refused() -> None:
    with pytest.raises(RuntimeError, match="more than one stateful callback of type `SUSBackprop`"):
        trainer(callbacks=[sus(), sus()])


def test_a_schedule_that_returns_nonsense_is_named() -> None:
    def halves(step: int) -> Any:
        return {0: 30, 1: -1}[step]

    with pytest.raises(ValueError, match=r"schedule .*halves returned for step 1 must be above 0.*-1"):
        trainer(callbacks=[sus(halves)]).fit(Plain(), loader())
    with pytest.raises(TypeError, match=r"schedule .*lambda.* returned for step 0 must be a number.*None"):
        trainer(callbacks=[sus(lambda step: None)]).fit(Plain(), loader())


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "negative c": ({"c": -1}, "c must be above 0.*-1"),
    "zero c": ({"c": 0}, "c must be above 0.*0"),
    "nan": ({"c": float("nan")}, "c must be above 0.*nan"),
    "text": ({"c": "30"}, "c must be 'auto', a number above 0.*'30'"),
    "bool": ({"c": True}, "c must be 'auto', a number above 0.*True"),
    "class": ({"c": ConstantSchedule}, "c must be 'auto', a number above 0"),
    "empty dict": ({"c": {}}, "milestones must be a dict"),
    "dict without 0": ({"c": {5: 3}}, "milestones must say what c is at step 0"),
    "sampler": ({"sampler": "dense"}, "sampler must be one of 'auto', 'systematic'.*'dense'"),
    "compiler": ({"compiler": "nvcc"}, "compiler must be one of 'inductor'.*'nvcc'"),
    "interval": ({"variance_every_n_steps": -1}, "variance_every_n_steps must be at least 0.*-1"),
    "interval type": ({"variance_every_n_steps": 2.5}, "variance_every_n_steps must be an int.*2.5"),
    "draws": ({"variance_draws": 0}, "variance_draws must be at least 1.*0"),
    "seed": ({"seed": "a"}, "seed must be an int or None.*'a'"),
    "forward": ({"forward": "sdpa"}, "forward must be one of 'auto', 'library'.*'sdpa'"),
    "variance per": ({"variance_per": "head"}, "variance_per must be one of 'kind', 'layer'.*'head'"),
    "mode": ({"mode": "fast"}, "mode must be None or one of.*'fast'"),
    "mode without inductor": ({"mode": "default", "compiler": "eager"}, "mode is for compiler='inductor'"),
    "modules": ({"modules": "model"}, "modules must be a list.*'model'"),
    "no modules": ({"modules": []}, "modules must name at least one"),
    "target without probes": ({"c": VarianceTarget(), "variance_every_n_steps": 0}, "variance_every_n_steps must be"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_are_named(case: str) -> None:
    arguments, message = BAD[case]
    with pytest.raises((TypeError, ValueError), match=message):
        SUSBackprop(**arguments)


def test_a_module_that_is_not_there_is_named() -> None:
    with pytest.raises(ValueError, match=r"modules must name submodules of Plain.*'modle'"):
        trainer(callbacks=[sus(modules=["modle"])]).fit(Plain(), loader())


def test_deepspeed_is_refused() -> None:
    class Pretends:
        strategy = DeepSpeedStrategy.__new__(DeepSpeedStrategy)

    with pytest.raises(MisconfigurationException, match="does not support the strategy DeepSpeedStrategy"):
        sus().setup(Pretends(), Plain(), "fit")  # type: ignore[arg-type]


def test_import_compiles_nothing_and_the_pass_needs_no_lightning() -> None:
    import subprocess
    import sys

    code = "import sys, fx_passes; assert 'lightning' not in sys.modules and 'torchmetrics' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
    code = "import torch, sus_lightning; assert not torch._dynamo.utils.counters['frames']"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_second_fit_reports_the_module_as_it_is_then() -> None:
    module, callback = Plain(), sus()
    trainer(callbacks=[callback]).fit(module, loader())
    module.model = LM(layers=1)
    trainer(callbacks=[callback]).fit(module, loader())
    assert callback.summary is not None
    assert callback.summary.rewritten == callback.backend.report.rewritten == 1
    module.model = nn.Sequential(nn.Embedding(32, 8), nn.Sequential(nn.Linear(8, 32)))
    with pytest.raises(MisconfigurationException, match="rewrote no attention"):
        trainer(callbacks=[callback]).fit(module, loader())


def test_a_step_that_is_skipped_says_nothing_of_attention() -> None:
    class Skips(Plain):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return super().training_step(batch, batch_idx) if batch_idx % 2 else None

    callback = sus()
    trainer(callbacks=[callback]).fit(Skips(), loader())
    assert callback.backend.report.rewritten == 2


@pytest.mark.parametrize("every", [0, 2])
def test_a_step_that_takes_the_iterator(every: int) -> None:
    class Takes(Plain):
        def training_step(self, dataloader_iter: Any) -> Any:  # type: ignore[override]
            batch, _, _ = next(dataloader_iter)
            return loss_of(self.model(batch), batch)

    callback = sus(variance_every_n_steps=every)
    trainer(callbacks=[callback], logger=False).fit(Takes(), loader())
    assert callback.backend.report.rewritten == 2

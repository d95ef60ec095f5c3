"""All loggers get the same keys and values, and progress bars and other callbacks see them."""

from __future__ import annotations

import csv
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint, RichProgressBar, TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger, Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
from models import LM, Plain, loader, trainer

from sus_lightning import SUSBackprop, VarianceTarget

Values = dict[str, list[tuple[int, float]]]  # by name: step and value


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch._dynamo.reset()
    seed_everything(0, verbose=False)


def sus(c: Any = 4, **options: Any) -> SUSBackprop:
    return SUSBackprop(c, compiler="eager", variance_every_n_steps=3, **options)


def of_csv(logger: CSVLogger) -> Values:
    found: Values = {}
    with open(Path(logger.log_dir) / "metrics.csv") as file:
        for row in csv.DictReader(file):
            for name, value in row.items():
                if name.startswith("sus/") and value:
                    found.setdefault(name, []).append((int(row["step"]), float(value)))
    return found


def tensorboard(folder: Path) -> tuple[Logger, Any]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = TensorBoardLogger(folder)

    def read() -> Values:
        events = EventAccumulator(logger.log_dir)
        events.Reload()
        return {name: [(e.step, e.value) for e in events.Scalars(name)] for name in events.Tags()["scalars"]}

    return logger, read


def wandb(folder: Path) -> tuple[Logger, Any]:
    module = pytest.importorskip("wandb")
    logger = WandbLogger(save_dir=folder, offline=True)

    def read() -> Values:  # an offline run keeps its history in a file of its own format: here is what it has last
        last = {k: float(v) for k, v in dict(logger.experiment.summary).items() if k.startswith("sus/")}
        module.finish()
        return {name: [(-1, value)] for name, value in last.items()}

    return logger, read


def mlflow(folder: Path) -> tuple[Logger, Any]:
    pytest.importorskip("mlflow")
    logger = MLFlowLogger("test", tracking_uri=f"file:{folder / 'mlruns'}")

    def read() -> Values:
        client, run = logger.experiment, logger.run_id
        names = client.get_run(run).data.metrics
        return {name: [(m.step, m.value) for m in client.get_metric_history(run, name)] for name in names}

    return logger, read


@pytest.mark.parametrize("make", [tensorboard, wandb, mlflow])
@pytest.mark.parametrize("per", ["model", "layer"])
def test_all_loggers_get_the_same(make: Any, per: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # MLflow 3 asks for it
    monkeypatch.setenv("WANDB_SILENT", "true")
    reference = CSVLogger(tmp_path)
    logger, read = make(tmp_path)
    callback = sus(VarianceTarget(0.05, start=6, per=per), variance_per="layer" if per == "layer" else "kind")
    trainer(callbacks=[callback], logger=[reference, logger], log_every_n_steps=2).fit(Plain(), loader(40))
    expected, found = of_csv(reference), {k: v for k, v in read().items() if k.startswith("sus/")}
    names = {"c", "kept_per_row", "kept_fraction", "attention_rewritten", "relative_variance", "batch_variance"}
    names |= {"gradient_noise_scale", "worst_relative_variance", "sus_variance"}
    names |= {f"relative_variance_of/{kind}" for kind in ("q", "k", "v", "o", "rest")}
    if per == "layer":
        names |= {f"relative_variance_of/model.layers.{i}" for i in range(2)}
        names |= {f"c_of/model.layers.{i}.attention" for i in range(2)}
    names |= {"step_speedup", "net_speedup"}
    assert callback.summary is not None
    names |= callback.summary.logged().keys()
    assert {f"sus/{name}" for name in names} == expected.keys()
    assert [step for step, _ in expected["sus/relative_variance"]] == [1, 4, 7]
    for name, values in expected.items():
        last_step, last = values[-1]
        if math.isnan(last):
            continue
        step, value = found[name][-1]
        assert value == pytest.approx(last, rel=1e-5), name
        assert step in (last_step, -1)
    assert found.keys() <= expected.keys()


def test_the_number_of_keys_does_not_grow_with_the_model(tmp_path: Path) -> None:
    def keys(layers: int, **options: Any) -> set[str]:
        torch._dynamo.reset()
        logger = CSVLogger(tmp_path, version=f"{layers}{options}")
        trainer(callbacks=[sus(**options)], logger=logger, max_steps=2).fit(Plain(LM(layers)), loader(12))
        return set(of_csv(logger))

    few, many = keys(1), keys(5)
    assert few == many
    assert len({name for name in many if "summary" not in name}) == 16
    assert len(many) == 24
    assert keys(5, variance_per="layer") - many == {f"sus/relative_variance_of/model.layers.{i}" for i in range(5)}


@pytest.mark.parametrize("kind", [RichProgressBar, TQDMProgressBar])
def test_progress_bars_and_checkpoints_see_them(kind: Any, tmp_path: Path) -> None:
    bar, shown = kind(refresh_rate=1), {}

    class Look(Callback):
        def on_train_batch_end(self, fit: Any, pl_module: Any, *_: Any) -> None:
            shown.update(bar.get_metrics(fit, pl_module))

    checkpoint = ModelCheckpoint(tmp_path / "best", monitor="sus/relative_variance")
    fit = trainer(callbacks=[sus(), bar, Look(), checkpoint], enable_checkpointing=True, enable_progress_bar=True)
    fit.fit(Plain(), loader(40))
    assert shown["sus/c"] == 4
    assert shown["sus/relative_variance"] == pytest.approx(float(fit.callback_metrics["sus/relative_variance"]), 1e-2)
    assert "sus/batch_variance" not in shown
    assert checkpoint.best_model_path

"""GluonTS: estimators of gluonts.torch, which train with lightning.pytorch or pytorch_lightning."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from tests.clients.train import STEPS, AfterFit, Client


def data() -> Any:
    import pandas as pd
    from gluonts.dataset.common import ListDataset

    random = np.random.default_rng(0)
    walks = random.normal(size=(8, 120)).cumsum(1)
    series = [{"start": pd.Period("2020-01-01", freq="D"), "target": walk} for walk in walks]
    return ListDataset(series, freq="D")


def client(make: Any) -> Client:
    def train(callbacks: list[Any]) -> AfterFit:
        trainer = {
            "max_epochs": 1,
            "callbacks": callbacks,
            "logger": False,
            "default_root_dir": tempfile.mkdtemp(),  # it loads the best checkpoint
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "accelerator": "cpu",
        }
        estimator = make(trainer)
        predictor = estimator.train(data())

        def after(folder: Path) -> None:
            from gluonts.model.predictor import Predictor

            predictor.serialize(folder)
            loaded = Predictor.deserialize(folder)
            forecasts = list(loaded.predict(data()))
            assert len(forecasts) == 8
            assert np.isfinite(forecasts[0].mean).all()

        return after

    return train


def tft(trainer: dict[str, Any]) -> Any:
    from gluonts.torch import TemporalFusionTransformerEstimator

    return TemporalFusionTransformerEstimator(
        freq="D", prediction_length=6, context_length=24, hidden_dim=16, batch_size=8,
        dropout_rate=0.0, num_batches_per_epoch=STEPS, trainer_kwargs=trainer,
    )  # fmt: skip


def patch_tst(trainer: dict[str, Any]) -> Any:
    from gluonts.torch import PatchTSTEstimator

    return PatchTSTEstimator(
        prediction_length=6, context_length=48, patch_len=8, d_model=16, nhead=2, dim_feedforward=32, batch_size=8,
        dropout=0.0, num_batches_per_epoch=STEPS, trainer_kwargs=trainer,
    )  # fmt: skip


def lag_tst(trainer: dict[str, Any]) -> Any:
    from gluonts.torch import LagTSTEstimator

    return LagTSTEstimator(
        prediction_length=6, context_length=24, freq="D", d_model=16, nhead=2, dim_feedforward=32, batch_size=8,
        dropout=0.0, num_batches_per_epoch=STEPS, trainer_kwargs=trainer,
    )  # fmt: skip


CLIENTS: dict[str, Client] = {
    "gluonts TemporalFusionTransformer": client(tft),
    "gluonts PatchTST": client(patch_tst),
    "gluonts LagTST": client(lag_tst),
}

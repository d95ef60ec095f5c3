"""Nixtla's neuralforecast, which trains with pytorch_lightning and copies the callbacks that it is given."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from tests.clients.train import STEPS, AfterFit, Client


def data() -> Any:
    import pandas as pd

    random = np.random.default_rng(0)
    days = pd.date_range("2020-01-01", periods=120, freq="D")
    walks = [random.normal(size=120).cumsum() for _ in range(4)]
    return pd.concat([pd.DataFrame({"unique_id": f"s{i}", "ds": days, "y": y}) for i, y in enumerate(walks)])


def client(name: str, **options: Any) -> Client:
    def train(callbacks: list[Any]) -> AfterFit:
        from neuralforecast import NeuralForecast, models

        model = getattr(models, name)(
            h=8, input_size=24, max_steps=STEPS, val_check_steps=1000, batch_size=4, windows_batch_size=16,
            callbacks=callbacks, logger=False, enable_progress_bar=False, enable_model_summary=False,
            accelerator="cpu", enable_checkpointing=False, **options,
        )  # fmt: skip
        forecaster = NeuralForecast(models=[model], freq="D")
        forecaster.fit(data(), val_size=0)

        def after(folder: Path) -> None:
            expected = forecaster.predict()
            forecaster.save(str(folder), overwrite=True, save_dataset=True)
            loaded = NeuralForecast.load(str(folder)).predict()
            assert np.allclose(expected[name], loaded[name], rtol=1e-4, atol=1e-5)

        return after

    return train


SMALL = {"hidden_size": 16, "n_head": 2, "dropout": 0.0}
CLIENTS: dict[str, Client] = {
    "neuralforecast TFT": client("TFT", **SMALL),
    "neuralforecast VanillaTransformer": client("VanillaTransformer", conv_hidden_size=16, **SMALL),
    "neuralforecast Informer": client("Informer", conv_hidden_size=16, **SMALL),
    "neuralforecast PatchTST": client(
        "PatchTST", hidden_size=16, n_heads=2, linear_hidden_size=32, dropout=0.0, fc_dropout=0.0, patch_len=8, stride=4
    ),
    "neuralforecast iTransformer": client("iTransformer", n_series=4, hidden_size=16, n_heads=2, d_ff=32, dropout=0.0),
    "neuralforecast TimeXer": client(
        "TimeXer", n_series=4, patch_len=8, hidden_size=16, n_heads=2, d_ff=32, dropout=0.0
    ),
}

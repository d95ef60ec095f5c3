"""Darts (u8darts), which trains with pytorch_lightning and saves the callbacks with the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.clients.train import STEPS, AfterFit, Client


def data() -> Any:
    from darts import TimeSeries

    walk = np.random.default_rng(0).normal(size=24 + 6 + 8 * STEPS - 1).cumsum().astype(np.float32)
    return TimeSeries.from_values(walk)


def client(name: str, **options: Any) -> Client:
    def train(callbacks: list[Any]) -> AfterFit:
        from darts import models

        model = getattr(models, name)(
            input_chunk_length=24, output_chunk_length=6, n_epochs=1, batch_size=8, random_state=0,
            pl_trainer_kwargs={
                "callbacks": callbacks, "accelerator": "cpu", "enable_progress_bar": False,
                "enable_model_summary": False, "logger": False, "enable_checkpointing": False,
            },
            **options,
        )  # fmt: skip
        series = data()
        model.fit(series)

        def after(folder: Path) -> None:
            expected = model.predict(6)
            model.save(str(folder / "model.pt"))
            loaded = type(model).load(str(folder / "model.pt"), weights_only=False)
            assert np.allclose(expected.values(), loaded.predict(6).values(), rtol=1e-4, atol=1e-5)
            loaded.fit(series)  # trains again, with the callback that was saved

        return after

    return train


CLIENTS: dict[str, Client] = {
    "darts TransformerModel": client(
        "TransformerModel", d_model=16, nhead=2, num_encoder_layers=2, num_decoder_layers=1, dim_feedforward=32,
        dropout=0.0,
    ),
    "darts TFTModel": client(
        "TFTModel", hidden_size=16, dropout=0.0, num_attention_heads=2, add_relative_index=True,
        use_static_covariates=False, likelihood=None, loss_fn=torch.nn.MSELoss(),
    ),
}  # fmt: skip

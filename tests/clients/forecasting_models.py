"""pytorch-forecasting, which trains with lightning.pytorch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.clients.train import STEPS, AfterFit, Client


def data() -> Any:
    import pandas as pd
    from pytorch_forecasting import TimeSeriesDataSet

    random = np.random.default_rng(0)
    frames = [
        pd.DataFrame({"time": range(60), "series": str(i), "value": random.normal(size=60).cumsum().astype(np.float32)})
        for i in range(4)
    ]
    return TimeSeriesDataSet(
        pd.concat(frames, ignore_index=True), time_idx="time", target="value", group_ids=["series"],
        max_encoder_length=24, min_encoder_length=24, max_prediction_length=6, min_prediction_length=6,
        time_varying_unknown_reals=["value"], time_varying_known_reals=["time"], allow_missing_timesteps=False,
    )  # fmt: skip


def client(name: str, **options: Any) -> Client:
    def train(callbacks: list[Any]) -> AfterFit:
        import lightning.pytorch as pl
        import pytorch_forecasting
        from pytorch_forecasting.metrics import MAE

        dataset = data()
        cls: Any = getattr(pytorch_forecasting, name, None)
        if cls is None:
            from pytorch_forecasting.models import timexer

            cls = getattr(timexer, name)
        model = cls.from_dataset(dataset, learning_rate=1e-2, loss=MAE(), **options)
        trainer = pl.Trainer(
            max_steps=STEPS, callbacks=callbacks, logger=False, enable_checkpointing=False, accelerator="cpu",
            enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        trainer.fit(model, dataset.to_dataloader(train=True, batch_size=8, num_workers=0))

        def after(folder: Path) -> None:
            trainer.save_checkpoint(folder / "a.ckpt")
            loaded = cls.load_from_checkpoint(folder / "a.ckpt", weights_only=False)
            loader = dataset.to_dataloader(train=False, batch_size=8, num_workers=0)
            quiet = {"logger": False, "enable_progress_bar": False, "accelerator": "cpu"}
            ours, theirs = (m.predict(loader, trainer_kwargs={**quiet}) for m in (model, loaded))
            assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-5)

        return after

    return train


CLIENTS: dict[str, Client] = {
    "pytorch-forecasting TemporalFusionTransformer": client(
        "TemporalFusionTransformer", hidden_size=16, attention_head_size=2, hidden_continuous_size=8, dropout=0.0
    ),
    "pytorch-forecasting TimeXer": client(
        "TimeXer",
        context_length=24,
        prediction_length=6,
        hidden_size=16,
        n_heads=2,
        e_layers=2,
        d_ff=32,
        dropout=0.0,
        patch_length=4,
    ),
}

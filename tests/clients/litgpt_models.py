"""LitGPT: its GPT in a LightningModule, as its documentation trains it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from tests.clients.train import STEPS, AfterFit, Client


def client(name: str, **options: Any) -> Client:
    def train(callbacks: list[Any]) -> AfterFit:
        import lightning.pytorch as pl
        from litgpt import GPT, Config
        from litgpt.utils import chunked_cross_entropy

        config = Config.from_name(
            name, n_layer=2, n_embd=32, vocab_size=64, padded_vocab_size=64, block_size=64, **options
        )

        class Lit(pl.LightningModule):
            def __init__(self) -> None:
                super().__init__()
                self.model = GPT(config)

            def training_step(self, batch: Any, batch_idx: int) -> Any:
                return chunked_cross_entropy(self.model(batch[:, :-1]), batch[:, 1:], chunk_size=0)

            def configure_optimizers(self) -> Any:
                return torch.optim.AdamW(self.parameters(), 1e-3)

        tokens = torch.randint(0, 64, (4 * STEPS, 49), generator=torch.Generator().manual_seed(0))
        module = Lit()
        trainer = pl.Trainer(
            max_steps=STEPS, callbacks=callbacks, logger=False, enable_checkpointing=False, accelerator="cpu",
            enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        trainer.fit(module, DataLoader(tokens, batch_size=4))

        def after(folder: Path) -> None:
            trainer.save_checkpoint(folder / "a.ckpt")
            loaded = Lit.load_from_checkpoint(folder / "a.ckpt")
            with torch.no_grad():
                assert torch.equal(module.eval().model(tokens), loaded.eval().model(tokens))

        return after

    return train


CLIENTS: dict[str, Client] = {
    "litgpt GPT (pythia)": client("pythia-14m", n_head=4),
    "litgpt GPT (Llama, grouped keys)": client("tiny-llama-1.1b", n_head=4, n_query_groups=2, intermediate_size=64),
}

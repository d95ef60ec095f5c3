"""Tiny models for the tests of the callback; run as a module of the tests' folder."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchmetrics import MeanMetric

VOCABULARY, LENGTH, WIDTH = 32, 48, 16


class Attention(nn.Module):
    def __init__(self, width: int = WIDTH, heads: int = 2, dropout: float = 0.0) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        b, n, d = x.shape
        q, k, v = (p(x).view(b, n, self.heads, -1).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=self.dropout if self.training else 0.0)
        return self.o_proj(y.transpose(1, 2).reshape(b, n, d))


class Block(nn.Module):
    def __init__(self, width: int = WIDTH, dropout: float = 0.0, batch_norm: bool = False) -> None:
        super().__init__()
        self.attention = Attention(width, dropout=dropout)
        self.norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width), nn.Dropout(dropout)
        )
        self.batch_norm = nn.BatchNorm1d(width) if batch_norm else None

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm(x))
        x = x + self.mlp(x)
        return self.batch_norm(x.flatten(0, 1)).view_as(x) if self.batch_norm is not None else x


class LM(nn.Module):
    def __init__(self, layers: int = 2, dropout: float = 0.0, batch_norm: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.position = nn.Embedding(LENGTH, WIDTH)
        self.layers = nn.ModuleList(Block(dropout=dropout, batch_norm=batch_norm) for _ in range(layers))
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens) + self.position.weight[: tokens.shape[1]]
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def loss_of(logits: Tensor, tokens: Tensor) -> Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


class Tokens(Dataset[Tensor]):
    """Random walks over the vocabulary: something that can be learned."""

    def __init__(self, count: int = 64, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.tokens = torch.randint(-1, 2, (count, LENGTH), generator=generator).cumsum(1) % VOCABULARY

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, i: int) -> Tensor:
        return self.tokens[i]


def loader(count: int = 64, batch: int = 4, seed: int = 0) -> DataLoader[Tensor]:
    return DataLoader(Tokens(count, seed), batch_size=batch)


class Plain(pl.LightningModule):
    """A language model, with nothing special about it."""

    def __init__(self, model: nn.Module | None = None, lr: float = 1e-2) -> None:
        super().__init__()
        self.model = LM() if model is None else model
        self.lr = lr

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        loss = loss_of(self.model(batch), batch)
        self.log("loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("val_loss", loss_of(self.model(batch), batch))

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=self.lr)


class Nasty(Plain):
    """Everything that a probe could disturb: dropout, batch norm, metrics, counters, lists, own random numbers."""

    def __init__(self) -> None:
        super().__init__(LM(dropout=0.1, batch_norm=True))
        self.mean = MeanMetric()
        self.calls = 0
        self.losses: list[Tensor] = []
        self.by_name: dict[str, Any] = {"seen": [], "sum": torch.zeros(())}
        self.register_buffer("average", torch.zeros(()))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        import random

        import numpy as np

        tokens = batch.pop("tokens") if isinstance(batch, dict) else batch
        self.calls += 1
        noise = random.random() + float(np.random.rand()) + float(torch.rand(()))  # noqa: NPY002
        loss = loss_of(self.model(tokens), tokens) * (1 + 0.1 * noise + 0.01 * self.calls + 0.1 * self.average)
        self.average = 0.9 * self.average + 0.1 * loss.detach()
        self.losses.append(loss.detach())
        self.by_name["seen"].append(self.calls)
        self.by_name["sum"] += loss.detach()
        self.by_name[f"call {self.calls}"] = 1
        self.mean.update(loss.detach())
        self.log("mean", self.mean, on_step=True, on_epoch=True, batch_size=len(tokens))
        self.log("loss", loss, on_step=True, on_epoch=True, batch_size=len(tokens))
        self.logger and self.logger.log_metrics({"own": float(loss)}, step=self.calls)
        return {"loss": loss}


def trainer(**options: Any) -> pl.Trainer:
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "max_steps": 8,
        "max_epochs": 10,
        "log_every_n_steps": 1,
    }
    return pl.Trainer(**{**defaults, **options})


def weights(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)

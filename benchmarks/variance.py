#!/usr/bin/env python
"""What SUS costs in gradient variance: relative increase per sampler and c on a byte-level model trained here.

    python benchmarks/variance.py --steps 450 --n 512 --c 8 16 30 64 --samplers systematic independent

Increase = E|g_sus - g_exact|^2 / Var(g), both for one sequence, summed over all parameters (total) or over those of one
kind. The model of examples/train_lm.py is trained with the exact backward first. Prints a table and writes JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]

from train_lm import ByteLM, Windows, standard_library  # noqa: E402

from fx_passes import SUSBackend  # noqa: E402


def loss(model, batch: Tensor) -> Tensor:
    return F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())


def train(model: ByteLM, data: Windows, batch: int, steps: int) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3, betas=(0.9, 0.95), weight_decay=0.1)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min((step + 1) / 20, 1 - 0.9 * step / steps)
        value = loss(model, torch.stack([data[step * batch + i] for i in range(batch)]))
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        if step % 50 == 0 or step == steps - 1:
            print(f"step {step}: {value.item():.3f} nats per byte", flush=True)


def kind(name: str) -> str:
    for part in ("q_proj", "k_proj", "v_proj", "o_proj", "mlp"):
        if part in name:
            return part
    return "rest"


def gradients(function, model: ByteLM, x: Tensor) -> dict[str, Tensor]:
    """Gradient per kind of parameter, flattened, for one sequence."""
    model.zero_grad()
    loss(function, x[None]).backward()
    parts = defaultdict(list)
    for name, p in model.named_parameters():
        parts[kind(name)].append(p.grad.flatten())
    return {key: torch.cat(value) for key, value in parts.items()}


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--n", type=int, default=512)
    p.add_argument("--batch", type=int, default=8)
    p.add_argument("--steps", type=int, default=450)
    p.add_argument("--c", type=float, nargs="+", default=[8, 16, 30, 64])
    p.add_argument("--samplers", nargs="+", default=["systematic", "independent"])
    p.add_argument("--sequences", type=int, default=48, help="sequences that give the batch's own variance")
    p.add_argument("--draws", type=int, default=24, help="sequences with two draws each, per c and sampler")
    p.add_argument("--out", type=Path)
    a = p.parse_args()
    torch.manual_seed(0)
    model = ByteLM()
    files, held_out = standard_library()
    train(model, Windows(files, a.n, a.steps * a.batch, 1), a.batch, a.steps)
    data = Windows(held_out, a.n, a.sequences, 2)
    exact = [gradients(model, model, data[i]) for i in range(a.sequences)]
    own = {key: float(torch.stack([g[key] for g in exact]).var(0).sum()) for key in exact[0]}
    rows = []
    for sampler in a.samplers:
        backend = SUSBackend(c=1, sampler=sampler, compiler="eager")
        compiled = torch.compile(model, backend=backend)
        for c in a.c:
            backend.c, added = c, defaultdict(float)
            for i in range(a.draws):
                for _ in range(2):
                    for key, g in gradients(compiled, model, data[i]).items():
                        added[key] += float((g - exact[i][key]).pow(2).sum()) / (2 * a.draws)
            kept = backend.state.pop_kept()
            row = {"sampler": sampler, "c": c, "kept": kept.entries / kept.rows}
            row["total"] = sum(added.values()) / sum(own.values())
            row.update({key: added[key] / own[key] for key in own})
            rows.append(row)
            kinds = "  ".join(f"{key} {100 * row[key]:.2f}%" for key in own)
            print(
                f"{sampler:12} c={c:<5g} kept {row['kept']:5.1f}  total {100 * row['total']:.2f}%  {kinds}", flush=True
            )
    if a.out:
        settings = {key: str(v) if isinstance(v, Path) else v for key, v in vars(a).items()}
        a.out.write_text(json.dumps({"settings": settings, "torch": torch.__version__, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()

#!/usr/bin/env python
"""What SUS costs in gradient variance: relative increase per sampler and c on a byte-level model trained here.

    python benchmarks/variance.py --steps 450 --n 512 --c 8 16 30 64 --samplers systematic independent
    python benchmarks/variance.py --model smollm2 --n 2048 --c 10 30 100 --samplers systematic tile --sequences 4
    python benchmarks/variance.py --model peaked --n 1024 --c 3 --samplers systematic tile

Increase = E|g_sus - g_exact|^2 / Var(g), both for one sequence, summed over all parameters (total) or over those of one
kind. The model of examples/train_lm.py is trained with the exact backward first; SmolLM2-135M is pretrained (see
examples/finetune_smollm2.py). "peaked" is no model but one causal attention of random queries times 5, each row of
which loves another key: noise as a share of the gradient's own square. Tiles are drawn at every length here, also
where `sus_attention` would run the dense backward instead. Prints a table and writes JSON.
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

from fx_passes import SUSBackend, sus_attention  # noqa: E402
from fx_passes.ops import tile_rule  # noqa: E402
from fx_passes.state import State  # noqa: E402


def loss(model, batch: Tensor) -> Tensor:
    if not isinstance(getattr(model, "_orig_mod", model), ByteLM):
        return model(input_ids=batch, labels=batch, use_cache=False).loss
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
    for part in ("q_proj", "k_proj", "v_proj", "o_proj", "mlp", "embed"):
        if part in name:
            return part
    return "rest"


def gradients(function, model: torch.nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Gradient per kind of parameter, flattened, for one sequence."""
    model.zero_grad()
    loss(function, x[None]).backward()
    parts = defaultdict(list)
    for name, p in model.named_parameters():
        parts[kind(name)].append(p.grad.flatten())
    return {key: torch.cat(value) for key, value in parts.items()}


def peaked(a: argparse.Namespace) -> list[dict[str, float | str]]:
    """Noise of the gradients of q, k and v of random attention whose rows are peaked at different keys."""
    q, k, v, grad = (torch.randn(1, 4, a.n, 64) for _ in range(4))
    inputs = [(5 * q).requires_grad_(), k.requires_grad_(), v.requires_grad_()]

    def run(c: float, sampler: str, state: State, seed: int) -> Tensor:
        out = sus_attention(*inputs, is_causal=True, c=c, sampler=sampler, seed=seed, state=state.id)
        return torch.cat([g.flatten() for g in torch.autograd.grad(out, inputs, grad)])

    exact, rows = run(float("inf"), "systematic", State(1.0), 0), []
    for sampler in a.samplers:
        for c in a.c:
            state = State(c)
            noise = [float((run(c, sampler, state, seed) - exact).square().sum()) for seed in range(a.draws)]
            kept = state.pop_kept()
            share = sum(noise) / a.draws / float(exact.square().sum())
            rows.append({"sampler": sampler, "c": c, "kept": kept.entries / kept.rows, "total": share})
            print(f"{sampler:12} c={c:<5g} kept {rows[-1]['kept']:6.1f}  noise {share:.4f} of the gradient's square")
    return rows


def pretrained(a: argparse.Namespace) -> tuple[torch.nn.Module, list[Tensor]]:
    from finetune_smollm2 import pretrained, windows

    model, tokenizer = pretrained()
    return model, [x for (x,) in windows(tokenizer, a.n, a.sequences)]


def trained(a: argparse.Namespace) -> tuple[torch.nn.Module, list[Tensor]]:
    model = ByteLM()
    files, held_out = standard_library()
    train(model, Windows(files, a.n, a.steps * a.batch, 1), a.batch, a.steps)
    data = Windows(held_out, a.n, a.sequences, 2)
    return model, [data[i] for i in range(a.sequences)]


def of_model(a: argparse.Namespace) -> list[dict[str, float | str]]:
    model, data = trained(a) if a.model == "byte" else pretrained(a)
    exact = [gradients(model, model, x) for x in data]
    own = {key: float(torch.stack([g[key] for g in exact]).var(0).sum()) for key in exact[0]}
    rows = []
    for sampler in a.samplers:
        backend = SUSBackend(c=1, sampler=sampler, compiler="eager")
        compiled = torch.compile(model, backend=backend)
        for c in a.c:
            backend.c, added = c, defaultdict(float)
            for i in range(a.draws):
                for _ in range(a.repeats):
                    for key, g in gradients(compiled, model, data[i]).items():
                        added[key] += float((g - exact[i][key]).pow(2).sum()) / (a.repeats * a.draws)
            kept = backend.state.pop_kept()
            row = {"sampler": sampler, "c": c, "kept": kept.entries / kept.rows}
            row["total"] = sum(added.values()) / sum(own.values())
            row.update({key: added[key] / own[key] for key in own})
            rows.append(row)
            kinds = "  ".join(f"{key} {100 * row[key]:.2f}%" for key in own)
            print(
                f"{sampler:12} c={c:<5g} kept {row['kept']:6.1f}  total {100 * row['total']:.2f}%  {kinds}", flush=True
            )
            write(a, rows)
    return rows


def write(a: argparse.Namespace, rows: list[dict[str, float | str]]) -> None:
    if a.out:
        settings = {key: str(v) if isinstance(v, Path) else v for key, v in vars(a).items()}
        a.out.write_text(json.dumps({"settings": settings, "torch": torch.__version__, "rows": rows}, indent=1))


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", choices=("byte", "smollm2", "peaked"), default="byte")
    p.add_argument("--n", type=int, default=512)
    p.add_argument("--batch", type=int, default=8)
    p.add_argument("--steps", type=int, default=450)
    p.add_argument("--c", type=float, nargs="+", default=[8, 16, 30, 64])
    p.add_argument("--samplers", nargs="+", default=["systematic", "independent"])
    p.add_argument("--sequences", type=int, default=48, help="sequences that give the batch's own variance")
    p.add_argument("--draws", type=int, default=24, help="sequences with draws, per c and sampler")
    p.add_argument("--repeats", type=int, default=2, help="draws per sequence")
    p.add_argument("--out", type=Path)
    a = p.parse_args()
    torch.manual_seed(0)
    tile_rule.LARGEST_SHARE = 2.0  # the sampler itself, never the dense backward
    write(a, peaked(a) if a.model == "peaked" else of_model(a))


if __name__ == "__main__":
    main()

#!/usr/bin/env python
"""What SUS costs in gradient variance: relative increase per sampler, c and n, on a byte-level model or SmolLM2.

    python benchmarks/variance.py --steps 450 --n 512 --c 8 16 30 64 --samplers systematic independent
    python benchmarks/variance.py --model smollm2 --n 1024 2048 --c 10 30 100 --samplers systematic tile --sequences 4
    python benchmarks/variance.py --weights runs/quality/byte-exact-seed0-step*.pt --n 512 1024 2048 4096
    python benchmarks/variance.py --model peaked --n 1024 --c 3 --samplers systematic tile

Increase = E|g_sus - g_exact|^2 / Var(g), both for one sequence, summed over all parameters (total) or over those of one
kind; "worst" is the largest among the q, k, v and o projections. "error" is the standard error of the total, from the
spread over the sequences of both. The model of examples/train_lm.py is trained with the exact backward first, or comes
from --weights, which benchmarks/train_quality.py has left at three points of its training; SmolLM2-135M is pretrained
(see examples/finetune_smollm2.py). "peaked" is no model but one causal attention of random queries times 5, each row of
which loves another key: noise as a share of the gradient's own square. Tiles are drawn at every length here, also
where `sus_attention` would run the dense backward instead. Prints a table and writes JSON after every row; a run that
was cut goes on with the rows that its file lacks.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections import defaultdict
from pathlib import Path

import torch
import torch.nn.functional as F
from attention import environment
from torch import Tensor

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]

from train_lm import ByteLM, Windows, standard_library  # noqa: E402

from fx_passes import sus_attention, sus_backward  # noqa: E402
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


PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")


def kind(name: str) -> str:
    for part in (*PROJECTIONS, "mlp", "embed"):
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
    q, k, v, grad = (torch.randn(1, 4, a.n[0], 64) for _ in range(4))
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


def pretrained(a: argparse.Namespace, n: int) -> tuple[torch.nn.Module, list[Tensor]]:
    from finetune_smollm2 import pretrained, windows

    model, tokenizer = pretrained()
    return model, [x for (x,) in windows(tokenizer, n, a.sequences)]


def trained(a: argparse.Namespace, point: str, n: int) -> tuple[torch.nn.Module, list[Tensor]]:
    files, held_out = standard_library()
    if a.weights:
        weights = torch.load(point, weights_only=True)
        layers = 1 + max(int(name.split(".")[1]) for name in weights if name.startswith("blocks."))
        model = ByteLM(layers, weights["embed.weight"].shape[1], a.heads)
        model.load_state_dict(weights)
    else:
        model = ByteLM()
        train(model, Windows(files, n, a.steps * a.batch, 1), a.batch, a.steps)
    data = Windows(held_out, n, a.sequences, 2)
    return model, [data[i] for i in range(a.sequences)]


def squares(parts: dict[str, Tensor]) -> dict[str, float]:
    found = {key: float(x.double().square().sum()) for key, x in parts.items()}
    return {**found, "total": sum(found.values())}


def relative_error(values: list[float]) -> float:
    """Standard error of the mean of the values, over that mean; infinite for one value."""
    if len(values) < 2:
        return math.inf
    mean = sum(values) / len(values)
    return math.sqrt(sum((x - mean) ** 2 for x in values) / (len(values) - 1) / len(values)) / mean


def row_of(a: argparse.Namespace, model: torch.nn.Module, data: list[Tensor], exact: list[dict[str, Tensor]],
           spread: list[dict[str, float]], sampler: str, c: float) -> dict[str, float | str]:  # fmt: skip
    """One c and sampler: `spread` is each sequence's squared distance from the mean gradient."""
    sus, noise = sus_backward(c=c, sampler=sampler, seed=0), []
    for i in range(a.draws):
        one: dict[str, float] = defaultdict(float)
        for _ in range(a.repeats):
            with sus:
                found = gradients(model, model, data[i])
            for key, x in squares({key: g - exact[i][key] for key, g in found.items()}).items():
                one[key] += x / a.repeats
        noise.append(one)
    assert sus.calls, "no attention was found"
    assert not sus.left, f"attention was left: {sus.left}"
    own = {key: sum(s[key] for s in spread) / (len(spread) - 1) for key in spread[0]}
    kept = sus.state.pop_kept()
    row: dict[str, float | str] = {"sampler": sampler, "c": c, "kept": kept.entries / kept.rows}
    row |= {key: sum(x[key] for x in noise) / len(noise) / own[key] for key in own}
    row["worst"] = max(float(row[key]) for key in own if key in PROJECTIONS)
    errors = [relative_error([x["total"] for x in values]) for values in (noise, spread)]
    row["error"] = float(row["total"]) * math.hypot(*errors)
    return row


def of_model(a: argparse.Namespace) -> list[dict[str, float | str]]:
    rows = json.loads(a.out.read_text())["rows"] if a.out and a.out.exists() else []
    done = {(r["point"], r["n"], r["sampler"], r["c"]) for r in rows}
    points = [(point, n) for point in a.weights or [a.model] for n in a.n]
    for point, n in points:
        at = {"point": Path(point).stem, "n": n}
        wanted = [(s, c) for c in a.c for s in a.samplers if (*at.values(), s, c) not in done]
        if not wanted:
            continue
        model, data = trained(a, point, n) if a.model == "byte" else pretrained(a, n)
        exact = [gradients(model, model, x) for x in data]
        mean = {key: sum(g[key] for g in exact) / len(exact) for key in exact[0]}
        spread = [squares({key: g[key] - mean[key] for key in mean}) for g in exact]
        for sampler, c in wanted:
            r = {**at, **row_of(a, model, data, exact, spread, sampler, c)}
            rows.append(r)
            kinds = "  ".join(f"{key} {r[key]:.2%}" for key in (*mean, "worst"))
            start = f"{r['point']} n={n} {sampler:12} c={c:<5g} kept {r['kept']:6.1f}"
            print(f"{start}  total {r['total']:.2%} (+- {r['error']:.2%})  {kinds}", flush=True)
            write(a, rows)
    return rows


def write(a: argparse.Namespace, rows: list[dict[str, float | str]]) -> None:
    if a.out:
        each = ("n", "c", "samplers", "weights", "out")  # each row has its own; a file grows by several commands
        settings = {key: x for key, x in vars(a).items() if key not in each}
        result = {"environment": environment("cpu"), "settings": settings, "rows": rows}
        a.out.write_text(json.dumps(result, indent=1, default=str) + "\n")


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", choices=("byte", "smollm2", "peaked"), default="byte")
    p.add_argument("--n", type=int, nargs="+", default=[512])
    p.add_argument("--weights", nargs="+", help="files with the weights of a ByteLM, in place of training one")
    p.add_argument("--heads", type=int, default=4, help="of --weights")
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

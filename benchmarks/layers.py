#!/usr/bin/env python
"""Whether a c per layer would be worth it: the variance that each layer's draws add to the whole gradient.

    python benchmarks/layers.py --layers 8 --steps 450 --c 30
    python benchmarks/layers.py --smollm2 --sequences 4 --draws 1 --c 30

Draws of layers are independent and unbiased, so the variance that SUS adds to the gradient of all parameters is the sum
of what each layer adds alone; that is measured by sampling one layer with the others exact. (The noise in a layer's own
parameters is another thing: noise of a layer reaches all parameters before it.) With V_l = a_l c_l ** -p the smallest
sum of c_l at a given sum of V_l has c_l ~ a_l ** (1 / (p + 1)). The a_l are taken from the even sequences; the variance
at those c_l, with the sum that the equal c have, is measured on the odd ones. `--json FILE` writes what is printed.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "examples"), str(Path(__file__).parent)]

from attention import environment  # noqa: E402
from variance import ByteLM, Windows, loss, standard_library, train  # noqa: E402

from fx_passes import SUSBackend  # noqa: E402

Gradients = tuple[Tensor, ...]


class Measured:
    """Gradients of a compiled model under a c per site."""

    def __init__(self, model: nn.Module, function: Callable[[nn.Module, Tensor], Tensor]) -> None:
        self.backend = SUSBackend(c=math.inf, compiler="eager")
        self.model, self.function = torch.compile(model, backend=self.backend), function
        self.parameters = [p for p in model.parameters() if p.requires_grad]

    @property
    def sites(self) -> list[int]:
        return [site.number for site in self.backend.report.sites]

    def gradients(self, x: Tensor, c: dict[int, float]) -> Gradients:
        self.backend.c = math.inf
        self.backend.state.set_site_c(c)
        return torch.autograd.grad(self.function(self.model, x), self.parameters)

    def noise(self, x: Tensor, exact: Gradients, c: dict[int, float]) -> float:
        return squared(self.gradients(x, c), exact)


def squared(a: Gradients, b: Gradients) -> float:
    return sum(float((x - y).square().sum(dtype=torch.float64)) for x, y in zip(a, b, strict=True))


def byte_model(a: argparse.Namespace) -> tuple[nn.Module, Callable[[nn.Module, Tensor], Tensor], list[Tensor]]:
    model = ByteLM(layers=a.layers)
    files, held_out = standard_library()
    train(model, Windows(files, a.n, a.steps * a.batch, 1), a.batch, a.steps)
    data = Windows(held_out, a.n, a.sequences, 2)
    return model, lambda m, x: loss(m, x[None]), [data[i] for i in range(a.sequences)]


def smollm2(a: argparse.Namespace) -> tuple[nn.Module, Callable[[nn.Module, Tensor], Tensor], list[Tensor]]:
    from finetune_smollm2 import pretrained, windows

    model, tokenizer = pretrained()
    data = windows(tokenizer, a.n, a.sequences)[:][0]
    return model, lambda m, x: m(input_ids=x[None], labels=x[None], use_cache=False).loss, list(data)


def best(alone: list[float], c: float, p: float) -> list[float]:
    """c per layer with the sum of equal c, in the proportions of the smallest total variance."""
    shares = [v ** (1 / (p + 1)) for v in alone]
    return [c * len(shares) * s / sum(shares) for s in shares]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smollm2", action="store_true", help="the pretrained model instead of the byte model")
    parser.add_argument("--layers", type=int, default=8, help="of the byte model")
    parser.add_argument("--n", type=int, default=512)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--steps", type=int, default=450)
    parser.add_argument("--c", type=float, default=30.0)
    parser.add_argument("--sequences", type=int, default=24)
    parser.add_argument("--draws", type=int, default=2)
    parser.add_argument("--exponent", type=float, default=1.5, help="p of variance ~ c ** -p")
    parser.add_argument("--json", type=Path)
    a = parser.parse_args()
    torch.manual_seed(0)
    measured = Measured(*(made := smollm2(a) if a.smollm2 else byte_model(a))[:2])
    sequences = made[2]
    exact = [measured.gradients(x, {}) for x in sequences]
    sites = measured.sites

    alone, total = [0.0] * len(sites), 0.0
    for x, g in list(zip(sequences, exact, strict=True))[::2]:
        for _ in range(a.draws):
            for i, site in enumerate(sites):
                alone[i] += measured.noise(x, g, {site: a.c})
            total += measured.noise(x, g, dict.fromkeys(sites, a.c))
    print("share of each layer: " + " ".join(f"{v / sum(alone):.3f}" for v in alone))
    print(f"sum over layers / all layers at once: {sum(alone) / total:.3f}")

    chosen = dict(zip(sites, best(alone, a.c, a.exponent), strict=True))
    print("c per layer: " + " ".join(f"{c:.1f}" for c in chosen.values()))
    logs = []
    for x, g in list(zip(sequences, exact, strict=True))[1::2]:
        pair = [sum(measured.noise(x, g, c) for _ in range(2 * a.draws)) for c in (dict.fromkeys(sites, a.c), chosen)]
        logs.append(math.log(pair[1] / pair[0]))
    mean = sum(logs) / len(logs)
    error = (sum((v - mean) ** 2 for v in logs) / max(1, len(logs) - 1) / len(logs)) ** 0.5
    ratio = f"{math.exp(mean):.3f} (times or over {math.exp(error):.3f})"
    print(f"variance with c per layer / with equal c, at the same sum of c: {ratio}")
    saved = 1 - math.exp(mean / a.exponent)
    print(f"the sum of c that this saves at equal variance: {100 * saved:.1f}% (+- {100 * error / a.exponent:.1f}%)")
    if a.json:
        found = {
            "environment": environment("cpu"),
            "settings": {k: v for k, v in vars(a).items() if k != "json"},
            "share of each layer": [v / sum(alone) for v in alone],
            "sum over layers / all layers at once": sum(alone) / total,
            "variance ratio": {"value": math.exp(mean), "low": math.exp(mean - error), "high": math.exp(mean + error)},
            "saved": saved,
        }
        a.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()

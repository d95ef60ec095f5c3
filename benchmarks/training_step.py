"""A whole training step against the exact one: the example's model (4 layers, width 128, 4 heads of 32) or GPT-2.

    python benchmarks/training_step.py                     # n = 8192, c = 30
    python benchmarks/training_step.py --model gpt2 --n 2048   # transformers' code, with its dropout of 0.1

A step is forward, loss, backward and AdamW on one sequence of random bytes. Three models take it in turn: the model
as it is (exact, eager), the same compiled by Inductor, and compiled by `SUSBackend` (what the callback does). Medians
of ratios of neighbours in time, so that load from elsewhere hits all; results go to benchmarks/results/.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from attention import RESULTS, environment, wall

from fx_passes import SUSBackend

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
from train_lm import ByteLM


class GPT2(torch.nn.Module):
    """The logits of transformers' GPT-2 with 4 layers, width 512 and 8 heads of 64, over bytes."""

    def __init__(self, n: int) -> None:
        from transformers import GPT2Config, GPT2LMHeadModel

        super().__init__()
        sizes = {"vocab_size": 256, "n_positions": n, "n_embd": 512, "n_layer": 4, "n_head": 8}
        self.model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=None, eos_token_id=None))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.model(input_ids=ids, use_cache=False).logits
        return logits


def trainer(model: torch.nn.Module, compiled: Callable[..., torch.Tensor], ids: torch.Tensor) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(model.parameters(), 3e-4)

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(compiled(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten()).backward()
        optimizer.step()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("example", "gpt2"), default="example")
    parser.add_argument("--n", type=int, default=8192)
    parser.add_argument("--c", type=float, default=30.0)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    torch.manual_seed(0)
    models: dict[str, torch.nn.Module] = {"exact": GPT2(args.n) if args.model == "gpt2" else ByteLM()}
    models["exact, compiled"], models["sus"] = copy.deepcopy(models["exact"]), copy.deepcopy(models["exact"])
    backend = SUSBackend(c=args.c)
    functions = {
        "exact": models["exact"],
        "exact, compiled": torch.compile(models["exact, compiled"]),
        "sus": torch.compile(models["sus"], backend=backend),
    }
    ids = torch.randint(256, (1, args.n + 1))
    steps = {name: trainer(models[name], functions[name], ids) for name in models}
    for step in steps.values():
        step()  # compiles
    rounds = [{name: wall(step) for name, step in steps.items()} for _ in range(args.repeats)]
    seconds = {name: statistics.median(r[name] for r in rounds) for name in steps}
    names = ("exact", "exact, compiled")
    speed_up = {name: statistics.median(r[name] / r["sus"] for r in rounds) for name in names}
    kept = backend.state.pop_kept()
    result = {
        "model": args.model,
        "n": args.n,
        "c": args.c,
        "seconds": seconds,
        "speed-up over": speed_up,
        "kept per row": kept.entries / kept.rows,
    }
    print(json.dumps(result, indent=1))
    output = {"environment": environment("cpu"), **result}
    name = "training-step.json" if args.model == "example" else f"training-step-{args.model}.json"
    (RESULTS / name).write_text(json.dumps(output, indent=1) + "\n")


if __name__ == "__main__":
    main()

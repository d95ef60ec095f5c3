#!/usr/bin/env python
"""Whole training steps against the exact ones: the example's model, GPT-2 or SmolLM2, at several n.

    OMP_NUM_THREADS=1 python benchmarks/training_step.py                  # the example: 4 layers, width 128
    OMP_NUM_THREADS=1 python benchmarks/training_step.py --model gpt2     # with its dropout of 0.1; takes 8 GB at 4096
    OMP_NUM_THREADS=1 python benchmarks/training_step.py --model smollm2  # pretrained, on Python code
    OMP_NUM_THREADS=1 python benchmarks/training_step.py --model quality  # that of train_quality.py

A step is forward, loss, backward and AdamW on one sequence. Four take it in turn with the same weights: exact (eager),
exact under Inductor, SUS (what the callback does), and "free": exact (eager) with an attention backward that costs
nothing, which gives the largest speed-up that a faster attention backward could have. (A faster forward is not in it:
with dropout, whose weights the library forms on a CPU, SUS can pass it.) SmolLM2 runs without Inductor; the model of
train_quality.py in bfloat16 mixed precision, as there, the others in float32.

Results are written after each n. Rows that the file has from the same commit and machine stay: after a cut, name the n
that are left.

A ratio is the median over the rounds of the ratio within a round. On one thread seconds are CPU time, so that other
programs do not count, on more they are wall time. Results go to benchmarks/results/steps-MODEL.json.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from attention import RESULTS, earlier, environment, wall
from attention_scaling import cpu, peak
from torch import Tensor

from fx_passes import SUSBackend

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
from train_lm import ByteLM

EXACT = ("exact", "exact, compiled")
LENGTHS = {"example": [2048, 4096, 8192, 16384], "gpt2": [1024, 2048, 4096], "smollm2": [1024, 2048], "quality": [4096]}


class GPT2(torch.nn.Module):
    """The logits of transformers' GPT-2 with 4 layers, width 512 and 8 heads of 64, over bytes."""

    def __init__(self, n: int) -> None:
        from transformers import GPT2Config, GPT2LMHeadModel

        super().__init__()
        sizes = {"vocab_size": 256, "n_positions": n, "n_embd": 512, "n_layer": 4, "n_head": 8}
        self.model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=None, eos_token_id=None))

    def forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.model(input_ids=ids, use_cache=False).logits
        return logits


class SmolLM2(torch.nn.Module):
    """The logits of the pretrained SmolLM2-135M."""

    def __init__(self) -> None:
        from finetune_smollm2 import pretrained

        super().__init__()
        self.model, self.tokenizer = pretrained()

    def forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.model(input_ids=ids, use_cache=False).logits
        return logits


class FreeBackward(torch.autograd.Function):
    """The library's attention with a backward that computes nothing: zeros."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, call: Callable[..., Tensor]) -> Tensor:
        ctx.shapes = [x.shape for x in (q, k, v)]
        return call(q, k, v)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return (*(grad.new_zeros(shape) for shape in ctx.shapes), None)


def free(model: torch.nn.Module) -> Callable[[Tensor], Tensor]:
    original = F.scaled_dot_product_attention

    def attention(q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return FreeBackward.apply(q, k, v, lambda q, k, v: original(q, k, v, *args, **kwargs))

    def forward(ids: Tensor) -> Tensor:
        with mock.patch.object(F, "scaled_dot_product_attention", attention):
            return model(ids)

    return forward


def stepper(
    optimizer: torch.optim.Optimizer, model: Callable[..., Tensor], ids: Tensor, mixed: bool
) -> Callable[[], None]:
    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            loss = F.cross_entropy(model(ids[:, :-1]).flatten(0, 1).float(), ids[:, 1:].flatten())
        loss.backward()
        optimizer.step()

    return step


def problem(name: str, n: int) -> tuple[torch.nn.Module, Tensor]:
    torch.manual_seed(0)
    if name == "smollm2":
        from finetune_smollm2 import windows

        model = SmolLM2()
        return model, windows(model.tokenizer, n + 1, 1).tensors[0]
    makers = {"gpt2": lambda: GPT2(n), "example": ByteLM, "quality": lambda: ByteLM(2, 256, 4)}
    return makers[name](), torch.randint(256, (1, n + 1))


def measure(a: argparse.Namespace, n: int) -> dict[str, Any]:
    torch._dynamo.reset()
    model, ids = problem(a.model, n)
    inductor = a.model != "smollm2"
    backend = SUSBackend(c=a.c, compiler="inductor" if inductor else "eager")
    functions: dict[str, Callable[..., Tensor]] = {"exact": model, "free": free(model)}
    functions["SUS"] = torch.compile(model, backend=backend)
    if inductor:
        functions["exact, compiled"] = torch.compile(model)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-6)
    steps = {name: stepper(optimizer, f, ids, a.model == "quality") for name, f in functions.items()}
    for step in steps.values():
        step()  # compiles
    memory = {name: peak(step) for name, step in steps.items()}
    timer = cpu if torch.get_num_threads() == 1 else wall
    rounds = [{name: timer(step) for name, step in steps.items()} for _ in range(a.repeats)]
    ratios = {name: [r[name] / r["SUS"] for r in rounds] for name in EXACT if name in steps}
    kept = backend.state.pop_kept()
    return {
        "n": n,
        "c": a.c,
        "rounds": a.repeats,
        "seconds": {name: statistics.median(r[name] for r in rounds) for name in steps},
        "speed-up over": {name: statistics.median(x) for name, x in ratios.items()},
        "lowest": {name: min(x) for name, x in ratios.items()},
        "highest": {name: max(x) for name, x in ratios.items()},
        "largest possible": statistics.median(r["exact"] / r["free"] for r in rounds),
        "memory": memory,
        "rewritten": backend.report.rewritten,
        "kept per row": kept.entries / kept.rows,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("example", "gpt2", "smollm2", "quality"), default="example")
    parser.add_argument("--n", type=int, nargs="+", help="default: all that docs/performance-cpu.md has")
    parser.add_argument("--c", type=float, default=30.0)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, help="JSON file; default benchmarks/results/steps-MODEL.json")
    args = parser.parse_args()
    clock = "CPU time of one thread" if torch.get_num_threads() == 1 else "wall time"
    output = args.output or RESULTS / f"steps-{args.model}.json"
    for n in args.n or LENGTHS[args.model]:
        row = measure(args, n)
        print(json.dumps(row), flush=True)
        where = {**environment("cpu"), "load": os.getloadavg()[0]}
        others = [r for r in earlier(output, where) if r["n"] != n]
        rows = sorted([*others, row], key=lambda r: r["n"])
        result = {"environment": where, "clock": clock, "model": args.model, "rows": rows}
        output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()

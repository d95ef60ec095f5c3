#!/usr/bin/env python
"""What `explain` expects of SUS on real models: the example's byte model, SmolLM2-135M, BERT (base, random weights).

    OMP_NUM_THREADS=1 python benchmarks/expect.py --cpu-time bytes bert smollm2

One sequence each. Nothing trains; benchmarks/auto_c.py measures the same. Writes benchmarks/results/expect.json.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from attention import RESULTS, environment

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "examples")]

from fx_passes import expect, explain  # noqa: E402


def byte_model() -> tuple[Callable[..., Any], dict[str, Any]]:
    from train_lm import ByteLM

    return ByteLM(), {"ids": torch.randint(256, (1, 2048))}


def bert() -> tuple[Callable[..., Any], dict[str, Any]]:
    from transformers import BertConfig, BertModel

    return BertModel(BertConfig()).train(), {"input_ids": torch.randint(1000, (1, 512))}


def smollm2() -> tuple[Callable[..., Any], dict[str, Any]]:
    from finetune_smollm2 import pretrained

    return pretrained()[0], {"input_ids": torch.randint(1000, (1, 2048)), "use_cache": False}


MODELS = {"bytes": byte_model, "bert": bert, "smollm2": smollm2}


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("models", nargs="+", choices=MODELS)
    p.add_argument("--cpu-time", action="store_true", help="the CPU's time, on a machine that others use")
    a = p.parse_args()
    if a.cpu_time:
        if torch.get_num_threads() > 1:
            raise SystemExit("--cpu-time needs one thread: OMP_NUM_THREADS=1")
        expect.time = SimpleNamespace(perf_counter=time.process_time)
    torch.manual_seed(0)
    file = RESULTS / "expect.json"
    known = json.loads(file.read_text())["models"] if file.exists() else {}
    for name in a.models:
        model, inputs = MODELS[name]()
        found = explain(model, **inputs).expectation
        assert found is not None
        print(f"{name}\n{found}", flush=True)
        known[name] = {
            "n": found.keys,
            "backward share of operations": found.backward_share,
            "largest speed-up": found.largest_speedup,
            "predicted": {
                f"n = {found.keys * times}, c = {c:g}": found.speedup(c, times)
                for times in (1, 4)
                for c in (30.0, 100.0)
            },
        }
        output = {"environment": environment("cpu"), "threads": torch.get_num_threads(), "cpu time": a.cpu_time}
        file.write_text(json.dumps({**output, "models": known}, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""The tables of README.md and docs/, written from benchmarks/results/ by benchmarks/doc_numbers.py."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Callable, Iterable
from itertools import product
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
MISSING = "not measured"
SETTINGS = {
    "exact": "exact",
    "c30": "c = 30",
    "c100": "c = 100",
    "auto": 'c = "auto"',
    "again": "exact, repeated",
}
SAMPLERS = ("systematic", "independent", "tile")
LENGTHS = (512, 1024, 2048, 4096)


def read(name: str) -> Any:
    """A file of results, or None where it was not measured yet. One of JSON lines is the list of its lines."""
    file = RESULTS / f"{name}.json"
    if file.exists():
        return json.loads(file.read_text())
    lines = file.with_suffix(".jsonl")
    return [json.loads(line) for line in lines.read_text().splitlines()] if lines.exists() else None


def markdown(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    header = list(header)
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def folded(title: str, text: str) -> str:
    """A section of the site that unfolds."""
    return f'??? note "{title}"\n\n' + textwrap.indent(text, "    ")


def train_quality(name: str) -> str:
    result = read(f"train-quality-{name}")
    header = ["setting", "seeds", "final validation loss, mean (lowest to highest)", "minus exact (± over windows)",
              "CPU seconds", "of the exact run's time until its final loss"]  # fmt: skip
    rows = []
    for r in result["summary"] if result else []:
        seeds = ", ".join(map(str, r["seeds"]))
        if not seeds:
            rows.append([SETTINGS[r["setting"]], "none finished", *[MISSING] * 4])
            continue
        pairs = r["minus exact"]
        loss = (
            f"{r['mean']:.4f} ({r['lowest']:.4f} to {r['highest']:.4f})" if len(r["seeds"]) > 1 else f"{r['mean']:.4f}"
        )
        if r["setting"] == "exact":
            rows.append([SETTINGS["exact"], seeds, loss, "0", each(f"{p['seconds']:.0f}" for p in pairs), "1"])
            continue
        apart = each(f"{p['difference']:+.4f} ± {p['error']:.4f}" for p in pairs) or MISSING
        times = each(until(p) for p in pairs) or MISSING
        rows.append([SETTINGS[r["setting"]], seeds, loss, apart, each(f"{p['seconds']:.0f}" for p in pairs), times])
    return markdown(header, rows)


def each(texts: Iterable[str]) -> str:
    return ", ".join(texts)


def until(pair: dict[str, Any]) -> str:
    at, exact = pair["seconds to exact's final loss"], pair["exact's seconds"]
    return "not reached" if at is None else f"{at / exact:.2f}"


def variance_rows(name: str) -> list[dict[str, Any]]:
    return list((read(f"variance-{name}") or {"rows": []})["rows"])


def variance(name: str, lengths: Iterable[int]) -> str:
    """Relative variance by point of training, n, sampler and c."""
    found = {(r["point"], r["n"], r["sampler"], r["c"]): r for r in variance_rows(name)}
    cs = sorted({key[3] for key in found})
    rows = []
    for point in sorted({key[0] for key in found}, key=training_step):
        for n, sampler in product(lengths, SAMPLERS):
            cells = [found.get((point, n, sampler, c)) for c in cs]
            if any(cells):
                label = [f"step {training_step(point)}"] if name == "byte" else []
                rows.append([*label, str(n), sampler, *(MISSING if r is None else noise(r) for r in cells)])
    first = ["weights after"] if name == "byte" else []
    return markdown([*first, "n", "sampler", *(f"c = {c:g}" for c in cs)], rows)


def training_step(point: str) -> int:
    return int(point.rpartition("step")[2]) if "-step" in point else 0


def noise(r: dict[str, Any]) -> str:
    """Total with its standard error, and the worst kind."""
    if r["worst"] < 1e-5:
        return "below 0.001%"
    return f"{percent(r['total'])} ± {percent(r['error'])}; {percent(r['worst'])}"


def percent(x: float) -> str:
    return f"{100 * x:.2g}%" if x < 0.1 else f"{100 * x:.0f}%"


def attention_scaling() -> str:
    result = read("attention-scaling")
    rows = []
    for r in sorted(result["rows"] if result else [], key=lambda r: (r["dtype"] != "float32", r["n"])):
        ms = [milliseconds(r["seconds"][name]) for name in ("library", "library under Inductor", "SUS")]
        up = [f"{r['speed-up'][name]:.2f}x" for name in ("library", "library under Inductor")]
        memory = [r["memory"]["library"], r["memory"]["SUS"]]
        mib = MISSING if None in memory else " / ".join(f"{m / 2**20:.0f}" for m in memory)
        rows.append([r["dtype"], f"{r['n']:,}", " / ".join(ms), " / ".join(up), mib, str(r["rounds"])])
    header = ["dtype", "n", "SDPA / SDPA under Inductor / SUS, ms", "SUS over SDPA / over Inductor",
              "peak memory, SDPA / SUS, MiB", "rounds"]  # fmt: skip
    return markdown(header, rows)


def milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:.1f}" if seconds < 0.1 else f"{1e3 * seconds:,.0f}"


def whole_steps() -> str:
    names = {"example": "the example, 4 layers, width 128", "gpt2": "GPT-2, 4 layers, width 512, dropout 0.1",
             "smollm2": "SmolLM2-135M, pretrained", "quality": "byte model of train_quality.py, bfloat16"}  # fmt: skip
    rows = []
    for model, label in names.items():
        for r in (read(f"steps-{model}") or {"rows": []})["rows"]:
            over = r["speed-up over"]
            compiled = f"{over['exact, compiled']:.2f}x" if "exact, compiled" in over else MISSING
            memory = " / ".join(f"{r['memory'][name] / 2**20:,.0f}" for name in ("exact", "SUS"))
            spread = f"{r['lowest']['exact']:.2f} to {r['highest']['exact']:.2f}"
            speed = f"{over['exact']:.2f}x ({spread})"
            rows.append(
                [label, f"{r['n']:,}", speed, compiled, f"{r['largest possible']:.2f}x", memory, str(r["rounds"])]
            )
    header = ["model", "n", "speed-up over exact (range of the rounds)", "over exact under Inductor",
              "a free attention backward", "peak memory, exact / SUS, MiB", "rounds"]  # fmt: skip
    return markdown(header, rows)


TABLES: dict[str, Callable[[], str]] = {
    "train_quality_byte": lambda: train_quality("byte"),
    "train_quality_smollm2": lambda: train_quality("smollm2"),
    "variance_byte": lambda: variance("byte", [2048]),
    "variance_byte_all": lambda: folded("All lengths, 512 to 4096", variance("byte", LENGTHS)),
    "variance_smollm2": lambda: variance("smollm2", LENGTHS),
    "attention_scaling": attention_scaling,
    "whole_steps": whole_steps,
}

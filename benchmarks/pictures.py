#!/usr/bin/env python
"""Draws the pictures of README.md and docs/ into docs/img/, from benchmarks/results/ alone.

python benchmarks/pictures.py                     # all for which there are results
python benchmarks/pictures.py time-against-n      # one of them
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any

import doc_tables
import matplotlib
from doc_tables import read

matplotlib.use("Agg")
import matplotlib.pyplot as plt

FOLDER = Path(__file__).parents[1] / "docs/img"
GREY, BLUE, ORANGE, GREEN, PURPLE = "#666666", "#0072b2", "#d55e00", "#009e73", "#8f5aa8"
SUS, LIBRARY = ORANGE, GREY
SETTINGS = {"exact": GREY, "c30": ORANGE, "c100": BLUE, "auto": GREEN, "again": "black"}
STYLE = {
    "axes.grid": True, "grid.color": "#e5e5e5", "axes.axisbelow": True, "font.size": 10, "axes.titlesize": 11,
    "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False, "lines.linewidth": 1.8,
    "lines.markersize": 4.5, "figure.facecolor": "white", "savefig.facecolor": "white",
}  # fmt: skip


def lengths(axis: Any, n: list[int]) -> None:
    axis.set_xticks(n, [f"{x // 1024}k" if x >= 1024 else str(x) for x in n])
    axis.minorticks_off()
    axis.set_xlabel("sequence length n")


def time_against_n() -> Any:
    result = read("attention-scaling")
    dtypes = [d for d in ("float32", "bfloat16") if any(r["dtype"] == d for r in result["rows"])]
    figure, axes = plt.subplots(1, len(dtypes), figsize=(4.6 * len(dtypes), 3.7), sharey=True, squeeze=False)
    lines = {"library": (LIBRARY, "-", "SDPA"), "library under Inductor": (BLUE, ":", "SDPA under Inductor"),
             "SUS": (SUS, "-", "SUS, c = 30")}  # fmt: skip
    for axis, dtype in zip(axes[0], dtypes, strict=True):
        rows = [r for r in result["rows"] if r["dtype"] == dtype]
        n = [r["n"] for r in rows]
        for name, (colour, style, label) in lines.items():
            seconds = [r["seconds"][name] for r in rows]
            slope = result["slopes"].get(dtype, {}).get(name)
            label += f" (slope {slope:.2f})" if slope else ""
            axis.loglog(n, seconds, marker="o", linestyle=style, color=colour, label=label)
        largest = rows[-1]
        axis.annotate(
            f"{largest['speed-up']['library']:.1f}x",
            (largest["n"], (largest["seconds"]["library"] * largest["seconds"]["SUS"]) ** 0.5),
            xytext=(5, 0), textcoords="offset points", color=SUS, fontweight="bold", va="center",
        )  # fmt: skip
        lengths(axis, n)
        axis.set_title(dtype)
        axis.legend(loc="upper left")
    axes[0][0].set_ylabel("forward + backward, CPU seconds")
    device = result["environment"]["device"].replace("(R)", "").replace("Processor", "").strip()
    figure.suptitle(f"Causal attention, one head of 64, one thread ({device})", fontsize=11)
    return figure


def train_quality() -> Any | None:
    results = [(name, read(f"train-quality-{name}")) for name in ("byte", "smollm2")]
    results = [(name, r) for name, r in results if r is not None]
    titles = {"byte": "byte model, 1.7M parameters, n = 4096", "smollm2": "SmolLM2-135M fine-tuned, n = 2048"}
    figure, axes = plt.subplots(len(results), 2, figsize=(9.6, 3.6 * len(results)), sharey="row", squeeze=False)
    for line, (name, result) in zip(axes, results, strict=True):
        full, ends = result["settings"]["steps"], []
        for setting, colour in SETTINGS.items():
            curves = [r["curve"] for r in result["runs"] if r["setting"] == setting and r["finished"]]
            points = list(zip(*curves, strict=True))  # by validation, then by seed
            if not points:
                continue
            losses = [[y for *_, y in point] for point in points]
            mean, low, high = ([f(y) for y in losses] for f in (fmean, min, max))
            label = f"{doc_tables.SETTINGS[setting]} ({len(curves)} seeds)"
            style = {"color": colour, "marker": "o", "markersize": 2.5, "linewidth": 1.4, "label": label}
            style["linestyle"] = "--" if setting == "again" else "-"
            for axis, x in (
                (line[0], [p[0][0] for p in points]),
                (line[1], [fmean(t for _, t, _ in p) for p in points]),
            ):
                axis.plot(x, mean, **style)
                axis.fill_between(x, low, high, color=colour, alpha=0.1, linewidth=0)
            ends += [y for point, ys in zip(points, losses, strict=True) for y in ys if point[0][0] >= full / 8]
        line[0].set_ylim(min(ends) - 0.08 * (max(ends) - min(ends)), max(ends) + 0.05 * (max(ends) - min(ends)))
        line[0].set(xlabel="step", ylabel="validation loss, nats", title=titles[name])
        line[1].set(xlabel="CPU seconds of training", title=titles[name])
        line[0].legend(fontsize=8, loc="upper right")
        line[0].xaxis.get_major_locator().set_params(integer=True)
    return figure


def variance() -> Any | None:
    panels = []
    byte, smollm2 = doc_tables.variance_rows("byte"), doc_tables.variance_rows("smollm2")
    for point in sorted({r["point"] for r in byte}, key=doc_tables.training_step):
        title = f"byte model, step {doc_tables.training_step(point)}"
        panels.append((title, [r for r in byte if r["point"] == point]))
    panels.append(("SmolLM2-135M, pretrained", smollm2))
    rows = -(-len(panels) // 2)
    figure, axes = plt.subplots(rows, 2, figsize=(9.6, 3.6 * rows), sharey=True, squeeze=False)
    for spare in axes.flat[len(panels) :]:
        spare.set_visible(False)
    colours = dict(zip(doc_tables.LENGTHS, (PURPLE, BLUE, ORANGE, GREEN), strict=True))
    styles = dict(zip(doc_tables.SAMPLERS, ("-", ":", "--"), strict=True))
    for axis, (title, points) in zip(axes.flat, panels, strict=False):
        for sampler, style in styles.items():
            for n, colour in colours.items():
                mine = sorted((r["c"], r["total"]) for r in points if r["sampler"] == sampler and r["n"] == n)
                mine = [(c, y) for c, y in mine if y > 1e-6]
                if mine:
                    axis.loglog(*zip(*mine, strict=True), linestyle=style, marker="o", color=colour)
        axis.axhline(0.01, color="black", linewidth=0.8)
        axis.set(title=title, xlabel="c")
        axis.set_xticks([5, 10, 30, 100, 300], ["5", "10", "30", "100", "300"])
        axis.minorticks_off()
    for n, colour in colours.items():
        axes[0][0].plot([], [], color=colour, label=f"n = {n}")
    for sampler, style in styles.items():
        axes[0][1].plot([], [], color="black", linestyle=style, label=sampler)
    axes[0][0].legend(fontsize=8)
    axes[0][1].legend(fontsize=8)
    for line in axes:
        line[0].set_ylabel("variance added by SUS / the batch's own\n(line: 1%)")
    return figure


PICTURES: dict[str, tuple[Callable[[], Any], tuple[str, ...]]] = {
    "time-against-n": (time_against_n, ("attention-scaling",)),
    "train-quality": (train_quality, ("train-quality-byte", "train-quality-smollm2")),
    "variance": (variance, ("variance-byte", "variance-smollm2")),
}


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(PICTURES)}; default all")
    a = p.parse_args()
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name in a.names or PICTURES:
        draw, sources = PICTURES[name]
        if all(read(source) is None for source in sources):
            print(f"{name}: no results yet")
            continue
        with plt.rc_context(STYLE):
            figure = draw()
            figure.tight_layout()
            figure.savefig(FOLDER / f"{name}.png", dpi=140, metadata={"Software": None})
            plt.close(figure)
        print(f"{name}: {FOLDER / name}.png")


if __name__ == "__main__":
    main()

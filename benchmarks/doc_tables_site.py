"""More tables for docs/, from results that single benchmarks left; written by benchmarks/doc_numbers.py."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import groupby
from typing import Any

from doc_tables import MISSING, folded, markdown, percent, read, training_step, variance_rows


def attention_cpu() -> str:
    """Forward and backward of one attention against the library's, per kind of call."""
    rows = [
        ("causal, n = 2048, 8 heads", ["causal n=2048"]),
        ("causal, n = 8192, 4 heads", ["causal n=8192"]),
        ("causal, n = 32768, 2 heads", ["causal n=32768"]),
        ("full, n = 8192, 4 heads", ["full n=8192"]),
        ("causal, d = 128, n = 2048 / 8192 / 32768", [f"causal n={n} d=128" for n in (2048, 8192, 32768)]),
        ("full, d = 128, n = 8192", ["full n=8192 d=128"]),
        ("causal, 9 heads over 3, n = 2048 / 8192", [f"causal n={n} gqa 9/3" for n in (2048, 8192)]),
        ("key padding, n = 2048 / 8192", [f"padding n={n}" for n in (2048, 8192)]),
        ("causal and padding as a bool mask, n = 2048 / 8192", [f"mask bool n={n}" for n in (2048, 8192)]),
        ("the same added as finfo.min (Hugging Face eager)", [f"mask float n={n}" for n in (2048, 8192)]),
        ("causal with dropout 0.1, n = 2048 / 8192", [f"dropout n={n}" for n in (2048, 8192)]),
        ("a learned bias per head, query and key, n = 2048, 8 heads", ["learned bias n=2048"]),
        ("bfloat16, causal, n = 2048 / 8192 / 32768", [f"causal n={n} bfloat16" for n in (2048, 8192, 32768)]),
        ("bfloat16, full, n = 8192", ["full n=8192 bfloat16"]),
    ]
    now = _cases("attention-cpu-avx2")
    earlier = {**_cases("attention-cpu-quiet"), **_cases("attention-cpu-masks")}

    def cells(cases: dict[str, Any], names: list[str], key: str, shown: Callable[[float], str]) -> str:
        return " / ".join(shown(cases[name][key]) for name in names) if set(names) <= set(cases) else MISSING

    table = [
        [
            title,
            cells(now, names, "speed-up", _times),
            cells(now, names, "backward / forward", "{:.2f}".format),
            cells(now, names, "forward / library forward", "{:.2f}".format),
            cells(earlier, names, "speed-up", _times),
        ]
        for title, names in rows
    ]
    header = ["case", "speed-up, EPYC", "sparse backward / own forward", "own forward / library's", "speed-up, Xeon"]
    return markdown(header, table)


def _cases(name: str) -> dict[str, Any]:
    return {case["name"]: case for case in (read(name) or {"cases": []})["cases"]}


def _times(ratio: float) -> str:
    return f"{ratio:.0f}x" if ratio >= 10 else f"{ratio:.1f}x"  # above 10 the decimals are noise


def gpu_headline() -> str:
    """Forward and backward of causal attention on a GPU, against the fastest dense attention there."""
    found = [row for row in read("gpu-h200") if row["stage"] == "headline" and "both_ms" in row]
    table = []
    for _, shape in groupby(found, key=lambda row: row["key"]):
        by_name = {(row["name"], row["c"]): row for row in shape}
        sus = by_name["sus tile", 30.0]
        peer = by_name[sus["best_peer"], None]
        title = f"{sus['n']}, {sus['d']}"
        if sus["kv_heads"] != sus["heads"]:
            title += f", {sus['heads']} heads over {sus['kv_heads']}"
        if sus["kind"] == "diffuse":
            title += ", diffuse inputs"
        captured = "captured_ms" in sus
        table.append(
            [
                title,
                _ms(peer["both_ms"]) + (f" ({_ms(peer['captured_ms'])})" if captured else ""),
                _ms(sus["both_ms"]) + (f" ({_ms(sus['captured_ms'])})" if captured else ""),
                f"{sus['speed_up']:.2f}" + (f" (**{sus['captured_speed_up']:.2f}**)" if captured else ""),
                f"{peer['ceiling']:.2f}",
                f"{sus['kept_per_row']:.0f}",
                f"{max(sus[f'noise_{x}'] for x in 'qkv'):.1%}",
            ]
        )
    header = [
        "n, head size",
        "cuDNN, ms",
        "SUS, ms",
        "speed-up",
        "a free backward",
        "keys kept per row",
        "noise",
    ]
    return markdown(header, table)


def _ms(x: float) -> str:
    return f"{x:.3g}"


def gpu_kernels() -> str:
    """Milliseconds of each kernel of the tile sampler's backward at d = 128."""
    names = {"`tile_dkdv`": "tile_dkdv", "`tile_dq`": "tile_dq", "`tile_probe`": "tile_probe",
             "`tile_rows`": "tile_rows", "sort of the lists": "RadixSortOnesweep"}  # fmt: skip
    table = [
        [str(row["n"]), _ms(row["total_ms"]),
         *(f"{sum(k['ms'] for k in row['kernels'] if name in k['kernel']):.2f}" for name in names.values())]
        for row in read("gpu-h200")
        if row["stage"] == "kernels" and row["part"] == "backward" and row["d"] == 128
    ]  # fmt: skip
    return markdown(["n", "all", *names], table)


def gpu_ptxas() -> str:
    """Registers, stack and shared memory of the tile sampler's kernels."""
    kernels = read("notes")["ptxas"]["values"]
    table = [[f"`{name}`", *(" / ".join(map(str, x)) for x in by_arch.values())] for name, by_arch in kernels.items()]
    return markdown(["", *kernels["tile_probe"]], table)


def compile_time() -> str:
    """CPU seconds until the second step, by layers and way to compile."""
    found = read("compile-time")
    table = []
    for layers in (24, 2):
        ways = found[f"{layers} layers"]
        seconds = {(way, run): f"{r['until_second_step']:.1f}" for way in ways for run, r in ways[way].items()
                   if run != "step_ms"}  # fmt: skip
        inductor = (" / ".join(seconds[way, run] for run in ("cold", "warm")) for way in ("whole", "blocks"))
        eager = " / ".join(seconds[way, "cold"] for way in ("whole, eager", "blocks, eager"))
        table.append([str(layers), *inductor, eager])
    header = ["layers", "Inductor, whole: empty cache / warm", "Inductor, blocks that share their graphs: empty / warm"]
    header.append('`compiler="eager"`, whole / blocks')
    return markdown(header, table)


def variance_kinds() -> str:
    """Relative variance at c = 30 of the parameters of each kind."""
    models = {"byte": ("byte model after step {}, n = 512", 512), "smollm2": ("SmolLM2-135M, n = 2048", 2048)}
    kinds = ("total", "q_proj", "k_proj", "v_proj", "o_proj", "mlp")
    table = [
        [label.format(training_step(r["point"])), r["sampler"], *(percent(r[kind]) for kind in kinds)]
        for name, (label, n) in models.items()
        for r in sorted(variance_rows(name), key=lambda r: training_step(r["point"]))
        if r["n"] == n and r["c"] == 30 and r["sampler"] != "tile" and all(kind in r for kind in kinds)
    ]
    return markdown(["model", "sampler", *kinds], table)


def kept_smollm2() -> str:
    """Keys kept per row on SmolLM2-135M."""
    found = variance_rows("smollm2")
    kept = {(r["n"], r["c"], r["sampler"]): r["kept"] for r in found}
    table = [
        [str(n), f"{c:g}", *(_kept(kept[n, c, s]) if (n, c, s) in kept else MISSING for s in ("systematic", "tile"))]
        for n, c in sorted({(r["n"], r["c"]) for r in found})
    ]
    return markdown(["n", "c", "systematic", "tile"], table)


def _kept(x: float) -> str:
    return f"{x:.0f}" if x >= 100 else f"{x:.1f}"


def expectations() -> str:
    """What `explain` predicts for three models."""
    names = {
        "bytes": "byte model of the example (4 layers, width 128)",
        "bert": "BERT base of transformers, with its dropout",
        "smollm2": "SmolLM2-135M",
    }
    table = []
    for key, model in read("expect")["models"].items():
        n, predicted = model["n"], model["predicted"]
        near, far = (" / ".join(f"{predicted[f'n = {m}, c = {c}']:.2f}x" for c in (30, 100)) for m in (n, 4 * n))
        share, most = model["backward share of operations"], model["largest speed-up"]
        table.append([f"{names[key]}, n = {n}", f"{share:.1%}", f"{most:.2f}x", near, far])
    header = ["model, one sequence", "backward's share of a step's operations", "largest speed-up"]
    return markdown([*header, "predicted at n, c = 30 / 100", "at 4 n"], table)


def auto_c_bytes() -> str:
    return _auto_c("auto-c-bytes-2048")


def auto_c_bytes_8192() -> str:
    return _auto_c("auto-c-bytes-8192")


def auto_c_smollm2() -> str:
    return _auto_c("auto-c-smollm2-2048")


def _auto_c(name: str) -> str:
    """Speed-up and variance at the chosen c and at fixed ones."""
    found = read(name)
    table = [
        [
            f"{row['c']:.3g}" + (" (auto)" if row["c"] == found["chosen"] else ""),
            f"{row['step_speedup']:.2f}x",
            percent(row["relative_variance"]),
            percent(row["worst_relative_variance"]),
            f"{row['net_speedup']:.2f}x",
            f"{row['kept_per_row']:.1f}",
        ]
        for row in found["rows"]
        if math.isfinite(float(row["c"]))
    ]
    header = ["c", "speed-up of a step", "relative variance", "worst kind", "net speed-up", "kept per row"]
    return markdown(header, [*table, ["inf", "1", "0", "0", "1", "all"]])


def auto_c_landscapes() -> str:
    """How near to the best c the schedule comes where that is known."""
    found = read("auto-c-landscapes")
    table = [
        [
            f"{row['noise']:.0%}"
            + (f", {row['outliers']:.0%} of the passes ten times as long" if row["outliers"] else ""),
            f"{row['within 5% of the best']} of {found['landscapes']}",
            f"{row['median loss']:.2%}",
            f"{row['95% below']:.1%}",
            f"{row['largest loss']:.1%}",
            f"{row['probes until first within 5%, nine of ten']} probes",
        ]
        for row in found["rows"]
    ]
    header = [
        "noise of each time and variance",
        "within 5% of the best",
        "median loss",
        "95% of the losses below",
        "largest",
        "nine of ten within 5% after",
    ]
    return markdown(header, table)


FAMILIES = {
    "hf-decoder": "transformers: decoders",
    "hf-encoder": "transformers: encoders",
    "hf-encdec": "transformers: encoders with decoders",
    "hf-audio": "transformers: audio",
    "hf-vision": "transformers: vision",
    "hf-multimodal": "transformers: multimodal",
    "hf-base": "transformers: other models",
    "timm": "timm",
    "x-transformers": "x-transformers",
    "hand": "attention written by hand",
    "negative": "negatives: must not be touched",
    "noattn": "models without softmax attention",
}


def found_by_family() -> str:
    """Attentions found in the zoo, per family of models."""
    entries = read("zoo")["entries"]
    groups = {title: [e for e in entries if _family(e) == family] for family, title in FAMILIES.items()}
    table = [
        [title, str(len(group)), *(str(sum(e[key] for e in group)) for key in ("attentions", "found", "false"))]
        for title, group in groups.items()
    ]
    total = ["**all**", *(f"**{read('zoo')['totals'][key]}**" for key in ("entries", "attentions", "found", "false"))]
    return markdown(["family", "entries", "attentions", "found and exact", "false positives"], [*table, total])


def found_missing() -> str:
    """The entries where something is missing."""
    missing = [e for e in read("zoo")["entries"] if e["found"] < e["attentions"]]
    table = [[f"`{e['name']}`", f"{e['found']} of {e['attentions']}", _why_missing(e)] for e in missing]
    return markdown(["entry", "found and exact", "why"], table)


def _why_missing(entry: dict[str, Any]) -> str:
    if "error" in entry:
        return str(entry["error"])
    return "left, see below" if entry["exact"] else "gradients beyond the limit of exactness, see below"


def found_models() -> str:
    """All models, family by family, in sections that unfold."""
    entries = read("zoo")["entries"]
    parts = []
    for family, title in FAMILIES.items():
        models: dict[str, list[dict[str, Any]]] = {}
        for e in entries:
            if _family(e) == family:
                name = e["name"].removesuffix("/eager").removesuffix("/sdpa").split("/", 1)[-1]
                models.setdefault(name, []).append(e)
        rows = [[f"`{name}`", _counts(group, "attentions"), _found(group)] for name, group in sorted(models.items())]
        if rows:
            table = markdown(["model", "attentions", "found"], rows)
            parts.append(folded(f"{title} ({len(rows)})", table))
    return "\n\n".join(parts)


def _family(entry: dict[str, Any]) -> str:
    return "noattn" if entry["family"].endswith(":noattn") else str(entry["family"])


def _found(entries: list[dict[str, Any]]) -> str:
    """Bold where something is missing."""
    complete = all(e["found"] == e["attentions"] for e in entries)
    return _counts(entries, "found") if complete else f"**{_counts(entries, 'found')}**"


def _counts(entries: list[dict[str, Any]], key: str) -> str:
    """One number, or one for each attention implementation of transformers where they differ."""
    counts = {e["name"].rsplit("/", 1)[-1]: e[key] for e in entries}
    if len(set(counts.values())) == 1:
        return str(entries[0][key])
    return ", ".join(f"{count} ({name})" for name, count in counts.items())


def fits_memory() -> str:
    """What a fit leaves in memory, by how its model was compiled."""
    names = {"eager": "not compiled", "compile": "`model.compile()`, whose code the next fit uses again",
             "compile, reset": "`model.compile()` and `torch._dynamo.reset()`", "sus": "SUSBackprop"}  # fmt: skip
    rows = [
        [r["compiler"], "two" if r["model"] == "breaks" else "none", names[r["way"]], f"{r['objects_per_fit']:,}",
         f"{r['KiB_per_fit']:,}"]
        for r in (read("fits-memory") or {"rows": []})["rows"]
    ]  # fmt: skip
    return markdown(["compiler", "graph breaks", "way", "Python objects that stay", "KiB that stay"], rows)


def coverage() -> str:
    """Lines and branches that the default tests run, per folder of the packages."""
    result = read("coverage") or {"folders": {}}
    rows = [
        [folder if folder == "all" else f"`{folder}`", f"{r['lines']:,}", f"{r['branches']:,}", f"{r['covered']:.1%}"]
        for folder, r in result["folders"].items()
    ]
    return markdown(["folder", "lines", "branches", "covered"], rows or [[MISSING] * 4])


TABLES: dict[str, Callable[[], str]] = {
    f.__name__: f
    for f in (
        attention_cpu,
        gpu_headline,
        gpu_kernels,
        gpu_ptxas,
        compile_time,
        kept_smollm2,
        variance_kinds,
        expectations,
        auto_c_bytes,
        auto_c_bytes_8192,
        auto_c_smollm2,
        auto_c_landscapes,
        found_by_family,
        found_missing,
        found_models,
        fits_memory,
        coverage,
    )
}

"""The short table that ends a run: at most `LINES` lines, what decides first."""

from __future__ import annotations

from collections.abc import Iterable

from .rows import Row

LINES = 60
WIDTH = 150


def card(rows: list[Row]) -> Iterable[str]:
    for row in rows:
        if row["key"] == "about" and "torch" in row:
            versions = f"torch {row['torch']}, triton {row['triton']}, commit {str(row['commit'])[:9]}"
            yield f"{row['name']}, {versions}, cudnn {row.get('cudnn')}"
        elif row.get("what") == "copy":
            yield f"copy {row['gb_per_s']} GB/s (read and written)"
        elif "tflops" in row:
            yield f"{row['what']} {row['tflops']} TFLOP/s"
    there = [x["peer"] for x in rows if x.get("runs")] + [x["package"] for x in rows if x.get("found")]
    missing = [x["peer"] for x in rows if x.get("runs") is False] + [
        x["package"] for x in rows if x.get("found") is False
    ]
    yield f"peers: {', '.join(there) or 'none'}; not here: {', '.join(missing) or 'none'}"


def compilation(rows: list[Row]) -> Iterable[str]:
    total = next((x for x in rows if x["key"] == "all"), None)
    times = sorted((x for x in rows if "seconds" in x and x["key"] != "all"), key=lambda x: -x["seconds"])
    if total is not None:
        slowest = ", ".join(f"{x['key']} {x['seconds']:.0f} s" for x in times[:2])
        yield (
            f"{len(times)} of {total['configurations']} in {total['seconds']:.0f} s by {total['processes']} processes; "
            f"slowest: {slowest}"
        )


def correct(rows: list[Row]) -> Iterable[str]:
    checks = [x for x in rows if "ok" in x]
    wrong = [x for x in checks if not x["ok"]]
    yield f"{len(checks) - len(wrong)} of {len(checks)} checks pass"
    for row in wrong[:10]:
        skip = {"stage", "card", "key", "ok", "c", "shape", "kept_per_row", "slow", "name", "sampler"}
        said = {k: v for k, v in row.items() if k not in skip}
        yield f"WRONG {row['key']} ({row.get('shape', '')}): {said}"
    means = [x for x in checks if x.get("check") == "mean"]
    for sampler in dict.fromkeys(x["sampler"] for x in means):
        own = [x for x in means if x["sampler"] == sampler]
        largest = max(max(x["largest_z"]) for x in own)
        active = sum(1 for x in own if max(x["noise"]) > 1e-3)
        blind = sorted(max(x["bias_seen"]) for x in own)
        yield f"{sampler}: a factor on a gradient is seen from {blind[0]:.1%} (best case) or {blind[-1]:.1%} (worst) on"
        bits = [x["forward_bits_of_library"] for x in checks if x.get("check") == "seeds" and x["sampler"] == sampler]
        yield (
            f"{sampler}: largest z {largest}, {active} of {len(own)} cases sampled (the others kept everything); "
            f"forward has the library's bits in {sum(bits)} of {len(bits)}"
        )


def headline(rows: list[Row]) -> Iterable[str]:
    """Per shape the fastest dense peer, with what a free backward would be worth, and SUS; the other peers' times."""
    yield (
        f"{'n':>6} {'d':>4} {'heads':>5} {'kind':8} {'':22} {'forward':>9} {'backward':>9} {'both ms':>9} "
        f"{'speed-up':>8} {'kept/row':>8} {'noise dQ':>9} {'host ms':>8}"
    )
    timed = [x for x in rows if "both_ms" in x]
    for row in timed:
        if row["c"] is None and "ceiling" not in row:
            continue
        name = row["name"] + (f" c={row['c']:g}" if row["c"] is not None else "")
        heads = row["heads"] if row["heads"] == row["kv_heads"] else f"{row['heads']}/{row['kv_heads']}"
        line = (
            f"{row['n']:>6} {row['d']:>4} {heads:>5} {row['kind']:8} {name:22} {row['forward_ms']:>9} "
            f"{row['backward_ms']:>9} {row['both_ms']:>9} "
        )
        if "ceiling" in row:
            others = [x for x in timed if x["key"] == row["key"] and x["c"] is None and x is not row]
            ceiling = f"<= {row['ceiling']:.2f}"
            said = "; ".join(f"{x['name']} {x['both_ms']}" for x in others)
            graph = f"  graph {row['captured_ms']}" if "captured_ms" in row else ""
            yield f"{line}{ceiling:>8} {said}{graph}"
        else:
            speed = f"{row['speed_up']:.2f}" if "speed_up" in row else ""
            kept, noise = row.get("kept_per_row") or "", row.get("noise_q", "")
            graph = f"  graph {row['captured_ms']} {row['captured_speed_up']:.2f}" if "captured_ms" in row else ""
            yield f"{line}{speed:>8} {kept:>8} {noise:>9} {row.get('host_ms', ''):>8}{graph}"


def kernels(rows: list[Row]) -> Iterable[str]:
    for row in rows:
        if "kernels" in row and row["part"] == "backward":
            top = ", ".join(f"{x['kernel'][:28]} {x['ms']}" for x in row["kernels"][:5])
            yield f"{row['name']} n={row['n']} d={row['d']} heads={row['heads']}: {row['total_ms']} ms: {top}"


def tune(rows: list[Row]) -> Iterable[str]:
    timed = [x for x in rows if "backward_ms" in x]
    for d in dict.fromkeys(x["d"] for x in timed):
        own = [x for x in timed if x["d"] == d]
        plain = next(x["backward_ms"] for x in own)
        best = min(own, key=lambda x: x["backward_ms"])
        yield f"d={d}: {plain} ms as it is; best of {len(own)}: {best['backward_ms']} ms with {best['candidate']}"


def packages(rows: list[Row]) -> Iterable[str]:
    checks = [x for x in rows if "ok" in x]
    missing = dict.fromkeys(x["package"] for x in rows if x.get("note") == "not installed")
    yield f"{sum(x['ok'] for x in checks)} of {len(checks)} calls exact; not installed: {', '.join(missing) or 'none'}"
    for row in checks:
        if not row["ok"]:
            yield f"WRONG {row['key']}: eager {row['eager']}, compiled {row['compiled']}, {row['sites']}"


SECTIONS = {
    "card": card, "compile": compilation, "correct": correct, "headline": headline, "kernels": kernels, "tune": tune,
    "packages": packages,
}  # fmt: skip


def lines(rows: list[Row]) -> list[str]:
    """Sections in the order of the stages; what is too long is cut, errors and notes come with their section."""
    made: dict[str, list[str]] = {}
    for stage, section in SECTIONS.items():
        own = [x for x in rows if x["stage"] == stage]
        if not own:
            continue
        body = list(section(own))
        said = [
            f"{x['key']} {x.get('name', '')}: {x.get('error') or x['note']}"
            for x in own
            if "error" in x or ("note" in x and stage != "packages")
        ]
        slow = {f"{x['name']} took the PyTorch path: {reason}" for x in own for reason in x.get("slow") or ()}
        said += sorted(slow)
        finished = {x["key"] for x in own if x.get("ended")}
        said += [f"{x['key']}: began and did not end" for x in own if x.get("begun") and x["key"] not in finished]
        said = list(dict.fromkeys(said))
        made[stage] = [f"== {stage}", *body, *said[:6], *([f"... {len(said) - 6} more notes"] if len(said) > 6 else [])]
    over = sum(map(len, made.values())) - LINES
    for stage in ("kernels", "compile", "correct", "headline"):
        if over > 0 and stage in made:
            keep = max(4, len(made[stage]) - over - 1)
            if keep < len(made[stage]) - 1:
                over -= len(made[stage]) - keep - 1
                made[stage] = [*made[stage][:keep], f"... {len(made[stage]) - keep} more in rows.jsonl"]
    return [line[:WIDTH] for section in made.values() for line in section]

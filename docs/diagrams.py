"""Draws docs/img/kept-entries.svg, systematic.svg and pipeline.svg: `python docs/diagrams.py`. Needs torch alone."""

from __future__ import annotations

from pathlib import Path

import torch

IMG = Path(__file__).parent / "img"
INK, GREY, BLUE, ORANGE = "#24292f", "#8b949e", "#3f51b5", "#e4572e"
FONT = 'font-family="system-ui, -apple-system, Segoe UI, Roboto, sans-serif"'


def svg(width: int, height: int, title: str, parts: list[str]) -> str:
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'role="img" {FONT}>\n<title>{title}</title>\n<rect width="{width}" height="{height}" rx="6" fill="#fff"/>\n'
        f"{body}\n</svg>\n"
    )


def text(
    x: float, y: float, said: str, size: int = 14, color: str = INK, anchor: str = "middle", more: str = ""
) -> str:
    return f'<text x="{x:g}" y="{y:g}" font-size="{size}" fill="{color}" text-anchor="{anchor}" {more}>{said}</text>'


def rect(x: float, y: float, w: float, h: float, fill: str, more: str = "") -> str:
    return f'<rect x="{x:g}" y="{y:g}" width="{w:g}" height="{h:g}" fill="{fill}" {more}/>'


def weights(n: int) -> torch.Tensor:
    """Causal attention weights [n, n] of a made-up head: a strong first key, neighbours, and a few distant keys."""
    i = torch.arange(n)
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(n, n, generator=generator) * 1.3 - 0.35 * (i[:, None] - i).abs() ** 0.8
    logits[:, 0] += 3.0
    logits += 3.0 * (torch.rand(n, n, generator=generator) < 0.04)
    return torch.softmax(logits.masked_fill(i > i[:, None], float("-inf")), -1)


def systematic(row: torch.Tensor, c: float, start: float) -> torch.Tensor:
    """Which keys of one row [n] are kept, by points at distance 1 on c times the cumulative weights."""
    ends = (c * row.double()).cumsum(0)
    begins = ends - c * row.double()
    return (ends - start).ceil() > (begins - start).ceil()


def kept_entries(n: int = 40, c: float = 5.0) -> str:
    w, cell = weights(n), 8
    generator = torch.Generator().manual_seed(1)
    starts = torch.rand(n, generator=generator).tolist()
    kept = torch.stack([systematic(w[i], c, starts[i]) for i in range(n)])
    visible = n * (n + 1) // 2
    parts, side = [], n * cell
    for left, sparse in ((30, False), (30 + side + 60, True)):
        count = int(kept.sum()) if sparse else visible
        title = f"SUS backward, c = {c:g}: {count} entries" if sparse else f"dense backward: {count} entries"
        parts.append(text(left + side / 2, 32, title, 15))
        shades: dict[tuple[str, float], list[str]] = {}  # one path for all cells of a shade: a small file
        for i in range(n):
            for j in range(i + 1):
                weight = float(w[i, j]) ** 0.5
                if sparse and not kept[i, j]:
                    shade = ("#eef0f3", 1.0)
                else:
                    shade = (ORANGE, round(0.35 + 0.65 * weight, 1)) if sparse else (BLUE, round(weight, 1) or 0.05)
                shades.setdefault(shade, []).append(f"M{left + j * cell} {48 + i * cell}h7v7h-7z")
        for (color, opacity), cells in shades.items():
            parts.append(f'<path fill="{color}" fill-opacity="{opacity:g}" d="{"".join(cells)}"/>')
        parts.append(text(left + side / 2, 48 + side + 22, "keys", 13, GREY))
        x, y = left - 10, 48 + side / 2
        parts.append(text(x, y, "queries", 13, GREY, more=f'transform="rotate(-90 {x:g} {y:g})"'))
    width = 2 * side + 120
    caption = "Darker is a larger weight. Large weights are always kept, small ones rarely, and then count for more."
    parts.append(text(width / 2, 48 + side + 50, caption, 13))
    return svg(width, side + 112, "Entries of attention that a dense and a SUS backward use", parts)


def systematic_line() -> str:
    row = torch.tensor([0.30, 0.05, 0.03, 0.16, 0.04, 0.02, 0.22, 0.06, 0.03, 0.09])
    c, start, left, span, y = 6.0, 0.45, 40, 720, 62
    kept, x, parts = systematic(row, c, start), float(left), []
    parts.append(text(left, 34, "the weights W of one row, side by side", 14, INK, "start"))
    for j, weight in enumerate(row.tolist()):
        color = ORANGE if kept[j] else "#d8dce3"
        parts.append(rect(x, y, weight * span - 1.5, 34, color))
        if weight > 0.025:
            fill = "#fff" if kept[j] else INK
            parts.append(text(x + weight * span / 2, y + 22, f"key {j}" if weight > 0.08 else f"{j}", 12, fill))
        x += weight * span
    point = start
    while point < c:
        x = left + point / c * span
        parts.append(f'<path d="M{x:g} {y + 38} l-6 13 h12 z" fill="{INK}"/>')
        point += 1
    first, second = left + start / c * span, left + (start + 1) / c * span
    parts.append(f'<path d="M{first:g} {y + 62} H{second:g}" stroke="{GREY}" stroke-width="1.5"/>')
    parts.append(text((first + second) / 2, y + 80, "1 / c", 13, GREY))
    said = "points from a random start: a key is kept (orange) if its interval contains one"
    parts.append(text(left + span, y + 80, said, 13, INK, "end"))
    return svg(2 * left + span, 166, "Systematic sampling of one row", parts)


def pipeline() -> str:
    steps = [
        ("model", "your code", "unchanged"),
        ("Dynamo graph", "torch.compile", "records it"),
        ("find", "softmax between", "two products"),
        ("canonicalise", "scale, bias, masks", "told apart, proven"),
        ("rewrite", "one operator", "in its place"),
        ("operator", "same forward,", "sparse backward"),
        ("kernel", "C++, Triton or", "PyTorch"),
    ]
    width, gap, step, top, parts = 150, 26, 118, 16, []
    for i, (name, *lines) in enumerate(steps):
        row, column = (0, i) if i < 4 else (1, i - 4)
        x, y = 16 + column * (width + gap), top + row * step
        ours = i >= 2
        fill, ink = (BLUE, "#fff") if ours else ("#e8eaf0", INK)
        parts.append(rect(x, y, width, 86, fill, 'rx="6"'))
        parts.append(text(x + width / 2, y + 27, name, 16, ink, more='font-weight="600"'))
        parts += [text(x + width / 2, y + 50 + 20 * k, line, 14, ink) for k, line in enumerate(lines)]
        if column:
            parts.append(f'<path d="M{x - gap + 5:g} {y + 43} h12 m-6 -6 l7 6 l-7 6" stroke="{INK}" fill="none"/>')
    total = 32 + 4 * width + 3 * gap
    turn, middle = total - 16 - width / 2, top + (86 + step) / 2
    parts.append(
        f'<path d="M{turn:g} {top + 86} V{middle:g} H{16 + width / 2:g} V{top + step - 3} m-6 -7 l6 7 l6 -7" '
        f'stroke="{INK}" fill="none"/>'
    )
    y = top + step + 86 + 30
    left_note = "Lightning callback, torch.compile, Hugging Face Trainer: through the graph."
    right_note = "Eager code and attn_implementation=&quot;sus&quot;: straight to the operator."
    parts.append(text(16, y, left_note, 14, INK, "start"))
    parts.append(text(16, y + 22, right_note, 14, INK, "start"))
    return svg(total, y + 38, "From a model to the kernel", parts)


if __name__ == "__main__":
    for name, made in (("kept-entries", kept_entries()), ("systematic", systematic_line()), ("pipeline", pipeline())):
        (IMG / f"{name}.svg").write_text(made)
        print(IMG / f"{name}.svg", f"{len(made) / 1024:.0f} KiB")

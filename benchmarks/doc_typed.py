"""Which measured numbers in README.md and docs/ were typed, instead of written by benchmarks/doc_numbers.py.

A number with a unit (`1.7x`, `12%`, `34 ms`, `120 MiB`) or with decimals counts as measured, wherever it stands outside
of markers, code, formulas and addresses. What is none is allowed: versions by their names, the rest by the words around
it, each with its reason. Bare integers are not looked at: most of them are shapes and parameters.
"""

from __future__ import annotations

import re

UNITS = r"x|%|[nuµm]?s|seconds?|minutes?|hours?|[KMGT]i?B(?:/s)?|[GT]FLOP/s|passed|skipped"
MEASURED = re.compile(
    rf"(?<![\w.,^-])\d[\d,]*(?:\.\d+)?\s?(?:{UNITS})(?!\w)"  # 1.7x, 12%, 34 ms
    r"|(?<![\w.,^-])\d[\d,]*\.\d+(?![\w.])"  # 0.95
)
LEFT_OUT = re.compile(
    r"<!-- (number|table): .+?<!-- /\1 -->"
    r"|```.*?```|`(?:[^`\n]|\n(?!\n))+`|^    (?:python|pytest|\w+ = |def |return ).*?$"  # code
    r"|\\\[.*?\\\]|\\\(.*?\\\)"  # formulas
    r"|\]\([^)\s]*\)|https?://\S+|\barXiv \d+\.\d+"  # addresses
    r"|\b(?:Python|torch|Triton|[Ll]ightning|cuDNN|transformers|accelerate|rich|WandB|mlflow-skinny) \d+\.[\d.]+",
    re.DOTALL | re.MULTILINE,
)
DEFAULT, LIMIT, EXAMPLE = "a default or a parameter", "a limit that the code or the test sets", "says what a unit means"
COMPUTED, VERSION = "computed", "a version"
ALLOWED: dict[str, dict[str, list[str]]] = {  # file: {reason: words}
    "auto-c.md": {"a range that the script draws from": ["0.1% to 20%"]},
    "choosing-c.md": {LIMIT: ["for a gain of 1%", "more than 3% of training time", "95% confidence interval"]},
    "cpu-kernel.md": {
        COMPUTED: ["1.7 MB at most", "1 KiB read and 0.5 KiB written", "cost 1 KiB of memory", "has 128 MiB"],
        LIMIT: ["It is 1 MiB", "take 16 MiB", "beyond 32 MiB", "(to 90%)", "of 2 MiB and more", "up to 512 MiB"],
        DEFAULT: ["with p = 0.1"],
    },
    "cuda-kernels.md": {
        COMPUTED: ["a speed-up of 1.5 / 2.4 / 3.2", "4.2 million keys", "floor(1.005 c", "the 0.5% are", "by 0.4%"],
        LIMIT: ["64 x 64 tile", "1.005 c rounded up"],
        VERSION: ["or 3.6)", "(3.9 can)"],
    },
    "faq.md": {LIMIT: ["Far above 0.01"]},
    "found.md": {
        LIMIT: ["within 0.005 of each"],
        "a part of the page that benchmarks/found.py does not write": [
            "| transformers vit_mae | 1.3 | 1.4 | 1.5 |",
            "| transformers levit | 0.067 | 0.19 | 0.26 |",
            "| transformers lasr_encoder | 0.014 | 0.012 | 0.013 |",
            "within 0.004 of float64",
        ]
    },
    "gpu-session.md": {
        COMPUTED: ["were 1.5 / 2.4 / 3.2"],
        LIMIT: ["30 minutes and a limit of 10 minutes", "at most 1.5 times", "0.2 there", "60 ms of calls",
                "above 0.05", "a factor of 1.5", "more than 2% of its norm"],
    },
    "lightning.md": {
        DEFAULT: ["over 3% of the time", "| 0.01 | relative variance", "| 0.5 | weight of the last"],
        VERSION: ["| 15.0 | all tests", "| 13.9 |", "| 3.10.13 | 2.13.0", "| 3.13.0 | 2.13.0",
                  "others as with 3.10,", "| 3.12 | 2.11.0"],
    },
    "metrics.md": {
        EXAMPLE: ["0.01 is an increase by 1%"],
        DEFAULT: ["scatter by 10%", "p = 1.5,", "target 1%"],
        LIMIT: ["95% confidence interval", "a bias of 3%", "a factor of 1.5"],
    },
    "noise.md": {
        EXAMPLE: ["1% means that at worst about 1% more"],
        "the paper's": ["paper reports 1% at c"],
    },
    "quickstart.md": {EXAMPLE: ["0.01 is 1% more"]},
    "tests.md": {LIMIT: ["more than about 10 s each"]},
    "contributing.md": {LIMIT: ["more than about 10 s"]},
    "training.md": {COMPUTED: ["1.7 million parameters"], "the picture's axis": ["panels span 0.04 nats"]},
}  # fmt: skip


def allowed(name: str) -> list[str]:
    return [words for group in ALLOWED.get(name, {}).values() for words in group]


def typed(name: str, text: str) -> list[str]:
    """The typed numbers of a file, each with the words around it."""
    for words in allowed(name):
        text = text.replace(words, " ")
    text = LEFT_OUT.sub(" ", text)
    return [text[max(0, m.start() - 40) : m.end() + 20].replace("\n", " ") for m in MEASURED.finditer(text)]

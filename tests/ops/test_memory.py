"""The PyTorch path is linear in memory: 32768 keys, one head, under 1 GB above the inputs (issue's number)."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

SCRIPT = """
import resource, torch
from fx_passes import sus_attention
torch.set_num_threads(2)
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
def run(n):
    q, k, v = (torch.randn(1, 1, n, 64, requires_grad=True) for _ in range(3))
    base = peak()
    sus_attention(q, k, v, sampler="{sampler}", is_causal={causal}, c={c}, forward="library").sum().backward()
    return peak() - base
run(512)
print(run(32768))
"""


@pytest.mark.parametrize(
    ("sampler", "causal", "c"),
    [
        ("systematic", True, 30),
        pytest.param("systematic", False, 30, marks=pytest.mark.slow),
        pytest.param("independent", True, 30, marks=pytest.mark.slow),
    ],
)
def test_peak_memory(sampler: str, causal: bool, c: float) -> None:
    script = SCRIPT.format(sampler=sampler, causal=causal, c=c)
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert float(done.stdout) < 1.0

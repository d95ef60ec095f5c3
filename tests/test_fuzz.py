"""Thousands of random calls, and 10,000 steps of varying shapes: see docs/reliability.md for the counts."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from fx_passes import sus_attention, sus_backward

ROOT = Path(__file__).parent.parent


def fuzz(*arguments: str, timeout: int) -> None:
    command = [sys.executable, "-m", "tests.fuzz_calls", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout)
    print(done.stdout)
    assert done.returncode == 0, f"exit code {done.returncode}: {done.stderr[-4000:]}"


def test_some_calls() -> None:
    fuzz("0", "60", timeout=120)


@pytest.mark.slow
@pytest.mark.parametrize("start", [1, 2, 3, 4])
def test_calls(start: int) -> None:
    fuzz(str(start), "1000", timeout=580)


@pytest.mark.slow
def test_arguments() -> None:
    fuzz("arguments", "1", "3000", timeout=300)


@pytest.mark.slow
def test_memory_stays_flat_over_10000_steps_of_varying_shapes() -> None:
    """New shapes, a new block for every fifth step, nested forks of the generator: nothing may add up."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    one = sus_backward(c=3)

    def size(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    def peak() -> int:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    after_warm_up = 0
    for step in range(10_000):
        q, k = (torch.randn(1, 2, size(1, 130), 16, requires_grad=True) for _ in range(2))
        if step % 3 == 0:
            sus_attention(q, k, k, c=2).sum().backward()
        else:
            with one if step % 5 else sus_backward(c=2), torch.random.fork_rng(enabled=step % 7 == 0):
                if step % 14 == 0:
                    torch.manual_seed(step)
                F.scaled_dot_product_attention(q, k, k, dropout_p=0.1 * (step % 2)).sum().backward()
        if step == 1500:
            after_warm_up = peak()
    assert q.grad is not None
    assert q.grad.isfinite().all()
    assert peak() - after_warm_up < 32 * 1024  # KiB

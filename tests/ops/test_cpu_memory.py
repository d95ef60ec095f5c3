"""What native calls leave in memory for later ones; tests/ops/native/driver.cpp checks how much that may be."""

from __future__ import annotations

import threading

import pytest
import torch

from fx_passes import sus_attention
from fx_passes.ops import cpu
from fx_passes.ops.cpu import bind

pytestmark = pytest.mark.skipif(bind.library() is None, reason="no native kernel on this machine")

MIB = 1 << 20


def step(n: int = 4096, heads: int = 4) -> list[torch.Tensor]:
    """Gradients of a call whose buffers are of megabytes."""
    g = torch.Generator().manual_seed(0)
    inputs = [torch.randn(1, heads, n, 64, generator=g).requires_grad_() for _ in range(3)]
    out = sus_attention(*inputs, is_causal=True, c=8.0, seed=1)  # type: ignore[misc]
    return list(torch.autograd.grad(out.sum(), inputs))


def test_a_call_leaves_memory_and_the_next_takes_it() -> None:
    cpu.release_memory()
    first = step()
    left = cpu.release_memory()
    assert 2 * MIB <= left <= 512 * MIB
    for _ in range(5):  # dirty memory gives the same bits, and no more of it
        assert all(map(torch.equal, step(), first))
    assert cpu.release_memory() == left
    assert cpu.release_memory() == 0


def test_calls_of_several_threads() -> None:
    expected, wrong = step(), []

    def work() -> None:
        for _ in range(4):
            if not all(map(torch.equal, step(), expected)):
                wrong.append(1)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong

"""`sus_backward` around flex_attention, flash-attn, xformers and varlen_attn."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import and_masks, create_block_mask, flex_attention

from fx_passes import (
    SUSBackend,
    eager_calls,
    sus_backward,
)
from tests.passes.find import attention_packages as packages
from tests.passes.find.test_calls import (
    BNHD,
    CALLS,
    DOCS,
    ENDS,
    VARLEN,
    B,
    D,
    H,
    N,
    called,
    causal,
    eager_flex,
    softcap,
)
from tests.passes.harness import run, tensors
from tests.torch_versions import varlen_attn, varlen_options


@pytest.fixture(autouse=True, scope="module")
def _packages() -> Iterator[None]:
    with packages.installed():
        yield


def check(f: Callable[..., Any], plain: Callable[..., Any], *args: Tensor, calls: int = 1) -> None:
    """Exact at c = inf, and at c = 2 the same forward and other gradients."""
    outs, grads = run(plain, args)
    for c, exact in ((float("inf"), True), (2, False)):
        with sus_backward(c=c) as sus:
            got, got_grads = run(f, args)
        assert sus.calls == calls, sus.left
        for a, b in zip(got, outs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
        close = [torch.allclose(a, b, rtol=1e-9, atol=1e-9) for a, b in zip(got_grads, grads, strict=True)]
        assert all(close) == exact


@pytest.mark.parametrize("name", CALLS)
def test_calls_of_packages(name: str) -> None:
    module, function, shapes, options, _ = CALLS[name]
    f = called(module, function, options)
    check(f, f, *tensors(*shapes))


@pytest.mark.parametrize("name", VARLEN)
def test_varlen(name: str) -> None:
    options, ends, groups, _ = VARLEN[name]
    window, named = options.get("window_size", (-1, -1)), varlen_options(options)
    check(
        lambda q, k, v: varlen_attn(q, k, v, ENDS, ends, 19, 19, **named),
        lambda q, k, v: packages.packed(q, k, v, ENDS, ends, options.get("scale"), False, window),
        *tensors((N, H, D), (N, groups, D), (N, groups, D)),
    )


def test_flex() -> None:
    torch._dynamo.reset()
    block = create_block_mask(and_masks(causal, lambda b, h, i, j: DOCS[i] == DOCS[j]), None, None, N, N, device="cpu")
    plain, f = (lambda q, k, v, flex=flex: flex(q, k, v, softcap, block) for flex in (eager_flex, flex_attention))
    check(f, plain, *tensors((B, H, N, D), (B, H, N, D), (B, H, N, D)))


def test_a_call_that_is_left_runs_its_own_function() -> None:
    f = called("flash_attn", "flash_attn_func", {"return_attn_probs": True})
    args = tuple(x.requires_grad_() for x in tensors(*BNHD))
    with sus_backward(c=2) as sus:
        out = f(*args)
    torch.testing.assert_close(out, f(*args), rtol=0, atol=0)
    assert (sus.calls, sus.left) == (0, {"its argument return_attn_probs is not understood": 1})


def test_the_report_has_the_form_of_each_call() -> None:
    flash, varlen = (getattr(sys.modules["flash_attn"], f"flash_attn_{x}func") for x in ("", "varlen_"))
    xformers = sys.modules["xformers.ops"].memory_efficient_attention
    args = tuple(x.requires_grad_() for x in tensors(*BNHD))
    turned = [x.transpose(1, 2) for x in args]
    ends = torch.tensor([0, N, 2 * N], dtype=torch.int32)
    with sus_backward(c=2) as sus:
        flash(*args), partial(flash, causal=True)(*args)
        varlen(*(x.flatten(0, 1) for x in args), ends, ends, N, N)
        varlen_attn(*(x.flatten(0, 1) for x in args), ends, ends, N, N)
        xformers(*args), xformers(*args, packages.PagedBlockDiagonalPaddedKeysMask(ENDS[None]))
        flex_attention(*turned), torch.nn.functional.scaled_dot_product_attention(*turned)
        flash(*args, return_attn_probs=True)
        torch.func.grad(lambda q: flash(q, *args[1:]).sum())(args[0].detach())
    found = [(site.form, site.source, site.status, site.reason) for site in sus.report.sites]
    paged = "its bias PagedBlockDiagonalPaddedKeysMask is not understood"
    assert found == [
        ("flash", "2 calls", "rewritten", ""),
        ("flash varlen", "1 calls", "rewritten", ""),
        ("varlen", "1 calls", "rewritten", ""),
        ("xformers", "1 calls", "rewritten", ""),
        ("flex", "1 calls", "rewritten", ""),
        ("sdpa", "1 calls", "rewritten", ""),
        ("xformers", "1 calls", "left", paged),
        ("flash", "1 calls", "left", "its argument return_attn_probs is not understood"),
        ("flash", "1 calls", "left", "inside a transform of torch.func"),
    ]
    assert sus.calls == sum(int(source.split()[0]) for _, source, status, _ in found if status == "rewritten")


def test_without_gradient_nothing_changes() -> None:
    f = called("flash_attn", "flash_attn_func", {})
    with sus_backward(c=2) as sus:
        f(*tensors(*BNHD))
        with torch.no_grad():
            f(*(x.requires_grad_() for x in tensors(*BNHD)))
    assert (sus.calls, sus.left) == (0, {})


def test_functions_are_as_before_when_the_last_thread_has_left() -> None:
    functions = [sys.modules["flash_attn"].flash_attn_func, flex_attention]
    codes = [f.__code__ for f in functions]
    args = tuple(x.requires_grad_() for x in tensors(*BNHD))
    plain = functions[0](*args)
    gate, failed = threading.Barrier(8), []

    def work(inside: bool) -> None:
        gate.wait()
        for _ in range(20):
            if inside:
                with sus_backward(c=2) as sus:
                    functions[0](*args)
                ok = sus.calls == 1
            else:  # nobody else's block acts here
                ok = torch.equal(functions[0](*args), plain) and "Attention" not in str(functions[0](*args).grad_fn)
            failed.extend([] if ok else [inside])

    threads = [threading.Thread(target=work, args=(i % 2 == 0,)) for i in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not failed
    assert [f.__code__ for f in functions] == codes


def test_an_error_in_a_block_leaves_functions_as_before() -> None:
    code = flex_attention.__code__
    with pytest.raises(RuntimeError), sus_backward():
        torch.zeros(2) @ torch.zeros(3)
    assert flex_attention.__code__ is code


def test_a_graph_around_a_block_is_whole() -> None:
    """As it is without the block; where a backend rewrites attention, that does."""
    (x,) = tensors((1, 2, 128, 16))
    x.requires_grad_()
    for backend, changed in (("eager", False), (SUSBackend(c=2, compiler="eager"), True)):
        torch._dynamo.reset()
        compiled = torch.compile(lambda q: flex_attention(q, q, q), backend=backend, fullgraph=True)
        with sus_backward(c=2) as sus, torch.set_grad_enabled(changed):
            outs = [compiled(x if changed else x.detach()) for _ in range(2)]
        torch.testing.assert_close(outs[0], eager_flex(x, x, x), rtol=1e-9, atol=1e-9)
        assert (sus.calls, sus.left) == (0, {})
        if changed:
            grads = [torch.autograd.grad(out.sin().sum(), x)[0] for out in outs]
            assert not torch.equal(*grads)


def test_what_the_function_refuses_and_what_it_takes() -> None:
    f = sys.modules["flash_attn"].flash_attn_func
    args = tuple(x.requires_grad_() for x in tensors(*BNHD))
    with sus_backward(c=2) as sus:
        for wrong in ({"nothing": 1}, {"q": args[0]}):
            with pytest.raises(TypeError, match=r"got (an unexpected|multiple)"):
                f(*args, **wrong)
        f(*(x[:, :0] for x in args))
        torch.func.grad(lambda q: f(q, *args[1:]).sum())(args[0].detach())
        with torch.autograd.forward_ad.dual_level():
            f(torch.autograd.forward_ad.make_dual(args[0], args[0].detach()), *args[1:])
    assert sus.calls == 0
    reasons = {"empty tensors": 1, "inside a transform of torch.func": 1}
    assert sus.left == {**reasons, "inside forward-mode AD or nested gradients": 1}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_fork_while_another_thread_enters_a_block_does_not_hang_the_child() -> None:
    with eager_calls._lock:
        pid = os.fork()
        if pid == 0:
            with sus_backward(c=2):
                pass
            os._exit(0)
    end = time.monotonic() + 10
    while time.monotonic() < end:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            assert status == 0
            return
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    pytest.fail("the child hangs")


WRONG_ENDS = {
    "descending": torch.tensor([0, 15, 7, N], dtype=torch.int32),
    "beyond the end": torch.tensor([0, 7, N + 5], dtype=torch.int32),
    "below 0": torch.tensor([0, -3, N], dtype=torch.int32),
    "not from 0": torch.tensor([3, 7, N], dtype=torch.int32),
    "no document": torch.zeros(1, dtype=torch.int32),
    "two dimensions": torch.tensor([[0, 7, N]], dtype=torch.int32),
    "float": torch.tensor([0.0, 7.0, N]),
    "int64": torch.tensor([0, 7, N]),
}


@pytest.mark.parametrize("case", WRONG_ENDS)
@pytest.mark.parametrize("which", ["q", "k"])
def test_wrong_ends_of_documents_are_named(case: str, which: str) -> None:
    x = torch.randn(N, H, D, requires_grad=True)
    right = torch.tensor([0, 7, N], dtype=torch.int32)
    ends = (WRONG_ENDS[case], right) if which == "q" else (right, WRONG_ENDS[case])
    flash = sys.modules["flash_attn"].flash_attn_varlen_func
    for f, name in ((flash, f"cu_seqlens_{which}"), (varlen_attn, f"cu_seq_{which}")):
        with sus_backward(c=2) as sus, pytest.raises(ValueError, match=f"^{name} must"):
            f(x, x, x, *ends, N, N)
        assert (sus.calls, sus.state.counter) == (0, 0)


@pytest.mark.parametrize("case", ["descending", "beyond the end", "not from 0", "float"])
def test_wrong_ends_of_documents_in_a_compiled_graph(case: str) -> None:
    torch._dynamo.reset()
    x = torch.randn(N, H, D, requires_grad=True)
    flash = sys.modules["flash_attn"].flash_attn_varlen_func
    compiled = torch.compile(
        lambda x, ends: flash(x, x, x, ends, ends, N, N), backend=SUSBackend(c=2, compiler="eager")
    )
    with pytest.raises(Exception, match="cu_seqlens_q must"):
        compiled(x, WRONG_ENDS[case])
    compiled(x, torch.tensor([0, 7, N], dtype=torch.int32)).sum().backward()


def test_places_after_the_last_document_are_nobodys() -> None:
    x = torch.randn(N, H, D, requires_grad=True)
    ends = torch.tensor([0, 7, N - 5], dtype=torch.int32)
    with sus_backward(c=2):
        out = sys.modules["flash_attn"].flash_attn_varlen_func(x, x, x, ends, ends, N, N)[: N - 5]
    expected = packages.packed(x[: N - 5], x[: N - 5], x[: N - 5], ends, ends, None, False, (-1, -1))
    torch.testing.assert_close(out, expected)

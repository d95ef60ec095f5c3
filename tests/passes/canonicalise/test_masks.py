"""Masks with a finite value: rows that lose every key have equal weights, and the operator still gets no M x N bias."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.passes.harness import compare, tensors

B, H, M, N, D = 2, 4, 14, 14, 6
MIN = torch.finfo(torch.float32).min
Function = Callable[[Tensor, Tensor, Tensor], Tensor]
FORMS: dict[str, tuple[Function, int, str]] = {}


def form(tier: int, mask: str) -> Callable[[Function], Function]:
    """Registers f(q, k, v) on [B, H, N, D] with what the report must say."""

    def add(f: Function) -> Function:
        FORMS[f.__name__] = (f, tier, mask)
        return f

    return add


def band(last: int = 0) -> Tensor:
    return torch.ones(M, N, dtype=torch.bool).tril(last)


def padding(k: Tensor, hidden: int = 5) -> Tensor:
    """[B, 1, 1, N]: the first keys of the first entry are hidden. Made from an input, so that no constant tells."""
    keep = torch.ones(B, N, dtype=torch.bool)
    keep[0, :hidden] = False
    return (keep & (k.sum((1, 3)) > -1e9))[:, None, None]


def scores(q: Tensor, k: Tensor) -> Tensor:
    return q @ k.mT * 0.4


def added(s: Tensor, keep: Tensor, fill: float = MIN) -> Tensor:
    return s + torch.where(keep, 0.0, fill)


@form(1, "causal + mask")
def as_hugging_face_adds_it(q, k, v):
    return added(scores(q, k), band() & padding(k)).softmax(-1) @ v


@form(1, "causal + mask")
def filled(q, k, v):
    return scores(q, k).masked_fill(~(band() & padding(k)), -1e9).softmax(-1) @ v


@form(1, "causal, window 4 + mask")
def window(q, k, v):
    return added(scores(q, k), band() & padding(k) & ~band(-4)).softmax(-1) @ v


@form(1, "causal, chunk 7 + mask")
def chunk(q, k, v):
    i = torch.arange(N)
    return added(scores(q, k), (i[:, None] // 7 == i // 7) & padding(k) & band()).softmax(-1) @ v


@form(1, "causal, prefix 3 + mask")
def prefix(q, k, v):
    return added(scores(q, k), (band() | (torch.arange(N) < 3)) & padding(k)).softmax(-1) @ v


@form(1, "up to -1 ahead")
def the_first_query_sees_nothing(q, k, v):
    return scores(q, k).masked_fill(~band(-1), -1e9).softmax(-1) @ v


@form(1, "causal + mask")
def an_entry_sees_nothing(q, k, v):
    return added(scores(q, k), band() & padding(k, N)).softmax(-1) @ v


@form(1, "causal + mask")
def shared_key_heads(q, k, v):
    s = torch.einsum("bghid,bgjd->bghij", q.reshape(B, 2, 2, M, D), k[:, :2]).view(B, H, M, N)
    p = added(s, band() & padding(k)).softmax(-1).view(B, 2, 2, M, N)
    return torch.einsum("bghij,bgjd->bghid", p, v[:, :2]).reshape(q.shape)


@form(1, "causal + mask + bias")
def constant_bias(q, k, v):
    alibi = torch.arange(N) * torch.linspace(0.1, 1, H)[:, None, None]
    return added(scores(q, k) + alibi, band() & padding(k)).softmax(-1) @ v


@form(1, "bias")
def bias_with_a_gradient(q, k, v):
    return added(scores(q, k) + k.mean((0, 1, 3)), band() & padding(k)).softmax(-1) @ v


@form(1, "mask + bias")
def bias_below_the_mask(q, k, v):
    return (scores(q, k) + k.mean((0, 1, 3)) * 2).masked_fill(~padding(k, N), -1e9).softmax(-1) @ v


@form(2, "none")
def bias_on_the_mask(q, k, v):
    return (scores(q, k).masked_fill(~padding(k, N), -1e9) + k.mean((0, 1, 3)) * 2).softmax(-1) @ v


@form(1, "causal + mask")
def softcap_below_the_mask(q, k, v):
    return (torch.tanh(q @ k.mT / 3) * 3).masked_fill(~(band() & padding(k)), MIN).softmax(-1) @ v


@form(1, "bias")
def softcap_with_a_mask_added(q, k, v):
    return added(torch.tanh(q @ k.mT / 3) * 3, band() & padding(k)).softmax(-1) @ v


@form(2, "none")
def two_masks(q, k, v):
    return added(scores(q, k).masked_fill(~band(), MIN), padding(k)).softmax(-1) @ v


@form(1, "causal + bias")
def two_masks_of_which_one_hides_all(q, k, v):
    return added(scores(q, k).masked_fill(~band(), MIN), band() & padding(k)).softmax(-1) @ v


@form(1, "causal + mask")
def sink(q, k, v):
    s = q.mean((0, 2, 3)).view(1, H, 1, 1).expand(B, H, M, 1)
    s = torch.cat([scores(q, k).masked_fill(~(band() & padding(k)), -1e9), s], -1)
    return s.softmax(-1)[..., :-1] @ v


@form(1, "mask")
def a_sink_no_higher_than_the_mask(q, k, v):
    s = scores(q, k).masked_fill(~(band() & padding(k)), -1e9)
    return torch.nn.functional.pad(s, (0, 1), value=-1e9).softmax(-1)[..., :-1] @ v


@form(2, "none")
def one_beside_the_sum_behind_the_maximum(q, k, v):
    s = scores(q, k).masked_fill(~(band() & padding(k)), -1e9)
    e = (s - s.amax(-1, keepdim=True)).exp()
    return e / (1 + e.sum(-1, keepdim=True)) @ v


@form(1, "causal + mask")
def any_mask_of_rows_too(q, k, v):
    seen = (k.sum(1) @ k.sum(1).mT > 0.5)[:, None] & padding(k).mT
    return scores(q, k).masked_fill(~(seen & band()), -1e9).softmax(-1) @ v


@form(1, "mask")
def dropout(q, k, v):
    # So small a probability drops nothing, and the pass cannot know.
    p = scores(q, k).masked_fill(~(band() & padding(k)), -1e9).softmax(-1)
    return torch.nn.functional.dropout(p, 1e-9) @ v


@form(1, "causal")
def added_before_a_factor(q, k, v):
    return ((q @ k.mT * 0.04 + torch.triu(torch.full((M, N), -2000.0), 1)) * 10).softmax(-1) @ v


@form(1, "bias")
def added_before_a_factor_in_some_heads(q, k, v):
    some = (torch.arange(H) > 0)[:, None, None]
    return ((q @ k.mT * 0.04 + torch.triu(torch.full((M, N), -2000.0), 1) * some) * 10).softmax(-1) @ v


@pytest.mark.parametrize("name", FORMS)
def test_exact_and_as_few_tensors_as_can_be(name: str) -> None:
    f, tier, mask = FORMS[name]
    report = compare(f, *tensors(*[(B, H, N, D)] * 3))
    assert [(s.status, s.tier, s.mask) for s in report.sites] == [("rewritten", tier, mask)]


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_lost_rows_behind_a_compiler(compiler: str) -> None:
    args = tensors(*[(B, H, N, D)] * 3, dtype=torch.float32)
    assert compare(as_hugging_face_adds_it, *args, compiler=compiler, tol=2e-5).rewritten == 1


@pytest.mark.parametrize(("factor", "tier"), [(1e-3, 2), (1e-4, 2), (8**-0.5, 1)])
def test_a_finite_mask_that_a_factor_makes_small_is_none(factor: float, tier: int) -> None:
    hidden = torch.ones(10, 10, dtype=torch.bool).triu(1)

    def f(q, k, v):
        return ((q @ k.mT).masked_fill(hidden, -1e4) * factor).softmax(-1) @ v

    report = compare(f, *tensors((2, 3, 10, 5), (2, 3, 10, 5), (2, 3, 10, 5)))
    assert [site.tier for site in report.sites] == [tier]

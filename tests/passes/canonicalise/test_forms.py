"""The project's own zoo: spellings of attention that must be rewritten, exact at c = inf and active at c = 2."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from fx_passes import Site, SUSBackend
from tests.passes.harness import compare, run, tensors

B, H, M, N, D = 2, 4, 14, 14, 6
INF = float("inf")
FORMS: dict[str, tuple[Callable[..., Any], int, str | None]] = {}


def form(sites: int = 1, mask: str | None = None) -> Callable[..., Any]:
    """Registers f(q, k, v) on [B, H, N, D] with the number of its softmaxes and the kind of its mask."""

    def add(f: Callable[..., Any]) -> Callable[..., Any]:
        FORMS[f.__name__] = (f, sites, mask)
        return f

    return add


def band(n: int = N) -> torch.Tensor:
    return torch.ones(n, n, dtype=torch.bool).tril()


@form(mask="none")
def plain(q, k, v):
    return torch.softmax(q @ k.mT / 2, -1) @ v


@form()
def scale_on_both(q, k, v):
    return ((q / 1.5) @ (k * 0.7).mT).softmax(-1).matmul(v)


@form()
def scale_by_tensor_on_scores(q, k, v):
    temperature = 1 + q.mean((-1, -2), keepdim=True) ** 2
    return (q @ k.mT * temperature).softmax(-1) @ v


@form()
def key_wise_factor(q, k, v):
    return ((q @ k.mT) * (1 + k.sum(-1)[:, :, None, :] ** 2)).softmax(-1) @ v


@form(mask="causal")
def causal_masked_fill(q, k, v):
    return (q @ k.mT).masked_fill(~band(), -INF).softmax(-1) @ v


@form(mask="causal")
def causal_where_finite(q, k, v):
    return torch.where(band(), q @ k.mT, torch.finfo(q.dtype).min).softmax(-1) @ v


@form(mask="causal")
def causal_added(q, k, v):
    return (q @ k.mT + torch.full((N, N), -INF, dtype=q.dtype).triu(1)).softmax(-1) @ v


@form(mask="causal")
def causal_subtracted(q, k, v):
    return (q @ k.mT - 1e30 * (~band()).to(q.dtype)).softmax(-1) @ v


@form(mask="mask")
def scattered_mask_subtracted_and_scaled(q, k, v):
    hidden = ((torch.arange(M)[:, None] * 7 + torch.arange(N) * 5) % 3 == 0).to(q.dtype)
    return ((q @ k.mT - 1e3 * hidden) * 100).softmax(-1) @ v


@form(mask="causal")
def causal_arange(q, k, v):
    i = torch.arange(N)
    return (q @ k.mT + (i[None, :] > i[:, None]) * -1e9).softmax(-1) @ v


@form(mask="causal, window 4")
def window(q, k, v):
    i = torch.arange(N)
    seen = (i[None] <= i[:, None]) & (i[:, None] - i[None] < 4)
    return (q @ k.mT).masked_fill(seen.logical_not(), -INF).softmax(-1) @ v


@form(mask="causal, prefix 5")
def prefix(q, k, v):
    i = torch.arange(N)
    return (q @ k.mT).masked_fill(~((i[None] <= i[:, None]) | (i[None] < 5)), -INF).softmax(-1) @ v


@form(mask="chunk 7")
def chunk(q, k, v):
    i = torch.arange(N) // 7
    return (q @ k.mT).masked_fill(i[None] != i[:, None], -INF).softmax(-1) @ v


@form(mask="causal, chunk 7")
def causal_chunk(q, k, v):
    i = torch.arange(N)
    seen = (i[None] // 7 == i[:, None] // 7) & (i[None] <= i[:, None])
    return (q @ k.mT).masked_fill(~seen, -INF).softmax(-1) @ v


@form(mask="causal + mask")
def causal_and_padding(q, k, v):
    pad = k.sum((1, 3))[:, None, None, :] > 1
    pad = pad.logical_and(torch.arange(N) > 0)
    return (q @ k.mT).masked_fill(~(band() & ~pad), -INF).softmax(-1) @ v


@form(mask="mask")
def finite_padding(q, k, v):
    pad = k.sum((1, 3)) > 0
    pad = torch.stack([pad[0], torch.ones_like(pad[1])])  # the second entry sees nothing: equal weights
    return (q @ k.mT).masked_fill(pad[:, None, None, :], -1e9).softmax(-1) @ v


@form(mask="bias")
def bias(q, k, v):
    return (q @ k.mT + q.mean(-1)[:, :, :, None] * torch.arange(N)).softmax(-1) @ v


@form()
def softcap(q, k, v):
    return (torch.tanh(q @ k.mT / 3.0) * 2.0).softmax(-1) @ v


@form()
def sink(q, k, v):
    s = q.mean((0, 2, 3)).view(1, H, 1, 1).expand(B, H, M, 1)
    return torch.cat([q @ k.mT, s], -1).softmax(-1)[..., :-1] @ v


@form()
def sink_in_front(q, k, v):
    return F.pad(q @ k.mT, (1, 0)).softmax(-1)[..., 1:] @ v


@form()
def exp_and_sum(q, k, v):
    s = q @ k.mT
    e = (s - s.max(-1, keepdim=True).values.detach()).exp()
    return (e / e.sum(-1, keepdim=True)) @ v


@form()
def normalised_late(q, k, v):
    e = torch.exp(q @ k.mT / 4)
    return torch.einsum("bhij,bhjd->bhid", e, v) / e.sum(-1).unsqueeze(-1)


@form()
def log_softmax(q, k, v):
    return F.log_softmax(q @ k.mT, -1).exp() @ v


@form()
def minus_logsumexp(q, k, v):
    s = q @ k.mT
    return (s - s.logsumexp(-1, keepdim=True)).exp() @ v


@form()
def keys_first(q, k, v):
    return (v.mT @ (k @ q.mT).softmax(-2)).mT


@form()
def einsum_letters(q, k, v):
    p = torch.einsum("zanu,zamu->mzan", q, k).softmax(0)
    return torch.einsum("mzan,zamw->znaw", p, v)


@form()
def elementwise(q, k, v):
    s = (q[..., :, None, :] * k[..., None, :, :]).sum(-1)
    return (s.softmax(-1)[..., None] * v[..., None, :, :]).sum(-2)


@form()
def folded_heads(q, k, v):
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    return torch.bmm(
        torch.baddbmm(torch.empty(B * H, M, N, dtype=q.dtype), q, k.mT, beta=0, alpha=0.3).softmax(-1), v
    ).unflatten(0, (B, H))


@form()
def multi_query(q, k, v):
    return (q @ k[:, :1].mT).softmax(-1) @ v[:, :1]


@form()
def grouped_repeat(q, k, v):
    k, v = (x[:, :2].repeat_interleave(2, 1) for x in (k, v))
    return (q @ k.mT).softmax(-1) @ v


@form(mask="causal")
def grouped_five(q, k, v):
    q = q.view(B, 2, 2, M, D)
    return ((q @ k[:, :2, None].mT).masked_fill(~band(), -INF).softmax(-1) @ v[:, :2, None]).flatten(1, 2)


@form(sites=4)
def loop_over_heads(q, k, v):
    return torch.stack([(q[:, h] @ k[:, h].mT).softmax(-1) @ v[:, h] for h in range(H)], 1)


@form(sites=2)
def query_chunks(q, k, v):
    return torch.cat([(c @ k.mT).softmax(-1) @ v for c in q.split(7, 2)], 2)


@form(sites=2)
def differential(q, k, v):
    a, b = (q[..., :3] @ k[..., :3].mT).softmax(-1), (q[..., 3:] @ k[..., 3:].mT).softmax(-1)
    return (a - 0.3 * b) @ v


@form()
def head_gate(q, k, v):
    return ((q @ k.mT).softmax(-1) * q.mean((0, 2, 3)).view(1, H, 1, 1)) @ v


@form()
def key_gate(q, k, v):
    return ((q @ k.mT).softmax(-1) * v.sum(-1)[:, :, None]) @ v


@form()
def key_gate_of_grouped_heads(q, k, v):
    k, v = (x[:, :2].repeat_interleave(2, 1) for x in (k, v))
    return ((q @ k.mT).softmax(-1) * torch.sigmoid(q.sum(-1))[:, :, None]) @ v


@form(sites=2)
def sum_normalised_again(q, k, v):
    gate = torch.sigmoid(q.mean((0, 2, 3))).view(1, H, 1, 1)
    p = (1 - gate) * (q @ k.mT).softmax(-1) - 0.3 * (k @ q.mT).softmax(-1)
    return (p / p.sum(-1, keepdim=True)) @ v


@form()
def sum_with_softmax_of_positions_normalised_again(q, k, v):
    gate, i = torch.sigmoid(q.mean((0, 2, 3))).view(1, H, 1, 1), torch.arange(N)
    positions = (-((i[:, None] - i) ** 2) * (1 + gate)).expand(B, -1, -1, -1).softmax(-1)
    p = (1 - gate) * (q @ k.mT).softmax(-1) + 0.5 * gate * positions
    p /= p.sum(-1).unsqueeze(-1)
    return p @ v


@form()
def sink_normalised_away(q, k, v):
    e = (q @ k.mT / 9).exp()
    p = e / (e.sum(-1, keepdim=True) + 1)
    return (p / p.sum(-1, keepdim=True)) @ v


@form()
def mixed_and_normalised_again(q, k, v):
    p = torch.einsum("bhij,hg->bgij", (q @ k.mT).softmax(-1), MIX.exp())
    return (p / p.sum(-1, keepdim=True)) @ v


@form()
def in_place(q, k, v):
    s = q @ k.mT
    s *= 0.5
    s.masked_fill_(~band(), -INF)
    p = s.softmax(-1)
    return p @ v


@form()
def weights_too(q, k, v):
    p = (q @ k.mT).softmax(-1)
    return p @ v, p.sum(1)


@form()
def masked_again(q, k, v):
    pad = (k.sum((1, 3)) > 0)[:, None, None, :]
    p = (q @ k.mT).masked_fill(pad, -1e9).softmax(-1).masked_fill(pad, 0.0)
    return p @ v


@form(mask="causal")
def masked_and_normalised_again(q, k, v):
    p = (q @ k.mT).softmax(-1) * band()
    return (p / p.sum(-1, keepdim=True)) @ v


@form()
def relative_keys(q, k, v):
    r = k[0, 0, :, None] - k[0, 0, None]
    return ((q @ k.mT + torch.einsum("bhid,ijd->bhij", q, r)) / 2).softmax(-1) @ v


@form()
def talking_before(q, k, v):
    return torch.einsum("bhij,hg->bgij", q @ k.mT, q[0, :, :4, 0]).softmax(-1) @ v


@form(mask="causal")
def sdpa_causal_mask(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, attn_mask=band())


@form()
def sdpa_grouped(q, k, v):
    return F.scaled_dot_product_attention(q, k[:, :2], v[:, :2], enable_gqa=True, is_causal=True, scale=0.3)


@form()
def scores_written_in_part(q, k, v):
    s = q @ k.mT
    s[..., 1:, 1:] = s[..., 1:, 1:] + k.sum(-1)[:, :, None, 1:]
    return s.softmax(-1) @ v


@form()
def scores_written_as_a_whole(q, k, v):
    s = q @ k.mT
    s[:, :, 0:, 0:] = (s.view(B, H, M, 2, N // 2) + q[..., :1, None]).view(s.shape)
    return s.softmax(-1) @ v


@form()
def sink_for_each_row(q, k, v):
    s = torch.cat([q @ k.mT, q.sum(-1, keepdim=True)], -1)
    return s.softmax(-1)[..., :-1] @ v


@form()
def two_kinds_of_keys(q, k, v):
    p = torch.cat([q @ k[:, :, :5].mT, q @ k[:, :, 5:].mT], -1).softmax(-1)
    return p[..., :5] @ v[:, :, :5] + p[..., 5:] @ v[:, :, 5:]


@form(mask="bias")
def shifted_before_a_factor_over_keys(q, k, v):
    s = q @ k.mT / 2
    return ((s - s.amax(-1, keepdim=True)) * (1 + k.mean(-1) ** 2)[..., None, :]).softmax(-1) @ v


@form()
def shifted_before_softcap(q, k, v):
    s = q @ k.mT / 2
    return torch.tanh(s - s.mean(-1, keepdim=True)).softmax(-1) @ v


@form(mask="causal")
def masked_by_zeros_and_ones(q, k, v):
    seen = band().to(q.dtype)
    return ((q @ k.mT * seen - 1e4 * (1 - seen)) * 0.5).softmax(-1) @ v


@form(mask="mask")
def masked_by_zeros_and_ones_anywhere(q, k, v):
    seen = ((torch.arange(M)[:, None] * 7 + torch.arange(N) * 5) % 3 > 0).to(q.dtype)
    return (q @ k.mT * seen - 1e4 * (1 - seen)).softmax(-1) @ v


@form(mask="mask")
def weights_times_zeros_and_ones(q, k, v):
    seen = ((torch.arange(M)[:, None] * 7 + torch.arange(N) * 5) % 3).clamp(max=1).to(q.dtype)
    e = (q @ k.mT).exp() * seen
    return (e / e.sum(-1, keepdim=True)) @ v


@form(mask="none")
def sum_clamped_below_its_least(q, k, v):
    s = q @ k.mT
    e = (s - s.amax(-1, keepdim=True)).exp()
    return (e / e.sum(-1, keepdim=True).clamp_min(1e-6)) @ v


@form()
def sum_with_a_number(q, k, v):
    e = (q @ k.mT / 4).exp()
    return (e / (e.sum(-1, keepdim=True) + 0.5)) @ v


@form()
def quiet_softmax(q, k, v):
    s = q @ k.mT
    e = (s - s.max(-1, keepdim=True).values).exp()
    return (e / (1 + e.sum(-1, keepdim=True))) @ v


@form()
def without_nan(q, k, v):
    p = (q @ k.mT).masked_fill((k.sum((1, 3)) > 3)[:, None, None], -INF).softmax(-1)
    return p.masked_fill(p.isnan(), 0.0) @ v


@form()
def convolved_scores(q, k, v):
    kernel = torch.linspace(-1, 1, H * 9, dtype=q.dtype).view(H, 1, 3, 3)
    return F.conv2d(q @ k.mT, kernel, padding=1, groups=H).softmax(-1) @ v


@form(mask="causal")
def masked_by_index(q, k, v):
    s = q @ k.mT
    s[:, :, ~band()] = -INF
    return s.softmax(-1) @ v


@form(mask="causal")
def filled_with_a_tensor(q, k, v):
    return (q @ k.mT).masked_fill(~band(), torch.tensor(-INF, dtype=q.dtype)).softmax(-1) @ v


@form()
def nan_replaced_by_zeros_like(q, k, v):
    p = (q @ k.mT).masked_fill((k.sum((1, 3)) > 3)[:, None, None], -INF).softmax(-1)
    return torch.where(torch.isnan(p), torch.zeros_like(p), p) @ v


@form(mask="causal")
def differential_of_a_view(q, k, v):
    p = (q @ k.mT).masked_fill(~band(), -INF).softmax(-1).view(B, 2, 2, M, N)
    return (p[:, :, 0] - q.mean() * p[:, :, 1]) @ v[:, :2]


@form()
def differential_of_chunks(q, k, v):
    a, b = (q @ k.mT).softmax(-1).chunk(2, 1)
    return (a - 0.3 * b) @ v[:, :2]


@form()
def differential_of_every_other_head(q, k, v):
    p = (q @ k.mT + torch.arange(N) * torch.linspace(0, 1, H).view(H, 1, 1)).softmax(-1)
    return (p[:, ::2] - 0.3 * p[:, 1::2]) @ v[:, :2]


@form()
def weights_by_head(q, k, v):
    return torch.stack([p @ v[:, h] for h, p in enumerate((q @ k.mT).softmax(-1).unbind(1))], 1)


@form()
def weights_of_one_row(q, k, v):
    return torch.einsum("bhj,bhjd->bhd", (q @ k.mT).softmax(-1)[:, :, 2], v)


@form()
def split_between_two_kinds_of_keys(q, k, v):
    a, b = (q @ k.mT).softmax(-1).split([9, 5], -1)
    return a @ v[:, :, :9] + b @ v[:, :, 9:]


@form()
def scores_of_the_best_keys(q, k, v):
    s, best = (q @ k.mT).topk(4, -1)
    chosen = v.unsqueeze(2).expand(-1, -1, M, -1, -1).gather(3, best[..., None].expand(-1, -1, -1, -1, D))
    return (s.softmax(-1).unsqueeze(-2) @ chosen).squeeze(-2)


@form(mask="none")
def times_the_reciprocal(q, k, v):
    e = torch.exp2(q @ k.mT / 4)
    return (e * e.sum(-1, keepdim=True).reciprocal()) @ v


@form(mask="none")
def times_one_over_late(q, k, v):
    e = torch.exp(q @ k.mT / 4)
    return (e @ v) * (1.0 / e.sum(-1)[..., None])


@form(mask="none")
def sink_in_the_sum(q, k, v):
    s, sink = q @ k.mT, q.mean((0, 2, 3)).view(H, 1, 1)
    top = torch.maximum(s.amax(-1, keepdim=True), sink)
    e = (s - top).exp()
    return (e / ((sink - top).exp() + e.sum(-1, keepdim=True))) @ v


@form(mask="none")
def one_more_in_the_sum(q, k, v):
    s = q @ k.mT
    top = s.amax(-1, keepdim=True).clamp(min=0)
    e = (s - top).exp()
    return (e / ((-top).exp() + e.sum(-1, keepdim=True))) @ v


@form(mask="mask")
def exp_times_mask(q, k, v):
    e = (q @ k.mT).exp() * (k.sum((1, 3)) > -1)[:, None, None].to(q.dtype)
    return (e / e.sum(-1, keepdim=True)) @ v


@form(mask="mask")
def dead_rows_are_zero(q, k, v):
    hidden = (k.sum((1, 3)) > 0)[:, None, None].expand(B, 1, M, N) | (torch.arange(M) < 2)[:, None]
    dead = hidden.all(-1, keepdim=True)
    return (q @ k.mT).masked_fill(hidden & ~dead, -INF).softmax(-1).masked_fill(dead, 0.0) @ v


@form(mask="none")
def exp_computed_twice(q, k, v):
    s = q @ k.mT
    return (torch.exp(s - s.amax(-1, keepdim=True)) / torch.exp(s - s.amax(-1, keepdim=True)).sum(-1, True)) @ v


@form(sites=2)
def context_of_the_largest_scores(q, k, v):
    s = q @ k.mT
    return s.softmax(-1) @ v, s.max(-1).values.softmax(-1).unsqueeze(-2) @ q


@form(mask="causal")
def heads_in_the_batch_with_repeated_masks(q, k, v):
    a, b, c = (torch.cat(x.transpose(1, 2).flatten(2).chunk(H, 2), 0) for x in (q, k, v))
    rows = torch.sign(torch.abs(q.sum((1, 3)))).repeat(H, 1).unsqueeze(-1).repeat(1, 1, N)
    s = torch.where(band().unsqueeze(0).repeat(B * H, 1, 1), torch.bmm(a, b.mT), torch.full((), -1e9))
    return torch.cat(torch.bmm(s.softmax(-1) * rows, c).chunk(H, 0), 2)


@form(mask="causal")
def lower_triangle_normalised_late(q, k, v):
    e = (q @ k.mT / 4).exp().tril()
    return (e @ v) / e.sum(-1, keepdim=True)


@form(mask="causal")
def lower_triangle_normalised_again(q, k, v):
    p = (q @ k.mT).softmax(-1).tril()
    return (p / p.sum(-1, keepdim=True)) @ v


@form(mask="none")
def sum_and_a_number_late(q, k, v):
    e = (q @ k.mT / 4).exp()
    return (e @ v) / (e.sum(-1, keepdim=True) + 1e-3)


MIX = torch.nn.Parameter(torch.linspace(-1, 1, H * H, dtype=torch.float64).view(H, H).sin())


@form(mask="causal")
def talking_heads(q, k, v):
    p = (q @ k.mT).masked_fill(~band(), -INF).softmax(-1)
    return torch.einsum("bhij,hg->bgij", p, MIX) @ v


@form(mask="none")
def talking_by_linear(q, k, v):
    return F.linear((q @ k.mT).softmax(-1).permute(0, 2, 3, 1), MIX).permute(0, 3, 1, 2) @ v


@form(mask="none")
def talking_with_a_bias(q, k, v):
    return F.linear((q @ k.mT).softmax(-1).permute(0, 2, 3, 1), MIX, MIX[0]).permute(0, 3, 1, 2) @ v


@form(mask="none")
def mixed_with_equal_weights(q, k, v):
    return ((0.9 * (q @ k.mT).softmax(-1) + 0.1 / N) * k.mean(-1)[:, :, None]) @ v


@form(mask="none")
def talking_by_convolution(q, k, v):
    return F.conv2d((q @ k.mT).softmax(-1), MIX[:, :, None, None]) @ v


@form(mask="none")
def talking_then_gated(q, k, v):
    return (torch.einsum("bhij,hg->bgij", (q @ k.mT).softmax(-1), MIX) * v.mean(-1)[..., None, :]) @ v


@form(mask="none")
def mean_of_the_heads_weights(q, k, v):
    return (q @ k.mT).softmax(-1).mean(1) @ v[:, 0]


@form(mask="none")
def summed_over_heads_with_value(q, k, v):
    return torch.einsum("bhij,bhjd->bid", (q @ k.mT).softmax(-1), v)


@pytest.mark.parametrize("name", FORMS)
def test_form_is_rewritten(name: str) -> None:
    f, sites, mask = FORMS[name]
    report = compare(f, *tensors((B, H, M, D), (B, H, N, D), (B, H, N, D)))
    assert (report.rewritten, report.left) == (sites, 0), str(report)
    if mask is not None:
        assert {s.mask for s in report.sites} == {mask}


def test_tiers() -> None:
    """Logits that only the model can compute stay M x N, and the report says so."""

    def tiers(name: str) -> set[int]:
        sites: list[Site] = compare(FORMS[name][0], *tensors(*[(B, H, N, D)] * 3)).sites
        return {s.tier for s in sites}

    assert tiers("plain") == {1}
    assert tiers("talking_before") == {2}
    assert tiers("relative_keys") == {2}
    assert tiers("sum_with_a_number") == {1}
    assert tiers("quiet_softmax") == {2}


@pytest.mark.parametrize("shape", [(9, 5), (3, 9, 5), (2, 2, 2, 9, 5)])
def test_any_number_of_dimensions(shape: tuple[int, ...]) -> None:
    assert compare(FORMS["plain"][0], *tensors(shape, shape, shape)).rewritten == 1


def test_cross_attention_of_another_width() -> None:
    f = FORMS["plain"][0]
    assert compare(f, *tensors((2, 3, 5, 4), (2, 3, 11, 4), (2, 3, 11, 7))).rewritten == 1


def test_a_single_key() -> None:
    """Its weight is 1: nothing is left to sample, so that only exactness can be asked for."""
    forms = (FORMS["plain"][0], FORMS["sdpa_grouped"][0], FORMS["weights_too"][0])
    for f, queries in itertools.product(forms, (5, 1)):
        args = tensors((2, 4, queries, 6), (2, 4, 1, 6), (2, 4, 1, 6))
        torch._dynamo.reset()
        backend = SUSBackend(c=2, compiler="eager")
        (outs, grads), (got, got_grads) = run(f, args), run(torch.compile(f, backend=backend), args)
        for a, b in zip([*got, *got_grads], [*outs, *grads], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
        assert backend.report.rewritten == 1


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_other_compilers(compiler: str) -> None:
    args = tensors(*[(B, H, N, D)] * 3, dtype=torch.float32)
    assert compare(FORMS["causal_and_padding"][0], *args, compiler=compiler, tol=2e-5).rewritten == 1

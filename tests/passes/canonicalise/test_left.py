"""What must stay as it is: no attention, or one that the operator cannot express exactly."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from fx_passes import SUSBackend
from tests.passes.harness import compare, tensors

B, H, N, D = 2, 3, 8, 5


def over_queries(q, k, v):
    return (q @ k.mT).softmax(-2) @ v


def over_heads(q, k, v):
    return (q @ k.mT).softmax(1) @ v


def mixed_over_many_wide_heads(q, k, v):
    mix = torch.nn.Parameter(torch.eye(H, dtype=q.dtype) + 0.1)
    wide = torch.cat([v] * 20, -1)  # 3 heads of 100 are wider than any kernel takes
    return (torch.einsum("bhij,hg->bgij", (q @ k.mT).softmax(-1), mix) @ wide)[..., :D]


def squared(q, k, v):
    return (q @ k.mT).softmax(-1) ** 2 @ v


def added_to(q, k, v):
    return ((q @ k.mT).softmax(-1) + torch.eye(N, dtype=q.dtype)) @ v


def added_to_and_normalised(q, k, v):
    p = (q @ k.mT).softmax(-1) + 1e-3
    return (p / p.sum(-1, keepdim=True)) @ v


def added_to_and_masked(q, k, v):
    return ((q @ k.mT).softmax(-1) + 0.1).tril() @ v


def gated_per_entry(q, k, v):
    return ((q @ k.mT).softmax(-1) * torch.sigmoid(k @ q.mT)) @ v


def zeroed_without_mask(q, k, v):
    return (q @ k.mT).softmax(-1).tril() @ v


def zeroed_elsewhere(q, k, v):
    seen = torch.ones(N, N, dtype=torch.bool).tril()
    return (q @ k.mT).softmax(-1).masked_fill(~seen, 0.0) @ v


def written_in_part(q, k, v):
    p = (q @ k.mT).softmax(-1).clone()
    p[..., 0] = 0.5
    return p @ v


def not_normalised(q, k, v):
    return torch.exp(q @ k.mT / 9) @ v


def normalised_again_with_epsilon(q, k, v):
    p = (q @ k.mT).softmax(-1) * torch.ones(N, N, dtype=q.dtype).tril()
    return (p / (p.sum(-1, keepdim=True) + 1e-2)) @ v


def clamped_sum(q, k, v):
    e = (q @ k.mT / 9).exp()
    return (e / e.sum(-1, keepdim=True).clamp_min(8.0)) @ v


def one_key_of_the_weights(q, k, v):
    return (q @ k.mT).softmax(-1)[..., :1] * v


def rows_cut_unevenly(q, k, v):
    return (q @ k.mT).softmax(-1)[:, :, 1:6] @ v


def divided_by_sum_and_what_is_no_exponential(q, k, v):
    e = (q @ k.mT / 9).exp()
    return (e / (e.sum(-1, keepdim=True) + q.pow(2).mean(-1, keepdim=True))) @ v


def times_the_sum(q, k, v):
    e = (q @ k.mT / 9).exp()
    return (e @ v) * e.sum(-1, keepdim=True)


def mask_that_is_no_mask(q, k, v):
    e = (q @ k.mT / 9).exp() * (k @ q.mT).tanh()
    return (e / e.sum(-1, keepdim=True)) @ v


MIX = torch.nn.Parameter(torch.linspace(-1, 1, N * N, dtype=torch.float64).view(N, N).sin())


def mixed_along_keys(q, k, v):
    return (q @ k.mT).softmax(-1) @ MIX @ v


def mixed_and_dropped(q, k, v):
    p = torch.einsum("bhij,hg->bgij", (q @ k.mT).softmax(-1), MIX[:H, :H])
    return F.dropout(p, 0.3, True) @ v


def mixed_dropped_and_normalised(q, k, v):
    p = torch.einsum("bhij,hg->bgij", F.dropout((q @ k.mT).softmax(-1), 0.3, True), MIX[:H, :H].exp())
    return (p / p.sum(-1, keepdim=True)) @ v


def sum_of_gated_normalised(q, k, v):
    p = (q @ k.mT).softmax(-1) * torch.sigmoid(v.sum(-1))[:, :, None] + (k @ q.mT).softmax(-1)
    return (p / p.sum(-1, keepdim=True)) @ v


def sum_with_a_sink_normalised(q, k, v):
    p = F.pad(q @ k.mT, (0, 1)).softmax(-1)[..., :-1] + (k @ q.mT).softmax(-1)
    return (p / p.sum(-1, keepdim=True)) @ v


def cut_and_normalised(q, k, v):
    p = F.pad(q @ k.mT, (0, 1)).softmax(-1)[..., :-1]
    return (p / p.sum(-1, keepdim=True)) @ v


def exp_cut_and_normalised(q, k, v):
    e = F.pad(q @ k.mT / 9, (0, 1)).exp()[..., :-1]
    return (e / e.sum(-1, keepdim=True)) @ v


def mixed_beside_a_sink_and_normalised(q, k, v):
    e = (q @ k.mT / 9).exp()
    p = torch.einsum("bhij,hg->bgij", e / (e.sum(-1, keepdim=True) + 1), MIX[:H, :H].exp())
    return (p / p.sum(-1, keepdim=True)) @ v


def sum_normalised_with_epsilon(q, k, v):
    p = (q @ k.mT).softmax(-1) + (k @ q.mT).softmax(-1)
    return (p / (p.sum(-1, keepdim=True) + 1e-2)) @ v


def mixed_and_through_a_norm(q, k, v):
    p = torch.einsum("bhij,hg->bgij", (q @ k.mT).softmax(-1), MIX[:H, :H])
    return F.instance_norm(p) @ v


def over_the_sum_of_something_else(q, k, v):
    s = q @ k.mT / 9
    return (s.exp() / (s * 1.01).exp().sum(-1, keepdim=True)) @ v


def over_a_sum_without_gradient(q, k, v):
    s = q @ k.mT / 9
    return (s.exp() / s.detach().exp().sum(-1, keepdim=True)) @ v


def over_the_sum_of_other_rows(q, k, v):
    e = (q @ k.mT / 9).exp()
    return (e @ v) / e.sum(-1, keepdim=True).flip(2)


def masked_over_the_whole_sum(q, k, v):
    e = (q @ k.mT / 9).exp()
    return (e.tril() @ v) / e.sum(-1, keepdim=True)


def entropy(q, k, v):
    s = q @ k.mT
    return -(s.softmax(-1) * s.log_softmax(-1)).sum(-1)


def expected_score(q, k, v):
    s = q @ k.mT
    return (s.softmax(-1) * s).sum(-1)


def agreement_of_both_ways(q, k, v):
    s = q @ k.mT
    return (s.softmax(-1) * s.softmax(-2)).sum((-1, -2))


def overlap_of_rows(q, k, v):
    p = (q @ k.mT).softmax(-1)
    return p @ p.mT


def detached(q, k, v):
    return (q @ k.mT).softmax(-1).detach() @ v


def without_gradient(q, k, v):
    with torch.no_grad():
        p = (q @ k.mT).softmax(-1)
    return p @ v


@pytest.mark.parametrize(
    "f",
    [
        over_queries,
        over_heads,
        mixed_over_many_wide_heads,
        squared,
        added_to,
        added_to_and_normalised,
        added_to_and_masked,
        gated_per_entry,
        zeroed_without_mask,
        zeroed_elsewhere,
        written_in_part,
        not_normalised,
        normalised_again_with_epsilon,
        clamped_sum,
        one_key_of_the_weights,
        rows_cut_unevenly,
        divided_by_sum_and_what_is_no_exponential,
        times_the_sum,
        mask_that_is_no_mask,
        over_the_sum_of_something_else,
        over_a_sum_without_gradient,
        over_the_sum_of_other_rows,
        masked_over_the_whole_sum,
        entropy,
        expected_score,
        agreement_of_both_ways,
        overlap_of_rows,
        mixed_along_keys,
        mixed_and_dropped,
        mixed_dropped_and_normalised,
        sum_of_gated_normalised,
        sum_with_a_sink_normalised,
        sum_normalised_with_epsilon,
        cut_and_normalised,
        exp_cut_and_normalised,
        mixed_beside_a_sink_and_normalised,
        mixed_and_through_a_norm,
        detached,
        without_gradient,
    ],
    ids=lambda f: f.__name__,
)
def test_is_left_with_a_reason(f: Callable[..., Any]) -> None:
    report = compare(f, *tensors(*[(B, H, N, D)] * 3))
    assert report.rewritten == 0, str(report)
    assert report.sites
    assert all(site.reason for site in report.sites)


class Model(torch.nn.Module):
    def __init__(self, body: Callable[..., Any]) -> None:
        super().__init__()
        self.table = torch.nn.Parameter(torch.randn(6, D))
        self.linear = torch.nn.Linear(D, 6)
        self.body = body

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(self, x)


@pytest.mark.parametrize(
    "body",
    [
        lambda m, x: (x @ m.table.T).softmax(-1) @ m.table,  # a codebook
        lambda m, x: m.linear(x).softmax(-1) @ m.table,  # a mixture of parameters
        lambda m, x: (m.table @ x.mT).softmax(-1) @ x,  # pooling with learned queries
        lambda m, x: m.linear(x).softmax(-1).mT @ x,  # pooling with learned scores
        lambda m, x: F.log_softmax(m.linear(x) @ m.linear(x).mT, -1).diagonal(dim1=-2, dim2=-1),  # a contrastive loss
    ],
)
def test_is_no_attention(body: Callable[..., Any]) -> None:
    backend = SUSBackend(c=2, compiler="eager")
    torch.compile(Model(body), backend=backend)(torch.randn(B, N, D)).sum().backward()
    assert not backend.report.sites


def linear_attention(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return (x @ w).softmax(-1) @ ((x @ w.T).softmax(-2).mT @ x)


def linear_attention_of_convolutions(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    x = x.flatten(0, 1).mT
    return F.conv1d(x, w[..., None]).softmax(-1) @ F.conv1d(x, w.T[..., None]).mT @ x


@pytest.mark.parametrize(
    "body",
    [
        linear_attention,
        linear_attention_of_convolutions,
        lambda x, w: ((torch.tanh(x) @ w[:, :1]).softmax(-2) * x).sum(-2),  # pooling with learned scores
        lambda x, w: x.softmax(-2).mT @ x,
        lambda x, w: ((x @ w).amax(-1).softmax(-1)[..., None] * x).sum(-2),
        lambda x, w: torch.einsum("bhne,bhned->bhnd", (x @ w).softmax(-1), torch.stack([x * i for i in range(D)], -2)),
    ],
)
def test_what_follows_an_attention_is_no_attention(body: Callable[..., Any]) -> None:
    """It derives from a product of two activations that runs over its keys, but not as scores."""
    w = torch.nn.Parameter(torch.linspace(-1, 1, D * D, dtype=torch.float64).view(D, D).sin())
    report = compare(lambda q, k, v: body((q @ k.mT).softmax(-1) @ v, w), *tensors(*[(B, H, N, D)] * 3))
    assert report.rewritten == 1, str(report)


def test_dropped_probabilities_that_are_read_twice() -> None:
    """Attention of ours has its own dropout: what else is made of the dropped probabilities would have another."""

    def dropped(q, k):
        return F.dropout((q @ k.mT).softmax(-1), 0.5)

    def over_sum(q, k, v):
        p = dropped(q, k)
        return (p / (p.sum(-1, keepdim=True) + 1e-6)) @ v

    def normalised(q, k, v):
        return F.normalize(dropped(q, k), p=1, dim=-1) @ v

    def value_over_sum(q, k, v):
        p = dropped(q, k)
        return p @ (v / p.sum(-2, keepdim=True).mT)

    def twice(q, k, v):
        p = dropped(q, k)
        return p @ (p @ v)

    for f in (over_sum, normalised, value_over_sum, twice):
        torch._dynamo.reset()
        backend = SUSBackend(c=2, compiler="eager")
        torch.compile(f, backend=backend)(*tensors((B, H, N, D), (B, H, N, D), (B, H, N, D)))
        assert backend.report.rewritten == 0, f.__name__
        assert "after dropout are used elsewhere" in backend.report.sites[0].reason

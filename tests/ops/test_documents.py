"""Packed documents: `sus_attention` with query_ids and key_ids, and what makes such numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fx_passes import sus_attention
from fx_passes.ops.documents import both_ids, ids_of_lengths, ids_of_positions, only_rows
from fx_passes.ops.functional import attend
from fx_passes.state import State

B, H, M, N, D = 2, 3, 20, 26, 8


def inputs(m: int = M, n: int = N) -> list[Tensor]:
    g = torch.Generator().manual_seed(0)
    return [torch.randn(B, H, length, D, generator=g, dtype=torch.float64).requires_grad_() for length in (m, n, n)]


IDS: dict[str, tuple[Tensor, Tensor | None]] = {
    "ascending": (torch.arange(M) // 6, torch.arange(N) // 8),
    "of each entry": (
        torch.arange(B * M).view(B, M) % 5,
        torch.arange(B * N).view(B, N).int() % 7,
    ),
    "without keys": (torch.arange(M) % 9, torch.zeros(N, dtype=torch.long)),
    "negative": (-torch.arange(M) // 6, -(torch.arange(N) // 8)),
}


@pytest.mark.parametrize("name", IDS)
@pytest.mark.parametrize("is_causal", [False, True])
def test_exact_as_with_a_mask(name: str, is_causal: bool) -> None:
    query_ids, key_ids = IDS[name]
    assert key_ids is not None
    mask = query_ids.view(-1, 1, M, 1) == key_ids.view(-1, 1, 1, N)
    if is_causal:
        mask = mask & torch.ones(M, N, dtype=torch.bool).tril()
    args = inputs()
    out = sus_attention(*args, is_causal=is_causal, query_ids=query_ids, key_ids=key_ids, c=float("inf"))
    expected = torch.nan_to_num(F.scaled_dot_product_attention(*args, mask))
    torch.testing.assert_close(out, expected)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    seen = mask.any(-1, keepdim=True)
    got, wanted = (torch.autograd.grad((x * weight * seen).sum(), args) for x in (out, expected))
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, torch.nan_to_num(b))


def test_key_ids_are_those_of_the_queries() -> None:
    args, ids = inputs(N, N), torch.arange(N) // 8
    a, b = (sus_attention(*args, query_ids=ids, key_ids=x, c=2, seed=1) for x in (None, ids))
    torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"key_ids": torch.zeros(N, dtype=torch.long)}, ValueError, "key_ids need query_ids"),
        ({"query_ids": torch.zeros(M, dtype=torch.long)}, ValueError, "key_ids may be None only"),
        ({"query_ids": [0] * M, "key_ids": [0] * N}, TypeError, "query_ids must be a tensor"),
        ({"query_ids": torch.zeros(M), "key_ids": torch.zeros(N)}, TypeError, "query_ids must be of int32"),
        (
            {"query_ids": torch.zeros(M + 1, dtype=torch.long), "key_ids": torch.zeros(N, dtype=torch.long)},
            ValueError,
            r"query_ids must be of shape \[20\] or \[2, 20\]",
        ),
        (
            {"query_ids": torch.zeros(M, dtype=torch.long), "key_ids": torch.zeros(3, N, dtype=torch.long)},
            ValueError,
            "key_ids must be of shape",
        ),
        (
            {"query_ids": torch.zeros(M, dtype=torch.long, device="meta"), "key_ids": torch.zeros(N).long()},
            ValueError,
            "query_ids must be on the query's device",
        ),
    ],
)
def test_wrong_ids_are_named(options: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        sus_attention(*inputs(), **options)


def test_numbers_of_documents() -> None:
    assert ids_of_lengths(torch.tensor([0, 2, 2, 5]), 6).tolist() == [[0, 0, 2, 2, 2, 3]]
    assert ids_of_positions(torch.tensor([[0, 1, 2, 0, 0, 1], [3, 4, 0, 1, 2, 3]])).tolist() == [
        [0, 0, 0, 1, 2, 2],
        [0, 0, 1, 1, 1, 1],
    ]


def test_two_pairs_of_numbers_as_one() -> None:
    g = torch.Generator().manual_seed(0)
    first, second = ([torch.randint(-3, 3, (b, n), generator=g) for b, n in ((2, M), (1, N))] for _ in range(2))
    query, key = both_ids(*first, *second)
    same = [q[:, :, None] == k[:, None] for q, k in (first, second)]
    assert torch.equal(query[:, :, None] == key[:, None], same[0] & same[1])
    rows = torch.arange(M)[None] % 3 > 0
    hidden = only_rows(*first, rows)
    assert torch.equal(hidden[:, :, None] == first[1][:, None], same[0] & rows[:, :, None])


@pytest.mark.parametrize("band", [{}, {"right": 0}, {"right": 2, "left": 4}], ids=["all", "causal", "window"])
def test_the_exact_backward_computes_documents_alone(band: dict[str, int]) -> None:
    """Pairs that are computed and pairs that count, of documents that end inside of tiles."""
    lengths = torch.tensor([700, 1, 500, 847])
    ids = torch.repeat_interleave(torch.arange(4), lengths)
    n, state = int(lengths.sum()), State(float("inf"))
    args = [torch.randn(1, 2, n, 4, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    c, seed = torch.tensor(float("inf"), dtype=torch.float64), torch.tensor(1)
    out = attend(*args, c, seed, query_ids=ids[None], key_ids=ids[None], state=state.id, **band)
    out.sum().backward()
    kept = state.pop_kept()
    distance = torch.arange(n) - torch.arange(n)[:, None]
    seen = (ids[:, None] == ids) & (distance <= band.get("right", n)) & (-distance <= band.get("left", n))
    assert kept.dense == 2 * int(seen.sum())
    if not band:
        assert kept.entries <= 1.6 * kept.dense  # blocks of 512 rows; all pairs are 2.9 times as many


def test_the_exact_backward_of_numbers_that_do_not_ascend() -> None:
    ids = torch.tensor([3, 1, 2]).repeat_interleave(300)
    args = [torch.randn(1, 1, 900, 4, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    out = sus_attention(*args, query_ids=ids, c=float("inf"))
    expected = F.scaled_dot_product_attention(*args, ids[:, None] == ids)
    torch.testing.assert_close(out, expected)
    for a, b in zip(*(torch.autograd.grad(x.sin().sum(), args) for x in (out, expected)), strict=True):
        torch.testing.assert_close(a, b)

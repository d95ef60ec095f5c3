"""Rows that see no key, under a mask with a finite value: all keys weigh the same there.

A model that masks by -1e9 or `finfo.min` computes softmax of equal scores in such rows (the padding at the left of a
causal model, for one). Their results follow from means over the keys, in O(N D E), so no M x N mask is needed.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fx_passes.ops.functional import attend
from fx_passes.ops.sharding import on_shards


@on_shards
def attend_with_fully_masked_rows(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    c: Tensor,
    seed: Tensor,
    *,
    fully_masked: str,
    scale: float,
    **options: Any,
) -> Tensor:
    """`attend` with 4-D operands, whose rows that see no key are those of a softmax of equal scores.

    Args:
        query: [B, H, M, D].
        key: [B, G, N, D]; G divides H.
        value: [B, G, N, E].
        c, seed, scale, options: as for `attend`.
        fully_masked: "replaced" where scores were set to the mask value (no gradient). "swamped" where it was added
            and is so large that nothing is left of them; their gradient is that of softmax at equal scores.

    Returns:
        [B, H, M, E].
    """
    out = attend(query, key, value, c, seed, scale=scale, **options)
    group = query.shape[1] // key.shape[1]
    mean = value.mean(-2, keepdim=True)
    if fully_masked == "swamped":
        # d out / d score_j is (v_j - mean) / N; summed over keys a term of the query alone, added with the value 0.
        slope = key.mT @ ((value - mean).detach() * (scale / key.shape[2]))
        first = query @ slope.repeat_interleave(group, 1)
        mean = mean.repeat_interleave(group, 1) + (first - first.detach())
    else:
        mean = mean.repeat_interleave(group, 1)
    return torch.where(_sees_a_key(query, key, **options), out, mean)


def _sees_a_key(
    query: Tensor,
    key: Tensor,
    attn_mask: Tensor | None = None,
    query_ids: Tensor | None = None,
    key_ids: Tensor | None = None,
    prefix: Tensor | None = None,
    left: int | None = None,
    right: int | None = None,
    **_: Any,
) -> Tensor:
    """Bool [B or 1, H or 1, M, 1]. Ids ascend; a band starts at the first query and the first key."""
    m, n, device = query.shape[2], key.shape[2], query.device
    rows = torch.arange(m, device=device)
    begin, end = torch.zeros_like(rows), torch.full_like(rows, n)
    if query_ids is not None and key_ids is not None:
        begin = torch.searchsorted(key_ids[0], query_ids[0])
        end = torch.searchsorted(key_ids[0], query_ids[0], right=True)
    if left is not None:
        begin = torch.maximum(begin, rows - left)
    if right is not None:
        end = torch.minimum(end, rows + (right + 1))
    if attn_mask is not None and attn_mask.shape[2] != 1:
        keys = torch.arange(n, device=device)
        band = (begin[:, None] <= keys) & (keys < end[:, None])
        return (attn_mask & (band if prefix is None else band | (keys < prefix))).any(-1, keepdim=True)
    keep = query.new_ones((1, 1, 1, n), dtype=torch.bool) if attn_mask is None else attn_mask
    before = F.pad(keep.cumsum(-1, dtype=torch.int32), (1, 0))  # visible keys before each place
    seen = before.index_select(-1, end.clamp(0, n)) > before.index_select(-1, begin.clamp(0, n))
    if prefix is not None:
        seen = seen | (before.index_select(-1, prefix.clamp(0, n)) > 0)
    return seen.mT

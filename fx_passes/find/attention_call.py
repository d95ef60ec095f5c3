"""What a call of another package computes: `Call`, and `dense`, which computes it as the matcher reads it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fx_passes.find.flex import repeated
from fx_passes.ops.documents import ids_of_lengths, shared_places

Back = Callable[[Tensor], Tensor]


class NotTaken(Exception):
    """Why a call is left as it is, in words for the user."""


@dataclass(frozen=True)
class Call:
    """One call as an attention.

    Attributes:
        query: [B, H, M, D]; key [B, G, N, D]; value [B, G, N, E].
        scale: factor on the products; None is 1 / sqrt(D).
        left, right: a key may lie at most so many positions before or after its query; None is no bound.
        bottom_right: positions count from the last query and the last key.
        softcap: 0 is off.
        slopes: [H] or [B, H], of ALiBi: minus slope times distance is added to the logits.
        bias: float, broadcastable to [B, H, M, N].
        sinks: [H], a logit without a value.
        query_ids, key_ids: [1, M] and [1, N], a query sees keys of its own number.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    scale: float | None = None
    left: int | None = None
    right: int | None = None
    bottom_right: bool = False
    softcap: float = 0.0
    slopes: Tensor | None = None
    bias: Tensor | None = None
    sinks: Tensor | None = None
    dropout_p: float = 0.0
    query_ids: Tensor | None = None
    key_ids: Tensor | None = None

    def operands(self) -> list[Tensor]:
        """The tensors that may have a gradient."""
        found = (self.query, self.key, self.value, self.bias, self.slopes, self.sinks)
        return [x for x in found if x is not None]

    def alibi(self) -> Tensor | None:
        """The bias that slopes mean, [B or 1, H, M, N] in float32 or float64."""
        if self.slopes is None:
            return None
        i, j = self._places()
        slopes = self.slopes if self.slopes.dim() == 2 else self.slopes[None]
        return -slopes[:, :, None, None].to(torch.promote_types(self.query.dtype, torch.float32)) * (i - j).abs()

    def _places(self) -> tuple[Tensor, Tensor]:
        m, n = self.query.shape[2], self.key.shape[2]
        i = torch.arange(m, device=self.query.device)[:, None]
        return (i + (n - m) if self.bottom_right else i), torch.arange(n, device=self.query.device)[None]

    def visible(self) -> Iterator[Tensor]:
        """Bool masks that all must hold, broadcastable to [B, H, M, N]."""
        i, j = self._places()
        if self.right is not None:
            yield j - i <= self.right
        if self.left is not None:
            yield i - j <= self.left
        if self.query_ids is not None and self.key_ids is not None:
            yield self.query_ids[:, None, :, None] == self.key_ids[:, None, None, :]


def in_documents(call: Call, query_ends: Tensor, key_ends: Tensor) -> tuple[Call, Back]:
    """With documents one after the other in a single sequence, and what brings rows [B, H, M, ..] back to its order.

    The ends are those of the documents, with a 0 before. Where queries and keys have the same, what counts places in
    each document counts them in the whole sequence. Where not, both are spread so that documents begin together, or,
    with `bottom_right`, end together.
    """
    m, n = call.query.shape[2], call.key.shape[2]
    counts = call.left is not None or call.right is not None or call.slopes is not None
    if key_ends is query_ends or not counts:
        query_ids = ids_of_lengths(query_ends, m)
        key_ids = query_ids if key_ends is query_ends else ids_of_lengths(key_ends, n)
        return replace(call, query_ids=query_ids, key_ids=key_ids, bottom_right=False), lambda x: x
    shared = shared_places(query_ends, key_ends, m, n, call.bottom_right)
    spread = replace(
        call,
        query=shared.spread(call.query, shared.query),
        key=shared.spread(call.key, shared.key),
        value=shared.spread(call.value, shared.key),
        query_ids=shared.query_ids,
        key_ids=shared.key_ids,
        bottom_right=False,
    )
    return spread, lambda x: x.index_select(2, shared.query)


def dense(call: Call) -> tuple[Tensor, Tensor]:
    """Out [B, H, M, E] and logsumexp [B, H, M]."""
    q, k, v = call.query, call.key, call.value
    k, v = (repeated(x, q.shape[0], q.shape[1]) for x in (k, v))
    scores = q @ k.mT * (q.shape[-1] ** -0.5 if call.scale is None else call.scale)
    if call.softcap:
        scores = torch.tanh(scores / call.softcap) * call.softcap
    for bias in (call.alibi(), call.bias):
        scores = scores if bias is None else scores + bias
    for mask in call.visible():
        scores = torch.where(mask, scores, -math.inf)
    if call.sinks is not None:
        column = call.sinks.to(scores.dtype)[None, :, None, None].expand(*scores.shape[:-1], 1)
        scores = torch.cat([scores, column], -1)
    lse = torch.logsumexp(scores, -1)
    probs = scores.softmax(-1)
    if call.sinks is not None:
        probs = probs[..., :-1]
    if call.dropout_p:
        probs = torch.nn.functional.dropout(probs, call.dropout_p)
    return probs.to(v.dtype) @ v, lse

"""One attention call: its tensors and its static parameters, as every implementation receives them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Literal, get_args

import torch
from torch import Tensor

Sampler = Literal["auto", "systematic", "independent", "tile"]
Forward = Literal["auto", "library"]
SAMPLERS: tuple[str, ...] = get_args(Sampler)
FORWARDS: tuple[str, ...] = get_args(Forward)
# Beyond it, c times 2^32 units per unit of weight would pass 63 bits; q = min(1, LARGEST_C * W) is as unbiased.
LARGEST_C = float(1 << 30)


def resolve_sampler(sampler: Sampler, device: torch.device) -> Sampler:
    """What "auto" is on a device: whole tiles where tensor cores make dense work cheap, else single entries."""
    return ("tile" if device.type == "cuda" else "systematic") if sampler == "auto" else sampler


def empty_output(like: Tensor, size: Sequence[int]) -> Tensor:
    """A tensor [B, H, M, E] with heads and rows swapped in memory, as the library's kernels have it.

    What follows is a merge of heads. It is no view: an operator's result that is one must not be written to.
    """
    return torch.empty_permuted(size, (0, 2, 1, 3), dtype=like.dtype, device=like.device)


def in_layout(out: Tensor) -> Tensor:
    """A result as `empty_output` would have it, which the operator's fake implementation promises."""
    return out if out.transpose(1, 2).is_contiguous() else empty_output(out, out.shape).copy_(out)


@dataclass(frozen=True)
class Static:
    """The parameters of one call that are no tensors.

    Attributes:
        scale: factor on query @ key^T.
        left: a key may lie at most this many places before its query (sliding window); None is no bound.
        right: a key may lie at most this many places after its query; 0 is causal, None is no bound.
        bottom_right: places are counted from the last query and the last key instead of from the first ones.
        softcap: logits become ``softcap * tanh(logits / softcap)``; 0 is off. It acts before masks and bias.
        dropout_p: probability that a weight is dropped, in [0, 1).
        sampler: one of `SAMPLERS` but "auto", which `resolve_sampler` turns into one for the device.
        forward: "auto", or "library" to keep the bits of the library's kernel.
        sample: False when no gradient is wanted, so that a forward that samples need not.
        site: number of the call site; it separates the random streams of layers that share a seed.
        state: number of the `fx_passes.state.State` that counts the kept entries; 0 is none.
    """

    scale: float
    left: int | None = None
    right: int | None = None
    bottom_right: bool = False
    softcap: float = 0.0
    dropout_p: float = 0.0
    sampler: Sampler = "systematic"
    forward: Forward = "auto"
    sample: bool = True
    site: int = 0
    state: int = 0

    @property
    def drop_below(self) -> int:
        """Random words of 32 bits below it drop their weight; 0 where there is no dropout."""
        return int(self.dropout_p * (1 << 32))


@dataclass(frozen=True)
class Problem:
    """Tensors of one call. Shapes: B batch, H query heads, G key heads (G divides H), M queries, N keys.

    Attributes:
        query: [B, H, M, D]; float64, float32, bfloat16 or float16.
        key: [B, G, N, D], of the query's dtype.
        value: [B, G, N, E], of the query's dtype.
        attn_mask: bool, four dimensions, each 1 or that of [B, H, M, N]; True takes part.
        attn_bias: float, shaped like `attn_mask`, added to the logits; it may want a gradient.
        sinks: [H], one logit per head that enters the softmax's denominator and has no value.
        query_ids, key_ids: int32 or int64 [B or 1, M] and [B or 1, N]; a query sees keys of its own number only.
        prefix: int32 or int64 [B or 1]; keys before it are seen whatever `left` and `right` say.
        static: the rest.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    attn_mask: Tensor | None
    attn_bias: Tensor | None
    sinks: Tensor | None
    query_ids: Tensor | None
    key_ids: Tensor | None
    prefix: Tensor | None
    static: Static

    @property
    def group(self) -> int:
        """Query heads per key head."""
        return self.query.shape[1] // max(self.key.shape[1], 1)

    @property
    def diagonal(self) -> int:
        """Key place minus query place on the band's main diagonal."""
        return self.key.shape[2] - self.query.shape[2] if self.static.bottom_right else 0

    @property
    def accumulate_dtype(self) -> torch.dtype:
        return torch.float64 if self.query.dtype == torch.float64 else torch.float32


TENSORS = tuple(f.name for f in fields(Problem) if f.name != "static")
STATICS = tuple(f.name for f in fields(Static))


@dataclass(frozen=True)
class Softmax:
    """What turns logits S into weights: ``W = exp(S - maximum) / total``, both [B, H, M].

    Two tensors instead of a logsumexp: where every logit of a row is -1e9, ``-1e9 + log(N)`` has no room for
    log(N) in float32. A row that sees no key has maximum 0 and total 1, hence W = 0.

    Where `is_logsumexp` holds, `maximum` is the logsumexp and `total` has no elements. A row that sees no key then has
    any infinite logsumexp.
    """

    maximum: Tensor
    total: Tensor


def is_logsumexp(sampler: str, attn_bias: Tensor | None, softcap: float) -> bool:
    """Whether a call keeps the logsumexp alone, as the library's kernels do: "tile", without far-off logits by bias."""
    return sampler == "tile" and attn_bias is None and softcap == 0


def to_logsumexp(softmax: Softmax) -> Softmax:
    return Softmax(softmax.maximum + softmax.total.log(), softmax.total.new_empty(0))


def from_logsumexp(softmax: Softmax) -> Softmax:
    if softmax.total.numel() or not softmax.maximum.numel():
        return softmax
    return Softmax(softmax.maximum.masked_fill(softmax.maximum.isinf(), 0), torch.ones_like(softmax.maximum))


@dataclass(frozen=True)
class Upstream:
    """What a backward has beside the problem.

    Attributes:
        grad: [B, H, M, E], the gradient of the output.
        out: [B, H, M, E], what the forward returned, as are
        softmax: that of every row, and
        kept: uint8 [1], the byte behind which an implementation may have left what it wants to know.
        c: expected number of kept entries per row, a 0-dim float64.
        seed: fixes the entries that are kept, a 0-dim int64.
        dropout_seed: fixes the weights that dropout drops, a 0-dim int64.
        bias_grad: whether `attn_bias` wants a gradient.
    """

    grad: Tensor
    out: Tensor
    softmax: Softmax
    kept: Tensor
    c: Tensor
    seed: Tensor
    dropout_seed: Tensor
    bias_grad: bool = False


@dataclass(frozen=True)
class Gradients:
    query: Tensor
    key: Tensor
    value: Tensor
    attn_bias: Tensor | None
    sinks: Tensor | None


def sink_weights(problem: Problem, softmax: Softmax) -> Tensor:
    """The weight [B, H, M] that each row gives to its sink."""
    assert problem.sinks is not None
    logits = problem.sinks.to(problem.accumulate_dtype)[None, :, None]
    return (logits - softmax.maximum).exp() / softmax.total


def sink_gradient(problem: Problem, weights: Tensor, delta: Tensor) -> Tensor:
    """Exact: the sink's weight times (0 - delta), summed over rows; delta is dO . O of each row."""
    assert problem.sinks is not None
    return -(weights * delta).sum((0, 2)).to(problem.sinks.dtype)

"""Calls with infinities, NaNs or numbers near overflow, as a diverging run has them: exact, and with what eager gives.

Rows and keys that a mask hides are not left out here: zero times infinity is NaN, in eager too. Linear memory.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from fx_passes.ops.problem import Gradients, Problem, Softmax, Upstream, empty_output
from fx_passes.ops.tiled.dropout import dropout_factor
from fx_passes.ops.tiled.library import eager_takes_library, library_backward, library_forward
from fx_passes.ops.tiled.tiles import Tile, dense_entries, part, row_blocks, visible_keys

# Of any sum, and of a logit. Below them every number here stays finite: weights of kept entries are up to 2^32 times
# those of the softmax, and beside a logit of finfo.min a score is nothing.
_LARGEST = {torch.float32: (1e28, 1e25), torch.float64: (1e290, 1e280)}


def _peak(x: Tensor | None, hidden: bool = False) -> float:
    """Largest absolute value, infinity for NaN; with `hidden`, the largest value, and minus infinity is allowed."""
    if x is None or x.numel() == 0:
        return 0.0
    low, high = (float(y) for y in torch.aminmax(x.detach()))
    peak = max(high, 0.0) if hidden else max(-low, high)
    return math.inf if math.isnan(low) or math.isnan(high) else peak


def in_range(problem: Problem, grad: Tensor | None = None, out: Tensor | None = None) -> bool:
    """Whether no step of forward and, with dO and O, backward can overflow, whatever is kept."""
    s, (b, h, m, d), (_, _, n, e) = problem.static, problem.query.shape, problem.value.shape
    largest, largest_logit = _LARGEST[problem.accumulate_dtype]
    query, key, value = _peak(problem.query), _peak(problem.key), _peak(problem.value)
    factor = 1 / (1 - s.dropout_p)
    product = d * query * key
    logit = s.softcap or product * abs(s.scale)
    logit = max(logit, _peak(problem.attn_bias, hidden=True) * 1e-5, _peak(problem.sinks, hidden=True) * 1e-5)
    sums = [product, abs(s.scale), n * value * factor]
    if s.softcap:
        sums.append(product * abs(s.scale) / s.softcap)
    if grad is not None and out is not None:
        grad_peak, rows = _peak(grad), h * m
        logit_grad = e * grad_peak * max(value * factor, _peak(out))
        sums += [rows * grad_peak * factor, logit_grad * b * rows]
        sums += [logit_grad * abs(s.scale) * key, logit_grad * abs(s.scale) * rows * query]
    return logit <= largest_logit and all(x <= largest for x in sums)  # False for NaN


def _factors(problem: Problem) -> tuple[float, float, float]:
    """The scale's share of query, key and their products, as F.scaled_dot_product_attention splits it."""
    if eager_takes_library(problem):
        return 1.0, 1.0, problem.static.scale
    root = math.sqrt(abs(problem.static.scale))
    return math.copysign(root, problem.static.scale), root, 1.0


def _per_head(x: Tensor, problem: Problem) -> Tensor:
    """[B, G, N, D] as [B, H, N, D]: in the shapes of eager, sums overflow as there."""
    return x if problem.group == 1 else x.repeat_interleave(problem.group, 1)


def _blocks(problem: Problem, dropout_seed: Tensor) -> Iterator[tuple[slice, Tensor, Tensor | None, Tensor, Tensor]]:
    """Rows, their weights [B, H, m, N], the softcap's slope, the sinks' weights [B, H, m, 1], factor of dropout."""
    s, dtype = problem.static, problem.accumulate_dtype
    (b, h), n = problem.query.shape[:2], problem.key.shape[2]
    keys, (query_factor, key_factor, factor_of_both) = slice(0, n), _factors(problem)
    key = _per_head(problem.key.to(dtype) * key_factor, problem)
    for rows in row_blocks(problem):
        logits, slope = (problem.query[:, :, rows].to(dtype) * query_factor) @ key.mT * factor_of_both, None
        if s.softcap:
            tanh = (logits / s.softcap).tanh()
            logits, slope = tanh * s.softcap, 1 - tanh * tanh
        if problem.attn_bias is not None:
            logits = logits + part(problem.attn_bias, rows, keys).to(dtype)
        visible = visible_keys(problem, rows, keys)
        if visible is not None:
            logits = torch.where(visible, logits, logits - torch.inf)  # a hidden NaN stays
        sink = logits.new_full((1, h, 1, 1), -torch.inf)
        if problem.sinks is not None:
            sink = problem.sinks.to(dtype).view(1, h, 1, 1)
        weights = torch.cat([logits, sink.expand(b, -1, logits.shape[2], -1)], -1)
        empty = (weights == -torch.inf).all(-1, keepdim=True)
        weights = weights.softmax(-1).masked_fill(empty, 0.0)
        factor = torch.ones((), dtype=dtype, device=logits.device)
        if s.dropout_p:
            factor = dropout_factor(problem, dropout_seed, Tile(rows.start, 0, logits, None, None))
        yield rows, weights[..., :-1], slope, weights[..., -1:], factor


def forward(problem: Problem, dropout_seed: Tensor) -> tuple[Tensor, Softmax]:
    """As `tiled.forward`. The softmax may be a mere NaN: `backward` forms it again."""
    if eager_takes_library(problem):
        return library_forward(problem, exact=False)
    b, h, m, _ = problem.query.shape
    dtype, e = problem.accumulate_dtype, problem.value.shape[-1]
    out = empty_output(problem.query, (b, h, m, e)).zero_()
    value = _per_head(problem.value.to(dtype), problem)
    for rows, weights, _, _, factor in _blocks(problem, dropout_seed):
        out[:, :, rows] = ((weights * factor) @ value).to(out.dtype)
    nothing = problem.query.new_full((b, h, m), torch.nan, dtype=dtype)
    return out, Softmax(nothing, nothing.clone())


def backward(problem: Problem, upstream: Upstream) -> tuple[Gradients, int]:
    """Exact gradients and the number of entries used.

    The library's own where it has NaN for a reason: its logsumexp has no room for the sum of weights beside a large
    maximum, so where all is finite, the gradients are formed here.
    """
    grad, dropout_seed, bias_grad = upstream.grad, upstream.dropout_seed, upstream.bias_grad
    if bias_grad or not eager_takes_library(problem):
        return _gradients(problem, grad, dropout_seed, bias_grad), dense_entries(problem)
    inputs = (problem.query, problem.key, problem.value, grad, upstream.out)
    if all(math.isfinite(_peak(x)) for x in inputs):
        found = _gradients(problem, grad, dropout_seed, bias_grad)
        if all(math.isfinite(_peak(x)) for x in (found.query, found.key, found.value)):
            return found, dense_entries(problem)
    out, softmax = library_forward(problem, exact=False)
    return library_backward(problem, grad, out, softmax)


def _gradients(problem: Problem, grad: Tensor, dropout_seed: Tensor, bias_grad: bool) -> Gradients:
    dtype, group = problem.accumulate_dtype, problem.group
    query_factor, key_factor, factor_of_both = _factors(problem)
    key, value = (_per_head(x.to(dtype), problem) for x in (problem.key, problem.value))
    key = key * key_factor
    sums = [torch.zeros(x.shape, dtype=dtype, device=x.device) for x in (problem.query, key, value)]
    bias = None
    if bias_grad and problem.attn_bias is not None:
        bias = torch.zeros(problem.attn_bias.shape, dtype=dtype, device=grad.device)
    sinks = None if problem.sinks is None else torch.zeros(problem.sinks.shape, dtype=dtype, device=grad.device)
    for rows, weights, slope, sink, factor in _blocks(problem, dropout_seed):
        grad_rows = grad[:, :, rows].to(dtype)
        query = problem.query[:, :, rows].to(dtype) * query_factor
        grad_weights = (grad_rows @ value.mT) * factor
        delta = (grad_weights * weights).sum(-1, keepdim=True)
        sums[2] += (weights * factor).mT @ grad_rows
        grad_logits = weights * (grad_weights - delta)
        if bias is not None:
            target = part(bias, rows, slice(0, weights.shape[-1]))
            target += grad_logits.sum_to_size(target.shape)
        if sinks is not None:
            sinks -= (sink * delta).sum((0, 2, 3))
        grad_products = grad_logits if slope is None else grad_logits * slope
        sums[0][:, :, rows] = grad_products @ key * (query_factor * factor_of_both)
        sums[1] += grad_products.mT @ query * (key_factor * factor_of_both)
    sums[1:] = [x.view(x.shape[0], -1, group, *x.shape[2:]).sum(2) for x in sums[1:]]
    found = [x.to(y.dtype) for x, y in zip(sums, (problem.query, problem.key, problem.value), strict=True)]
    if bias is not None and problem.attn_bias is not None:
        bias = bias.to(problem.attn_bias.dtype)
    if sinks is not None and problem.sinks is not None:
        sinks = sinks.to(problem.sinks.dtype)
    return Gradients(found[0], found[1], found[2], bias, sinks)

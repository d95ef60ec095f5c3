"""Which masks and biases of a term hide keys, and which have a finite fill.

where(hidden, -inf, 0) added to the scores        a hard mask
scores.masked_fill(hidden, -1e9)                  a soft mask: a row of which all keys are hidden has equal probs
scores + slopes * distance                        no mask
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from fx_passes.canonicalise import sinks
from fx_passes.canonicalise.axes import Dim, resolve
from fx_passes.canonicalise.forms import BIG, Bias, Mask, Term, Walk
from fx_passes.canonicalise.operators import FILLS
from fx_passes.canonicalise.readings import choices
from fx_passes.canonicalise.views import top
from fx_passes.find.sizes import Sizes


@dataclass(frozen=True)
class Classified:
    """What is masked: `hard` masks hide keys, `soft` ones have a finite fill; `biases` are no masks."""

    hard: list[Mask]
    soft: list[Mask]
    biases: list[Bias]


def classify(walk: Walk, term: Term, keys: Dim, sizes: Sizes | None) -> Classified | None:
    """Which masks hide keys. None where probabilities are zeroed at positions that the scores do not mask."""
    scores = term.scores
    read = [(bias, _as_mask(walk, bias, sizes)) for bias in (() if scores is None else scores.biases)]
    biases = [bias for bias, mask in read if mask is None]
    masks = [*(() if scores is None else scores.masks), *(mask for _, mask in read if mask is not None)]
    if not all(math.isinf(m.fill) or any(_same_condition(mask, m) for mask in masks) for m in term.masks):
        return None
    # Where the row's own maximum was subtracted, a bias without keys, a sink may be as small as the mask values.
    outlived = all(b.over(keys) for b in biases) and sinks.outlives_masks(walk, term.softmax)
    hides = [outlived or math.isinf(m.fill) or any(_same_condition(m, other) for other in term.masks) for m in masks]
    hard = [m for m, hidden in zip(masks, hides, strict=True) if hidden]
    soft = [m for m, hidden in zip(masks, hides, strict=True) if not hidden]
    return Classified([*hard, *(m for m in term.masks if math.isinf(m.fill))], soft, biases)


def _same_condition(a: Mask, b: Mask) -> bool:
    return a.keep == b.keep and a.value is b.value and resolve(a.layout) == resolve(b.layout)


def _as_mask(walk: Walk, bias: Bias, sizes: Sizes | None) -> Mask | None:
    """A bias that is nothing but zero and mask values."""
    if bias.factors or bias.value.dtype == torch.bool or not bias.value.dtype.is_floating_point:
        return None
    constant = walk.constant(bias.value)
    if constant is None and sizes is not None and bias.scale == 1.0:
        constant = walk.constants.evaluate(bias.value, sizes)
    if constant is None:
        return _filled_zeros(walk, bias) if bias.scale == 1.0 else None
    values = constant * bias.scale
    masked = values <= BIG
    if not bool(((constant == 0) | masked).all()):
        return None
    fill = -math.inf if bool(torch.isinf(values[masked]).all()) else float(values[masked].max())
    return Mask(bias.value, bias.layout, True, fill, bias)


def _filled_zeros(walk: Walk, bias: Bias) -> Mask | None:
    """``where(condition, 0, fill)`` in one of its forms."""
    x = top(bias)
    for kept, mask in choices(walk, x) if x.value.op in FILLS else ():
        zero = walk.constant(kept) if mask.fill <= BIG else None
        if zero is not None and not bool(zero.any()):
            return Mask(mask.value, mask.layout, mask.keep, mask.fill, bias)
    return None

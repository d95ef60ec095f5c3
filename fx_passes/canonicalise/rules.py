"""What every ATen operator means: one row for those that mean the same, one column for each domain.

An elementwise operator without a rule for scores makes of them scores as a whole (tier 2), another one makes nothing of
them. An operator without a rule for probs ends them. To add a form, add a rule: see docs/contributing.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from fx_passes.canonicalise import probs, scores
from fx_passes.canonicalise.operators import ALONG_DIMENSIONS, FILLS, LARGEST, MATMULS, PRODUCTS, SUMS
from fx_passes.find.trace import partly_written

aten = torch.ops.aten
Rule = Callable[..., Any]
_TABLE: list[tuple[Iterable[Any], Rule | None, Rule | None]] = [
    # operators                        what they make of scores    what they make of probs
    # (views, copies and casts: what their first argument means, with its axes moved by views.before)
    (MATMULS,                          scores.product,             probs.mixed),
    ([aten.sum.dim_IntList],           scores.product,             probs.summed),
    ([aten.mean.dim],                  None,                       probs.summed),
    ([aten.exp.default],               None,                       probs.softmax),
    ([aten.softmax.int],               scores.mixed,               probs.softmax),
    (SUMS,                             scores.added,               probs.added),
    (PRODUCTS,                         scores.multiplied,          probs.multiplied),
    ([aten.neg.default],               scores.negated,             probs.negated),
    (FILLS,                            scores.filled,              probs.filled),
    ([aten.slice.Tensor],              scores.cut,                 probs.cut),
    ([aten.tanh.default],              scores.capped,              None),
    ([aten.dropout.default],           None,                       probs.dropped),
    ([aten.nan_to_num.default],       None,                       probs.nan_replaced),
    (ALONG_DIMENSIONS | LARGEST,       scores.mixed,               None),
    ([partly_written],                 scores.written,             None),
]  # fmt: skip
SCORES: dict[Any, Rule] = {op: rule for ops, rule, _ in _TABLE for op in ops if rule is not None}
PROBS: dict[Any, Rule] = {op: rule for ops, _, rule in _TABLE for op in ops if rule is not None}

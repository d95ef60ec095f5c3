"""Finite masks as true ones, where that is exact.

Setting a score to -1e9 is not quite masking it: a row in which every score is -1e9 has equal probs. So a mask with a
finite fill becomes a true one only where no row can lose all its keys, or where such rows can be computed apart
(`Absorbed.fully_masked`, see `fx_passes.ops.fully_masked_rows`).

    Classified(hard, soft, biases)        Absorbed(conditions, biases, fills)
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fx_passes.canonicalise.axes import Dim, FailedMatch
from fx_passes.canonicalise.forms import Bias, Mask, Term, Walk
from fx_passes.canonicalise.masks.classify import Classified
from fx_passes.canonicalise.masks.conditions import Condition, conditions, every_row_sees, visible
from fx_passes.find.sizes import Sizes

SWAMPS = -1e30  # added to a score, a value at or below it leaves nothing of the score


@dataclass(frozen=True)
class Absorbed:
    """Conditions that hide keys, finite masks among them where that is exact; the other ones are added to the scores.

    `fully_masked` is that of `LoweredMask`, `all_rows_see` says that conditions are exact since every row sees a key.
    """

    conditions: list[Condition]
    biases: list[Bias]
    fills: list[Mask]
    fully_masked: str = ""
    all_rows_see: bool = False


def absorb(walk: Walk, term: Term, masks: Classified, rows: Dim, keys: Dim, sizes: Sizes | None) -> Absorbed:
    """Finite masks as true ones where no row can lose all its keys by them, or where such rows are computed apart."""
    hard = [c for m in masks.hard for c in conditions(walk, m, rows, keys, sizes, by_form=True)]
    soft = [(m, conditions(walk, m, rows, keys, sizes, by_form=False)) for m in masks.soft]
    for i in _hidden_by_others([_matrices(found) for _, found in soft]) if not sizes else ():
        hard += soft.pop(i)[1]
    every = [*hard, *(c for _, found in soft for c in found)]
    if not soft or every_row_sees(_matrices(every)):
        return Absorbed(every, masks.biases, [], all_rows_see=bool(soft))
    if len(soft) == 1 and not hard and _lost_apart(*soft[0], masks.biases, term):
        return Absorbed(every, masks.biases, [], "replaced" if soft[0][0].bias is None else "swamped")
    fills = [m for m, _ in soft if m.bias is None]
    if fills and (len(soft) > 1 or (term.scores is not None and term.scores.biases)):
        raise FailedMatch("masked scores may be all that a row has, and get another mask or a bias")
    return Absorbed(hard, [*masks.biases, *(m.bias for m, _ in soft if m.bias is not None)], fills)


def _matrices(found: list[Condition]) -> list[Tensor | None]:
    return [c.matrix for c in found]


def _hidden_by_others(masks: list[list[Tensor | None]]) -> list[int]:
    """Constant masks, last first, that take no row all its keys and hide nothing that another one does not hide.

    What such a mask hides is hidden twice, and has no weight even in a row that the other leaves nothing.
    """
    found: list[int] = []
    for i, mine in reversed([*enumerate(masks)]):
        others = [visible(other) for j, other in enumerate(masks) if j != i and j not in found]
        if every_row_sees(mine) and any(not bool((other & ~visible(mine)).any()) for other in others):
            found.append(i)
    return found


def _lost_apart(mask: Mask, found: list[Condition], biases: list[Bias], term: Term) -> bool:
    """Whether rows that a finite mask leaves no key have equal probabilities, so that they can be computed apart."""
    scores = term.scores
    if scores is None or not term.softmax.keys_only or term.dropout is not None:
        return False
    if any(c.seen.added and c.matrix is None for c in found):
        return False
    swamps = mask.fill <= SWAMPS and not any(b.wants_gradient for b in biases)
    if mask.bias is None:  # set after all biases were added, it leaves nothing of them
        return scores.added[-1] is mask or swamps
    return swamps and scores.is_linear

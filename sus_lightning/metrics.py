"""GradientVariance: how much variance a SUS backward adds to a batch gradient's own."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from fx_passes.ops.arguments import check_choice
from sus_lightning.parameter_kinds import ATTENTION_KINDS, KINDS, Piece, classify
from sus_lightning.schedules import check_count

Gradients = Sequence["Tensor | None"]
PER = ("kind", "layer")


class GradientVariance(Metric):
    r"""Variance of a SUS gradient relative to that of the batch gradient, and the gradient noise scale.

    With g the exact gradient of one batch, g_s a SUS gradient of the same batch, and g_1, g_2 exact gradients of two
    independent batches, summed over the entries of all parameters:

        sus_variance          =  mean |g_s - g|^2
        batch_variance        =  mean |g_1 - g_2|^2 / 2      (two batches, or each two neighbours of more)
                              =  mean |g_1 - g_2|^2 / 4      (two halves of one batch)
        relative_variance     =  sus_variance / batch_variance
        squared_gradient      =  mean(g_1 . g_2)
        gradient_noise_scale  =  batch_variance / squared_gradient

    Each mean is unbiased: E|g_1 - g_2|^2 = 2 tr(Sigma) for independent batches of the size that is trained with (halves
    have twice its variance, hence 4), and E[g_1 . g_2] = |G|^2 for the true gradient G. The states are those sums and
    their counts, so that the value over steps and ranks is the ratio of averages and not the average of ratios.
    The noise scale is that of arXiv 1812.06162.

    Shapes: each argument of ``update`` is a sequence of gradients in the order of ``parameters``, None for a parameter
    without gradient. Values are 0-dim float64 tensors; relative_variance is in [0, inf), NaN before both kinds of
    update were seen; the noise scale is in units of one batch, NaN where the estimate of |G|^2 is not positive.

    Note:
        ``compute`` returns the five values in total, ``relative_variance_of/<kind>`` for the kinds q, k, v, o, qkv and
        rest of parameters (told by their names, fused qkv weights split where that can be recognised), with
        ``per="layer"`` also ``relative_variance_of/<layer>``, and ``worst_relative_variance``, the largest one among
        the attention projections of the layers.

    Args:
        parameters: name and shape of each parameter; empty for one group without names.
        batches_per_step: batches whose gradients are averaged in one optimizer step (accumulation times ranks): both
            variances are divided by it, so that they are those of the step.
        per: "kind", or "layer" for the values of layers too, of which there may be hundreds.
        **kwargs: of `torchmetrics.Metric`.

    Raises:
        ValueError: an argument is not allowed; lengths or shapes of gradients do not fit; neither or both of ``sus``
            and ``other`` given.

    Examples:
        For a model the argument is ``((name, p.shape) for name, p in model.named_parameters())``. ``update`` is called
        as often as there are draws, and as there are pairs of batches.

        >>> import torch
        >>> metric = GradientVariance([("q_proj.weight", torch.Size([2])), ("mlp.weight", torch.Size([1]))])
        >>> exact = [torch.tensor([1.0, 2.0]), torch.tensor([3.0])]
        >>> metric.update(exact, sus=[torch.tensor([1.5, 2.0]), torch.tensor([3.0])])
        >>> metric.update(exact, other=[torch.tensor([0.0, 2.0]), torch.tensor([4.0])])
        >>> {name: round(value.item(), 3) for name, value in metric.compute().items()}["relative_variance"]
        0.25
        >>> metric.compute()["relative_variance_of/q"].item()
        0.5
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False

    noise: Tensor
    draws: Tensor
    spread: Tensor
    product: Tensor
    pairs: Tensor

    def __init__(
        self,
        parameters: Iterable[tuple[str, torch.Size]] = (),
        batches_per_step: int = 1,
        per: str = "kind",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        check_choice("per", per, PER)
        self.batches_per_step, self.per = check_count("batches_per_step", batches_per_step, at_least=1), per
        named = list(parameters)
        self.pieces: list[Piece] = classify(named)
        self.parameters_given = len(named)
        count = max(len(self.pieces), 1)
        # float64: sums over steps of squares of up to 1e9 entries, and float32 would lose the small ones.
        for name in ("noise", "spread", "product"):
            self.add_state(name, torch.zeros(count, dtype=torch.float64), dist_reduce_fx="sum")
        for name in ("draws", "pairs"):
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(
        self,
        exact: Gradients,
        sus: Gradients | None = None,
        other: Gradients | None = None,
        halves: bool = False,
        weights: Sequence[float] | None = None,
        counts: bool = True,
    ) -> None:
        """Adds one SUS draw, or one pair of batches.

        Args:
            exact: exact gradients of a batch (of one half if ``halves``).
            sus: SUS gradients of the same batch, all other randomness being equal.
            other: exact gradients of an independent batch (of the other half if ``halves``), at the same weights.
            halves: the two are halves of one batch.
            weights: factor per parameter, for shards of which other ranks hold copies; None is 1.
            counts: False on all ranks but one where each rank has shards of the same gradient.
        """
        if (sus is None) == (other is None):
            raise ValueError("exactly one of sus and other must be given")
        second = sus if sus is not None else other
        assert second is not None
        self._check(exact, second)
        distance = self._reduce(exact, second, weights, _squared_distance)
        if sus is not None:
            self.noise += distance / self.batches_per_step
            self.draws += counts
        else:
            self.spread += distance / ((4 if halves else 2) * self.batches_per_step)
            self.product += self._reduce(exact, second, weights, _product)
            self.pairs += counts

    def compute(self) -> dict[str, Tensor]:
        """All values by name, see the class."""
        noise, spread = self.noise / self.draws, self.spread / self.pairs
        squared = (self.product / self.pairs).sum()
        values = {
            "relative_variance": _ratio(noise.sum(), spread.sum()),
            "sus_variance": noise.sum(),
            "batch_variance": spread.sum(),
            "squared_gradient": squared,
            "gradient_noise_scale": _ratio(spread.sum(), squared),
        }
        if not self.pieces:
            return values
        for kind in KINDS:
            self._group(values, kind, [piece.kind == kind for piece in self.pieces], noise, spread)
        layers = dict.fromkeys(piece.layer for piece in self.pieces if piece.layer) if self.per == "layer" else ()
        for layer in layers:
            self._group(values, layer, [piece.layer == layer for piece in self.pieces], noise, spread)
        worst = self._worst(noise, spread)
        if worst is not None:
            values["worst_relative_variance"] = worst
        return values

    # `_of`, since MLflow's file store cannot have a metric below another one's name.
    def _group(self, values: dict[str, Tensor], name: str, mask: list[bool], noise: Tensor, spread: Tensor) -> None:
        if any(mask):
            chosen = torch.tensor(mask, device=noise.device)
            values[f"relative_variance_of/{name}"] = _ratio(noise[chosen].sum(), spread[chosen].sum())

    def _worst(self, noise: Tensor, spread: Tensor) -> Tensor | None:
        groups = list(dict.fromkeys((p.layer, p.kind) for p in self.pieces if p.kind in ATTENTION_KINDS))
        if not groups:
            return None
        masks = torch.tensor(
            [[(p.layer, p.kind) == group for p in self.pieces] for group in groups],
            device=noise.device,
            dtype=noise.dtype,
        )
        ratios = (masks @ noise) / (masks @ spread)
        ratios = ratios[torch.isfinite(ratios)]
        return ratios.max() if len(ratios) else noise.new_tensor(torch.nan)

    def _check(self, exact: Gradients, second: Gradients) -> None:
        if len(exact) != len(second) or (self.pieces and len(exact) != self.parameters_given):
            expected = self.parameters_given or len(exact)
            raise ValueError(
                f"expected {expected} gradients per argument, but there are {len(exact)} and {len(second)}"
            )
        for i, (a, b) in enumerate(zip(exact, second, strict=True)):
            if a is not None and b is not None and a.shape != b.shape:
                raise ValueError(f"gradient {i} has the shapes {tuple(a.shape)} and {tuple(b.shape)}")

    def _reduce(self, first: Gradients, second: Gradients, weights: Sequence[float] | None, of: Any) -> Tensor:
        """[pieces] float64 sums of `of(first, second)` over the entries of each piece."""
        whole = [Piece(i, "rest", "") for i in range(len(first))]
        sums: list[Tensor | None] = []
        for piece in self.pieces or whole:
            a, b = first[piece.index], second[piece.index]
            if a is None and b is None:
                sums.append(None)
                continue
            a, b = _zeros_if_none(a, b), _zeros_if_none(b, a)
            weight = 1.0 if weights is None else weights[piece.index]
            sums.append(of(piece.of(a), piece.of(b)) * weight)
        device = next((s.device for s in sums if s is not None), self.noise.device)
        zero = torch.zeros((), dtype=torch.float64, device=device)
        stacked = torch.stack([zero if s is None else s for s in sums]).to(self.noise.device)
        return stacked if self.pieces else stacked.sum().reshape(1)


def _zeros_if_none(x: Tensor | None, like: Tensor | None) -> Tensor:
    if x is not None:
        return x
    assert like is not None
    return torch.zeros_like(like)


def _squared_distance(a: Tensor, b: Tensor) -> Tensor:
    a, b = _at_least_float32(a), _at_least_float32(b)
    return (a - b).square().sum(dtype=torch.float64)


def _product(a: Tensor, b: Tensor) -> Tensor:
    return (_at_least_float32(a) * _at_least_float32(b)).sum(dtype=torch.float64)


def _at_least_float32(x: Tensor) -> Tensor:
    return x.detach() if x.dtype in (torch.float32, torch.float64) else x.detach().float()


def _ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    return torch.where(denominator > 0, numerator / denominator, torch.nan)

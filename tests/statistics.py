"""A test of unbiasedness that can fail: the mean over seeds against the exact gradient, within its standard error."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def z_scores(draw: Callable[[int], Tensor], exact: Tensor, seeds: int, directions: int = 8) -> tuple[Tensor, float]:
    """Deviations of the mean draw from `exact` along fixed directions, in standard errors.

    The first direction is the exact gradient itself: a factor on the weights, the likeliest bias, shows there. The
    others are random.

    Returns:
        z [directions], and the relative standard error along the first direction: what bias could be seen.
    """
    exact = exact.double().flatten()
    generator = torch.Generator().manual_seed(0)
    along = torch.randn(directions, exact.numel(), generator=generator, dtype=torch.float64)
    along[0] = exact / exact.norm() ** 2
    samples = torch.stack([along @ draw(seed).double().flatten() for seed in range(seeds)])
    # What is exact by construction, as a sink's gradient, has rounding in place of a deviation.
    error = (samples.std(0) / seeds**0.5).clamp_min(1e-6 * float(along[1:].norm(dim=1).mean() * exact.norm()))
    error[0] = samples[:, 0].std() / seeds**0.5 + 1e-6
    return (samples.mean(0) - along @ exact) / error, float(error[0])


def assert_unbiased(draw: Callable[[int], Tensor], exact: Tensor, seeds: int, resolution: float = 0.01) -> None:
    """Fails on a deviation of 4.5 standard errors, and where the test could not see a bias of 4.5 `resolution`."""
    z, error = z_scores(draw, exact, seeds)
    assert error < resolution, f"{seeds} seeds leave a relative standard error of {error:.4f}: the test is blind"
    assert float(z.abs().max()) < 4.5, f"the mean is off by {z.tolist()} standard errors"

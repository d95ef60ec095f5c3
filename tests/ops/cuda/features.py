"""What acts on the logits and weights of a call, as options of `calls.problem`: both samplers are checked with each."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

HEAD_SIZES = [(16, 32), (40, 24), (256, 16)]  # of query and value


def features(m: int, n: int) -> dict[str, dict[str, Any]]:
    """Options by name, for m rows and n keys of two query heads over one key head unless an entry says otherwise."""
    generator = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    padding = torch.rand(2, 1, 1, n, generator=generator) < 0.6
    padding[1] = False  # nothing is seen
    # One of all batches, whose heads lie so far apart that a head that is none is in no tensor.
    far = torch.zeros(2 << 24, dtype=torch.bool).as_strided((1, 2, m, n), (0, 1 << 24, n, 1))
    far.copy_(torch.rand(1, 2, m, n, generator=generator) < 0.5)
    ids = {"query_ids": torch.arange(m)[None] // 50, "key_ids": torch.arange(n)[None] // 50}
    found: dict[str, dict[str, Any]] = {
        "plain": {},
        "causal": {"static": {"right": 0}},
        "window": {"static": {"left": n // 4, "right": 0}},
        "end": {"static": {"right": 0, "bottom_right": True}},
        "late": {"static": {"right": -n // 2}},  # the first rows are before the band
        "groups": {"b": 2, "h": 4, "g": 2, "m": 70, "n": 70, "static": {"right": 0}},
        "padding": {"b": 2, "h": 1, "g": 1, "attn_mask": padding},
        "mask": {"attn_mask": torch.rand(1, 2, m, n, generator=generator) < 0.5},
        "documents": {**ids, "prefix": torch.tensor([30]), "static": {"right": 0}},
        "shared_mask": {"b": 2, "attn_mask": far},
        "bias": {"attn_bias": noise(1, 2, m, n)},
        "key_bias": {"attn_bias": noise(1, 1, 1, n)},
        "row_bias": {"attn_bias": noise(1, 2, m, 1)},
        "sinks": {"sinks": torch.tensor([1.0, -torch.inf])},
        "softcap": {"spread": 4.0, "static": {"softcap": 2.0}},
        "dropout": {"static": {"dropout_p": 0.3, "site": 3}},
        "library": {"static": {"forward": "library"}},
    }
    return {name: {"m": m, "n": n, **options} for name, options in found.items()}

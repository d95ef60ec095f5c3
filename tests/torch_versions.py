"""What releases of torch lack, for the tests of it."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
from torch.nn.attention import flex_attention

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # before 2.10
    varlen_attn = None  # type: ignore[assignment]

AuxOutput = getattr(flex_attention, "AuxOutput", None)  # since 2.9
AuxRequest = getattr(flex_attention, "AuxRequest", None)

needs_aux = pytest.mark.skipif(AuxRequest is None, reason="flex_attention has no return_aux")


def varlen_options(options: dict[str, Any]) -> dict[str, Any]:
    """Options of `varlen_attn` as this torch has them; skips the test where it has not."""
    if varlen_attn is None:
        pytest.skip("no varlen_attn")
    known = inspect.signature(varlen_attn).parameters
    if "window_size" not in known and options.get("window_size") == (-1, 0):  # torch 2.10
        options = {name: value for name, value in options.items() if name != "window_size"} | {"is_causal": True}
    if not options.keys() <= known.keys():
        pytest.skip("varlen_attn has other options")
    return options


__all__ = ["AuxOutput", "AuxRequest", "needs_aux", "varlen_attn", "varlen_options"]

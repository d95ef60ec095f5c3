"""What callers do with the result of an attention, [B, H, M, E]: view it, write to it, merge its heads."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor


def set_item(out: Tensor) -> Tensor:
    out[..., 0, :] = 0
    return out.sin()


USES: dict[str, Callable[[Tensor], Tensor]] = {
    "add_": lambda out: (out.add_(1.5), out.sin())[1],
    "relu_": lambda out: out.relu_(),
    "set item": set_item,
    "add_ to a transpose": lambda out: (out.transpose(1, 2).add_(1), out.sin())[1],
    "view(B, -1)": lambda out: out.view(len(out), -1).sin(),
    "view(B, H * M, -1)": lambda out: out.view(len(out), out.shape[1] * out.shape[2], -1).sin(),
    "add_ to a reshape": lambda out: (out.reshape(-1).add_(1), out.sin())[1],
    "dropout in place": lambda out: F.dropout(out, 0.0, True, True).sin(),
    "merge of heads": lambda out: out.transpose(1, 2).reshape(len(out), out.shape[2], -1).sin(),
}

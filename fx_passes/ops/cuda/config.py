"""Sizes of tiles: a function of dtype, head sizes and device, so that forward and backward agree on the lists' layout.

They were chosen by ahead-of-time compilation (spills, tensor-core instruction, shared memory); no speed has been
measured.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True)
class Config:
    """
    Attributes:
        sub: neighbouring keys in one mass of the sampler; also the keys of one program of `columns`.
        bm, bn: query rows and keys of the forward's tiles; bn is a multiple of sub.
        tc: tiles of keys that the selection treats at a time.
        bi: points that `columns` treats at a time.
        bs, bk: keys that the selection and the backward of the block sampler treat at a time.
        forward, columns, block_select, block_backward: (num_warps, num_stages) of these kernels.
    """

    sub: int
    bm: int
    bn: int
    tc: int
    bi: int
    bs: int
    bk: int
    forward: tuple[int, int]
    columns: tuple[int, int]
    block_select: tuple[int, int]
    block_backward: tuple[int, int]


# Products in float32 run on no tensor core and hold their operands in registers: small tiles.
_FLOAT32 = Config(
    sub=64, bm=32, bn=64, tc=16, bi=16, bs=16, bk=16,
    forward=(8, 1), columns=(8, 1), block_select=(8, 1), block_backward=(8, 1),
)  # fmt: skip
_HALF = Config(
    sub=64, bm=128, bn=64, tc=16, bi=128, bs=64, bk=64,
    forward=(8, 2), columns=(8, 1), block_select=(4, 2), block_backward=(8, 1),
)  # fmt: skip


def padded(width: int) -> int:
    """A head size as the kernels see it: a power of two, at least 16 (the smallest that `tl.dot` takes)."""
    return max(16, 1 << (width - 1).bit_length())


def has_large_tiles(device: torch.device) -> bool:
    """Whether the tensor cores read shared memory (sm_90, sm_100), of which there are 227 KB; else 99 KB must do."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device)[0] in (9, 10)


def config(dtype: torch.dtype, d: int, e: int, large: bool = True) -> Config:
    """Sizes for head sizes d of query and e of value; `large` as in `has_large_tiles`."""
    width = max(padded(d), padded(e))
    if dtype == torch.float32:
        if width <= 64:
            return _FLOAT32
        return replace(_FLOAT32, sub=16, bm=32 if width <= 128 else 16, bn=32)
    if width <= 128:
        return _HALF if large else replace(_HALF, bi=64, bk=32)
    wide = replace(_HALF, sub=32, bn=32, tc=8, bi=32, bk=16)
    return wide if large else replace(wide, bm=64, bn=64, forward=(8, 1))

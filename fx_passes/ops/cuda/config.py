"""Sizes of tiles: a function of dtype, head sizes and device, so that forward and backward agree on the lists' layout.

They were chosen by ahead-of-time compilation (spills, tensor-core instruction, shared memory); no speed has been
measured.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch


@dataclass(frozen=True)
class Config:
    """
    Attributes:
        sub: neighbouring keys in one mass of the systematic sampler; also the keys of one program of `columns`.
        bm, bn: query rows and keys of the forward's tiles; bn is a multiple of sub.
        tc: tiles of keys that the selection treats at a time.
        bi: points that `columns` treats at a time.
        forward, columns: (num_warps, num_stages) of these kernels.
    """

    sub: int
    bm: int
    bn: int
    tc: int
    bi: int
    forward: tuple[int, int]
    columns: tuple[int, int]


@dataclass(frozen=True)
class TileConfig:
    """Sizes of the kernels of the sampler "tile".

    Attributes:
        probe_rows: probed rows of one program, of `probe_rows / PROBED` blocks; probe_tiles: tiles of 64 keys that it
            treats at a time.
        probe_registers: of a thread of the probe at most, None for what the compiler takes: what fits twice on a
            multiprocessor is worth a few spills.
        keys: keys that `tile_dq` treats at a time; rows: rows that `tile_dkdv` does. Both divide 64.
        probe, dq, dkdv: (num_warps, num_stages) of these kernels.
    """

    probe_rows: int
    probe_tiles: int
    probe_registers: int | None
    keys: int
    rows: int
    probe: tuple[int, int]
    dq: tuple[int, int]
    dkdv: tuple[int, int]


# Products in float32 run on no tensor core and hold their operands in registers: small tiles.
_FLOAT32 = Config(sub=64, bm=32, bn=64, tc=16, bi=16, forward=(8, 1), columns=(8, 1))
_HALF = Config(sub=64, bm=128, bn=64, tc=16, bi=128, forward=(8, 2), columns=(8, 1))


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
        return _HALF if large else replace(_HALF, bi=64)
    wide = replace(_HALF, sub=32, bn=32, tc=8, bi=32)
    return wide if large else replace(wide, bm=64, bn=64, forward=(8, 1))


_overridden: dict[str, Any] = {}


@contextmanager
def override(**fields: Any) -> Iterator[None]:
    """Other fields of every `TileConfig` for a while: for measuring (`benchmarks/gpu_session.py`)."""
    _overridden.update(fields)
    try:
        yield
    finally:
        _overridden.clear()


def tile_config(dtype: torch.dtype, d: int, e: int, large: bool = True) -> TileConfig:
    """Sizes for head sizes d of query and e of value; `large` as in `has_large_tiles`."""
    return replace(_tile_config(dtype, max(padded(d), padded(e)), large), **_overridden)


def _tile_config(dtype: torch.dtype, width: int, large: bool) -> TileConfig:
    if dtype == torch.float32:
        step = 64 if width <= 64 else 32 if width <= 128 else 16
        warps = 4 if width <= 128 else 8
        return TileConfig(64 if width <= 128 else 16, 1, None, step, step, (4, 1), (warps, 1), (8, 1))
    if width <= 128:
        small = TileConfig(64, 1, None, 64, 64, (4, 2), (4, 1), (4, 1))
        if not large:
            return small
        # A wide head reads more keys per row: twice the rows halve that.
        rows, probe = (128, (8, 3)) if width > 64 else (64, (4, 3))
        return replace(small, probe_rows=rows, probe=probe, probe_registers=128, dq=(4, 2))
    small = TileConfig(64, 1, None, 32, 32, (4, 1), (8, 1), (8, 1))
    return replace(small, keys=64, rows=64, probe=(4, 2)) if large else small

"""Offsets beyond 2^31 elements in Triton's interpreter: tensors of huge strides in a sparse file.

`tests/ops/test_cuda.py` runs it in a process of its own.
"""

from __future__ import annotations

from tests.ops.cuda import interpreter  # isort: skip  (first: it sets TRITON_INTERPRET)

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.ops.cuda.calls import check_offsets

interpreter.install()


@pytest.mark.parametrize("sampler", ["systematic", "tile"])
@pytest.mark.parametrize("dim", [0, 1, 2])
def test_inputs_spread_over_more_than_int32(dim: int, sampler: str, tmp_path: Path) -> None:
    def allocate(size: int) -> Tensor:
        path = tmp_path / str(len(list(tmp_path.iterdir())))
        return torch.from_file(str(path), shared=True, size=size, dtype=torch.float16)

    check_offsets(sampler, dim, 1 << 32, allocate)

"""Attention between DTensors, on two processes: exact at c = inf, unbiased at c = 2, or left with a reason."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytestmark = [
    pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without torch.distributed"),
    pytest.mark.skipif(torch.__version__ < (2, 9), reason="torch 2.8 cannot compile q @ k.mT with sharded heads"),
]
SCRIPT = Path(__file__).with_name("shard_script.py")
TAKEN = [
    "heads",
    "heads, causal",
    "heads, bias with gradient",
    "heads, padding by -1e9",
    "heads, logits",
    "heads, sdpa",
    "heads, grouped",
    "heads, checkpoint",
    "batch",
    "batch, padding by -1e9",
    "batch, bias with gradient",
]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each rank saw, by case."""
    file = tmp_path_factory.mktemp("shards") / "seen"
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    path = os.pathsep.join([str(SCRIPT.parents[3]), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    logs = [file.with_suffix(f".log{rank}").open("w+") for rank in (0, 1)]
    started = [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), str(file), str(rank), port], env=environment, stdout=log, stderr=log
        )
        for rank, log in enumerate(logs)
    ]
    try:
        codes = [process.wait(timeout=500) for process in started]
    finally:
        for process in started:
            process.kill()
    for log in logs:
        log.seek(0)
    assert codes == [0, 0], logs[0].read()[-3000:] + logs[1].read()[-3000:]
    return [json.loads(Path(f"{file}.{rank}").read_text()) for rank in (0, 1)]


@pytest.mark.parametrize("case", TAKEN)
def test_shards_of_batch_and_heads_are_rewritten(ranks: list[dict[str, Any]], case: str) -> None:
    seen = ranks[0][case]
    assert seen == ranks[1][case], seen  # the gradients of all parameters are the same on all ranks
    assert seen["rewritten"] == 1, seen
    assert seen["eager"] < 1e-14
    assert seen["exact"] < 1e-14
    assert 0.05 < seen["noise"] < 1


def test_what_ranks_hold_together_is_left_with_a_reason(ranks: list[dict[str, Any]]) -> None:
    seen = ranks[0]["replicated"]
    assert seen["rewritten"] == 0
    assert "query is a DTensor with the placements (Replicate(),): only shards of batch and heads" in seen["reason"]
    assert seen["exact"] < 1e-14
    assert seen["noise"] < 1e-14


def test_the_mean_over_draws_is_the_exact_gradient(ranks: list[dict[str, Any]]) -> None:
    assert ranks[0]["unbiased"]["errors"] < 1.6  # of 20 means in standard errors, the root mean square is about 1


def test_the_function_takes_shards_of_heads(ranks: list[dict[str, Any]]) -> None:
    seen = ranks[0]["function"]
    assert max(seen["errors"]) < 1e-14
    assert "sharded along batch or heads" in seen["message"]
    assert "Shard(dim=2)" in seen["message"]

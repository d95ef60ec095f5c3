"""Two processes (and once four) on gloo: ranks draw differently, agree on c, and end with the same weights."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).with_name("ddp_script.py")
ROOT = SCRIPT.parents[2]


def two_ranks(folder: Path, strategy: str, every: int, mode: str) -> list[dict[str, Any]]:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(SCRIPT), str(folder), strategy, str(every), mode]
    folder.mkdir(exist_ok=True)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280, cwd=folder)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(file.read_text()) for file in sorted(folder.glob("*.json"))]


@pytest.mark.parametrize("strategy", ["ddp", "model_parallel"])
def test_ranks_draw_differently_and_agree(tmp_path: Path, strategy: str) -> None:
    first, second = two_ranks(tmp_path / "adapt", strategy, 2, "adapt")
    assert (first["rank"], second["rank"]) == (0, 1)
    assert first["rewritten"] >= 1
    assert first["draws"]
    assert not set(first["draws"]) & set(second["draws"])
    assert first["c"] == second["c"] != 6
    assert first["site_c"] == second["site_c"]
    assert 1 <= len(first["site_c"]) <= first["rewritten"]  # layers may share one graph, hence one site
    assert first["counter"] == second["counter"] == 6 * (1 if strategy == "ddp" else 2)
    assert first["variance"] == second["variance"]
    assert first["variance"]["relative_variance"] > 0
    assert first["weights"] == second["weights"]


@pytest.mark.parametrize("strategy", ["ddp", pytest.param("model_parallel", marks=pytest.mark.slow)])
def test_auto_is_the_same_on_all_ranks(tmp_path: Path, strategy: str) -> None:
    first, second = two_ranks(tmp_path / "auto", strategy, 2, "auto")
    probes = first["schedule"]["probes"]
    assert len(probes) == 3
    assert all(p["seconds"] > 0 and p["variance"] > 0 for probe in probes for p in probe["passes"] if not p["full"])
    assert first["schedule"] == second["schedule"]
    assert (first["c"], first["site_c"]) == (second["c"], second["site_c"])
    assert first["variance"] == second["variance"]
    assert first["weights"] == second["weights"]
    assert first["summary"]["kept_per_row"] == second["summary"]["kept_per_row"]


@pytest.mark.parametrize("strategy", ["ddp", "model_parallel", "ddp_find_unused", "ddp_bucket_view", "ddp_static"])
@pytest.mark.slow
def test_probes_change_no_weight(tmp_path: Path, strategy: str) -> None:
    probed, _ = two_ranks(tmp_path / "probed", strategy, 2, "constant")
    plain, _ = two_ranks(tmp_path / "plain", strategy, 0, "constant")
    assert probed["variance"]
    assert not plain["variance"]
    assert probed["weights"] == plain["weights"]
    assert probed["counter"] == plain["counter"]


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["tensor_parallel", "tensor_parallel_fsdp"])
def test_attention_between_dtensors(tmp_path: Path, strategy: str) -> None:
    """Tensor parallel with ``use_local_output=False``, alone and with FSDP2 over two more ranks."""
    runs = {mode: two_ranks(tmp_path / mode, strategy, 0, mode) for mode in ("none", "exact")}
    probed = two_ranks(tmp_path / "probed", strategy, 2, "constant")
    names = [n for n in probed[0]["weights"] if not n.endswith("k_proj.bias")]  # its gradient is rounding

    def distance(first: dict[str, Any], second: dict[str, Any]) -> float:
        return max(abs(a - b) for n in names for a, b in zip(first["weights"][n], second["weights"][n], strict=True))

    assert len(probed) == (4 if strategy == "tensor_parallel_fsdp" else 2)
    assert all(rank["rewritten"] >= 1 for rank in probed)
    assert distance(runs["exact"][0], runs["none"][0]) < 1e-4
    assert distance(probed[0], runs["none"][0]) > 1e-3
    for other in probed[1:]:
        assert other["weights"] == probed[0]["weights"]
        assert not set(other["draws"]) & set(probed[0]["draws"])
    assert probed[0]["variance"]["relative_variance"] > 0
    assert all(rank["variance"] == probed[0]["variance"] for rank in probed)

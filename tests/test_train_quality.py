"""benchmarks/train_quality.py: a run that was killed goes on to what the run without a cut gives."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "benchmarks/train_quality.py"
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not SCRIPT.exists(), reason="no benchmarks beside the tests")]


def start(folder: Path, setting: str = "c30") -> subprocess.Popen[bytes]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(SCRIPT), "--model", "tiny", "--state", str(folder), "--setting", setting]
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def lines(folder: Path) -> list[dict[str, object]]:
    (file,) = folder.glob("*.jsonl")
    return [json.loads(line) for line in file.read_text().splitlines()]


def losses(folder: Path) -> list[object]:
    return [(x["step"], x.get("loss"), x.get("validation")) for x in lines(folder) if "start" not in x]


def test_a_killed_run_goes_on(tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert start(whole).wait() == 0
    process = start(cut)
    while process.poll() is None and not (list(cut.glob("*.ckpt")) and len(losses(cut)) >= 10):
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "it had ended before it could be killed"
    assert start(cut).wait() == 0
    assert [x["step"] for x in lines(cut) if "start" in x][-1] > 0, "it began anew"
    assert losses(cut) == losses(whole)

"""kill -9 at moments of all kinds; the end is bitwise that of a run that nobody disturbed."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parent / "killed_script.py"


def life(folder: Path, where: str, count: int) -> int:
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": f"{SCRIPT.parents[2]}{os.pathsep}{SCRIPT.parent}",
    }
    command = [sys.executable, str(SCRIPT), str(folder), where, str(count)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode in (0, -signal.SIGKILL), done.stderr[-3000:]
    return done.returncode


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_killed_at_20_random_moments(tmp_path: Path) -> None:
    """In a start, a probe, the write of a checkpoint or a step; a run that ends before the 20th kill starts over."""
    choose, kills, ends = random.Random(0), Counter[str](), list[Path]()
    most = {"start": 1, "probe": 3, "checkpoint": 2, "step": 6}
    while not ends or sum(kills.values()) < 20:
        folder = tmp_path / str(len(ends))
        folder.mkdir()
        for where in [*most] * 6 if ends else []:  # the first run is left alone
            if life(folder, where, choose.randint(1, most[where])) == 0:
                break
            kills[where] += 1
        if not (folder / "end.pt").exists():
            assert life(folder, "", 0) == 0
        ends.append(folder / "end.pt")
    print(dict(kills), len(ends) - 1)
    whole, *others = [torch.load(end) for end in ends]
    for other in others:
        assert whole["callback"] == other["callback"]
        for name, value in whole["weights"].items():
            assert torch.equal(value, other["weights"][name]), name

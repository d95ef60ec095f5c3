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


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_killed_at_20_random_moments(tmp_path: Path) -> None:
    """In a start, a probe, the write of a checkpoint or a step; a run that ends before the 20th kill starts over."""
    choose, kills, ends = random.Random(0), Counter[str](), list[Path]()
    most = {"start": 1, "probe": 3, "checkpoint": 2, "step": 6}
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": f"{SCRIPT.parents[2]}{os.pathsep}{SCRIPT.parent}",
    }
    command = [sys.executable, str(SCRIPT)]
    with (
        (tmp_path / "log").open("w") as log,
        subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True
        ) as lives,
    ):
        assert lives.stdin is not None
        assert lives.stdout is not None

        def life(folder: Path, where: str, count: int) -> int:
            print(folder, where, count, sep="\t", file=lives.stdin, flush=True)
            status = int(lives.stdout.readline() or 1)  # type: ignore[union-attr]
            assert status in (0, -signal.SIGKILL), (tmp_path / "log").read_text()[-3000:]
            return status

        while not ends or sum(kills.values()) < 20:
            folder = tmp_path / str(len(ends))
            folder.mkdir()
            for where in [*most] * 6 if ends else []:  # the first run is left alone
                if life(folder, where, choose.randint(1, most[where])) == 0:
                    break
                kills[where] += 1
                print(where, "in run", len(ends), flush=True)
            if not (folder / "end.pt").exists():
                assert life(folder, "-", 0) == 0
            ends.append(folder / "end.pt")
    print(dict(kills), len(ends) - 1)
    whole, *others = [torch.load(end) for end in ends]
    for other in others:
        assert whole["callback"] == other["callback"]
        for name, value in whole["weights"].items():
            assert torch.equal(value, other["weights"][name]), name

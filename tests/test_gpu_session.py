"""benchmarks/gpu_session.py at toy size on the CPU: all stages in their processes, and what a crash leaves."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
STAGES = ("card", "compile", "correct", "headline", "kernels", "tune", "packages")


def session(out: Path, *arguments: str) -> tuple[subprocess.CompletedProcess[str], list[dict[str, Any]]]:
    command = [sys.executable, str(BENCHMARKS / "gpu_session.py"), "--device", "cpu", "--tiny", "--out", str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, env=environment, timeout=200)
    file = out / "rows.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    return done, [row for row in rows if not {"begun", "trying", "ended"} & row.keys()]


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The stages' modules, importable as from the script's own folder."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield
    for name in [x for x in sys.modules if x.partition(".")[0] in ("gpu", "gpu_session")]:
        del sys.modules[name]


# The stage "compile" takes as long as all others together.
@pytest.mark.parametrize("left_out", ["compile", pytest.param("nothing", marks=pytest.mark.slow)])
def test_all_stages(left_out: str, tmp_path: Path) -> None:
    stages = [stage for stage in STAGES if stage != left_out]
    done, rows = session(tmp_path, "--budget", "180", "--stages", ",".join(stages))
    log = (tmp_path / "log.txt").read_text()
    assert done.returncode == 0, done.stdout + done.stderr + log
    assert {row["stage"] for row in rows} == set(stages)
    assert not [row for row in rows if "error" in row], log
    assert all(row["card"].startswith("CPU") for row in rows)
    of = {stage: [row for row in rows if row["stage"] == stage] for stage in stages}

    checks = [row for row in of["correct"] if "ok" in row]
    assert {row["check"] for row in checks} == {"c = inf", "seeds", "mean"}
    assert all(row["ok"] for row in checks)
    means = [row for row in checks if row["check"] == "mean" and row["sampler"] == "systematic"]
    assert all(max(row["noise"]) > 1e-2 for row in means), "nothing was sampled"

    timed = [row for row in of["headline"] if "both_ms" in row]
    assert {"flash", "sus systematic"} <= {row["name"] for row in timed}
    best = [row for row in timed if "ceiling" in row]
    assert all(row["speed_up"] == 1 and row["name"] == row["best_peer"] for row in best)
    assert len(best) == len({(row["n"], row["kind"]) for row in timed})
    kept = [row["kept_per_row"] for row in timed if row["name"] == "sus systematic" and row["c"] == 30]
    assert kept
    assert all(0 < x <= 30 for x in kept)

    for package in ("flash_attn", "flash_attn_interface", "flash_attn.cute", "xformers.ops"):
        notes = {row["note"] for row in of["packages"] if row.get("package") == package}
        assert notes == {"not installed"}
    flex = [row for row in of["packages"] if "ok" in row]
    assert [(row["what"], row["sites"]) for row in flex] == [("documents", ["flex, causal, chunk 100, rewritten"])]
    assert all(row["ok"] for row in flex)

    assert any("sus::attention_backward" in x["kernel"] for row in of["kernels"] for x in row["kernels"])
    timed = [x for x in rows if x["stage"] == "tune" and "backward_ms" in x]
    best = min(timed, key=lambda x: x["backward_ms"])
    assert json.loads((tmp_path / "tuned.json").read_text())[0]["candidate"] == best["candidate"]
    table = (tmp_path / "table.txt").read_text().splitlines()
    assert len(table) <= 61
    assert table[0].startswith("Measured on a CPU")
    assert done.stdout.endswith("\n".join(table) + "\n")


def test_bad_arguments(tmp_path: Path) -> None:
    done, rows = session(tmp_path, "--stages", "card,cards")
    assert done.returncode == 2
    assert "'cards'" in done.stderr
    assert "card, compile, correct, headline, kernels, tune, packages" in done.stderr
    done, rows = session(tmp_path, "--budget", "0")
    assert done.returncode == 2
    assert "--budget" in done.stderr
    assert not rows


CRASHES = """
import os, sys, time
sys.path.insert(0, {benchmarks!r})
from pathlib import Path
from gpu.rows import Session

session = Session("card", "cpu", "CPU", True, Path({out!r}), {deadline})

def hangs():
    yield {{"value": 1}}
    time.sleep(50)

def fails():
    raise ValueError("no such thing")
    yield {{}}

def dies():
    os._exit(9)
    yield {{}}

session.unit("hangs", hangs, limit=0.5)
session.unit("fails", fails)
session.unit("dies", dies)
session.unit("ends", lambda: [{{"value": 2}}])
"""


@pytest.mark.usefixtures("modules")
def test_a_crash_or_a_hang_costs_one_unit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each process goes on with the unit after the one that ended the process before it."""
    import gpu_session
    from gpu.rows import Session, read

    def start(session: Session, log: Path) -> subprocess.Popen[bytes]:
        code = CRASHES.format(benchmarks=str(BENCHMARKS), out=str(session.out), deadline=session.deadline)
        with log.open("ab") as file:
            return subprocess.Popen([sys.executable, "-c", code], stderr=file, start_new_session=True)

    monkeypatch.setattr(gpu_session, "start", start)
    gpu_session.supervise(Session("card", "cpu", "CPU", True, tmp_path, time.time() + 60), tmp_path / "log.txt")
    rows = read(tmp_path / "rows.jsonl")
    assert [row["key"] for row in rows if row.get("begun")] == ["hangs", "fails", "dies", "ends"]
    assert [(row["key"], row["value"]) for row in rows if "value" in row] == [("hangs", 1), ("ends", 2)]
    assert [(row["key"], row["error"]) for row in rows if "error" in row] == [
        ("stage", "its process ended with 1; see log.txt"),
        ("fails", "ValueError: no such thing"),
        ("stage", "its process ended with 9; see log.txt"),
    ]
    assert "in hangs" in (tmp_path / "log.txt").read_text(), "where it hung"


def test_a_time_that_is_over_is_a_row(tmp_path: Path) -> None:
    """The stage's process is ended at its limit, and its rows and the table stay; so do those of an earlier run."""
    done, rows = session(tmp_path, "--budget", "8", "--stages", "correct")
    assert any("note" in row or "error" in row for row in rows)
    assert (tmp_path / "table.txt").read_text() in done.stdout
    done, _ = session(tmp_path, "--budget", "6", "--stages", "card")
    assert (tmp_path / "rows-1.jsonl").exists()


@pytest.mark.usefixtures("modules")
def test_a_contender_that_ended_a_process_is_left_out(tmp_path: Path) -> None:
    from gpu import headline
    from gpu.rows import Session

    session = Session("headline", "cpu", "CPU", True, tmp_path, time.time() + 60)
    assert headline.attempt(session, "k") == ("k", set())
    for row in ({"begun": True}, {"trying": "flash"}, {"trying": "sus tile"}):
        session.write({"key": "k", **row})
    assert headline.attempt(session, "k") == ("k, attempt 2", {"sus tile"})
    for row in ({"begun": True}, {"trying": "flash"}):
        session.write({"key": "k, attempt 2", **row})
    assert headline.attempt(session, "k") == ("k, attempt 3", {"sus tile", "flash"})
    shape = headline.shapes(session)[0]
    names = {row["name"]: row for row in headline.measure(session, shape, {"flash"}, lambda x: None) if "name" in row}
    assert "not run" in names["flash"]["note"]
    assert names["sus systematic"]["best_peer"] == "math"
    for row in ({"begun": True}, {"ended": True}):
        session.write({"key": "k, attempt 3", **row})
    assert headline.attempt(session, "k")[0] == "k, attempt 3", "it is not begun again"


@pytest.mark.usefixtures("modules")
def test_the_checks_see_a_planted_bias() -> None:
    """3% on the weights, a missing draw, or gradients that differ from call to call: each makes its check fail."""
    from gpu import correct
    from gpu.rows import Session

    case = correct.cases(Session("correct", "cpu", "CPU", True, Path(), 0.0))[0]
    call = correct.Call(case, "cpu")
    exact, library = call.exact(), call.library()
    assert correct.at_infinity(call, exact, "systematic")["ok"]
    draw, draws = call.sus, iter(range(1000))

    def biased(sampler: str, c: float, seed: int, state: int = 0) -> list[torch.Tensor]:
        return [x * 1.03 for x in draw(sampler, c, seed, state)]

    def unrepeatable(sampler: str, c: float, seed: int, state: int = 0) -> list[torch.Tensor]:
        return draw(sampler, c, next(draws), state)

    call.sus = biased  # type: ignore[method-assign]
    assert not correct.at_infinity(call, exact, "systematic")["ok"]
    call.sus = unrepeatable  # type: ignore[method-assign]
    assert not correct.equal_seeds(call, "systematic")["ok"]
    call.case = replace(case, seeds=400)
    call.sus = draw  # type: ignore[method-assign]
    right = correct.mean_over_seeds(call, exact, library, "systematic")
    assert right["ok"]
    assert min(right["bias_seen"]) < 0.03
    call.sus = biased  # type: ignore[method-assign]
    assert not correct.mean_over_seeds(call, exact, library, "systematic")["ok"]


@pytest.mark.usefixtures("modules")
def test_a_long_table_keeps_what_decides() -> None:
    from gpu import table

    row = {"card": "x", "key": "k", "n": 8192, "d": 128, "heads": 32, "kv_heads": 32, "kind": "peaked", "c": 30.0}
    times = {"forward_ms": 1.0, "backward_ms": 2.0, "both_ms": 3.0, "speed_up": 1.5}
    rows: list[dict[str, Any]] = [{**row, **times, "stage": "headline", "name": f"sus {i}"} for i in range(40)]
    kernels = {"part": "backward", "total_ms": 1.0, "kernels": [{"kernel": "k", "ms": 1.0}]}
    rows += [{**row, **kernels, "stage": "kernels", "name": "sus"} for _ in range(40)]
    rows += [{**row, "stage": "tune", "error": "late"} for _ in range(9)]
    lines = table.lines(rows)
    assert len(lines) <= table.LINES
    assert sum("sus" in line and "1.50" in line for line in lines) == 40
    assert any("in rows.jsonl" in line for line in lines)
    assert any("late" in line for line in lines)

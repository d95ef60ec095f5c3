"""Everything that a GPU has to say about SUS, in one command and a given time.

    python benchmarks/gpu_session.py --budget 540 --out DIR
    python benchmarks/gpu_session.py --budget 300 --out DIR --stages compile,headline
    python benchmarks/gpu_session.py --device cpu --tiny --out DIR      # shows that the script works

Each stage is a process with a time limit; each row is a line of DIR/rows.jsonl as soon as it is measured, so that a
cut loses nothing. A stage whose process crashes or hangs is started again and goes on with its next unit of work. What
the processes say goes to DIR/log.txt, the table at the end also to DIR/table.txt; docs/gpu-session.md explains it.
The exit status is 1 if a check of gradients failed or a stage wrote nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from gpu import table  # noqa: E402
from gpu.rows import MEASURED, Session, is_result, read  # noqa: E402

# Shares of the time that is left when a stage begins: what one does not use, the later ones get.
WEIGHTS = {"card": 35, "compile": 130, "correct": 110, "headline": 200, "kernels": 40, "tune": 25, "packages": 40}
MODULES = {"compile": "compilation"}
LEAST = 5.0  # seconds without which no stage is started


def device_name(device: str) -> str:
    """Of the driver's tool or the kernel's file, so that this process needs no torch."""
    if device == "cuda":
        if not shutil.which("nvidia-smi"):
            return "CUDA device"
        command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        names = subprocess.run(command, capture_output=True, text=True, check=False).stdout.splitlines()
        return names[0].strip() if names else "CUDA device"
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    model = next((x.split(":", 1)[1].strip() for x in lines if x.startswith("model name")), platform.machine())
    return f"CPU: {model}"


def run_stage(session: Session) -> None:
    """In the stage's own process."""
    importlib.import_module(f"gpu.{MODULES.get(session.stage, session.stage)}").run(session)


def start(session: Session, log: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, __file__, "--run-stage", session.stage, "--deadline", str(session.deadline)]
    command += ["--device", session.device, "--card", session.card, "--out", str(session.out)]
    command += ["--samplers", ",".join(session.samplers)]
    # Stages compile in processes of their own: Inductor's pool beside them would be one pool for each.
    environment = {**os.environ, "TORCHINDUCTOR_COMPILE_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    with log.open("ab") as file:
        return subprocess.Popen(
            command + ["--tiny"] * session.tiny, stdout=file, stderr=file, env=environment, start_new_session=True
        )


def supervise(session: Session, log: Path) -> None:
    """Runs a stage to its end or its deadline, again after a crash as long as each process begins something new."""
    begun = -1
    while time.time() + LEAST < session.deadline and len(session.started()) > begun:
        begun = len(session.started())
        process = start(session, log)
        try:
            code = process.wait(max(1.0, session.deadline - time.time()))
        except subprocess.TimeoutExpired:
            session.write({"key": "stage", "note": "cut: its time was over"})
            return
        finally:
            with contextlib.suppress(ProcessLookupError):  # what it started, too: a fork that hangs holds the device
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        if code == 0:
            return
        session.write({"key": "stage", "error": f"its process ended with {code}; see log.txt"})


def move_old(out: Path) -> None:
    """Rows of an earlier run in the same folder stay, under another name."""
    file, number = out / "rows.jsonl", 1
    while (out / f"rows-{number}.jsonl").exists():
        number += 1
    if file.exists():
        file.rename(out / f"rows-{number}.jsonl")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    gpu = shutil.which("nvidia-smi") is not None or Path("/dev/nvidiactl").exists()
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if gpu else "cpu")
    parser.add_argument("--tiny", action="store_true", help="toy sizes: shows that the script works, and nothing else")
    parser.add_argument("--budget", type=float, default=540, help="seconds for all stages together")
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--stages", default=",".join(WEIGHTS), help=f"some of {','.join(WEIGHTS)}; in this order")
    parser.add_argument("--samplers", default=",".join(MEASURED), help="some of these; one alone saves time")
    for hidden in ("--run-stage", "--card", "--deadline"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    for name, allowed in (("stages", tuple(WEIGHTS)), ("samplers", MEASURED)):
        given = getattr(args, name).split(",")
        setattr(args, name, given)
        if unknown := [x for x in given if x not in allowed]:
            parser.error(f"--{name} must be some of {', '.join(allowed)}, but there is {unknown[0]!r}")
    if args.budget <= 0:
        parser.error(f"--budget must be above 0, but it is {args.budget:g}")
    return args


def main(arguments: list[str] | None = None) -> int:
    end = time.time()
    args = parse(arguments)
    if args.run_stage:
        run_stage(
            Session(
                args.run_stage, args.device, args.card, args.tiny, args.out, float(args.deadline), tuple(args.samplers)
            )
        )
        return 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the stage's processes end, too
    args.out.mkdir(parents=True, exist_ok=True)
    move_old(args.out)
    end += args.budget
    card = device_name(args.device)
    todo = [x for x in WEIGHTS if x in args.stages]
    for i, stage in enumerate(todo):
        left = end - time.time() - 1
        limit = left * WEIGHTS[stage] / sum(WEIGHTS[x] for x in todo[i:])
        session = Session(stage, args.device, card, args.tiny, args.out, time.time() + limit, tuple(args.samplers))
        begin = time.time()
        supervise(session, args.out / "log.txt")
        print(f"{stage}: {time.time() - begin:.0f} s of at most {limit:.0f}", flush=True)
    rows = read(args.out / "rows.jsonl")
    lines = table.lines(rows)
    if args.device == "cpu":
        lines.insert(0, "Measured on a CPU: it says nothing about a GPU.")
    (args.out / "table.txt").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
    wrong = any(row.get("ok") is False for row in rows)
    silent = [x for x in todo if not any(row["stage"] == x and is_result(row) for row in rows)]
    return 1 if wrong or silent else 0


if __name__ == "__main__":
    raise SystemExit(main())

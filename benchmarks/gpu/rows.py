"""What a stage knows of its run, and how it writes: one JSON line per row, as soon as it is known.

Imports no torch: the process that starts the stages stays small and never touches the device.
"""

from __future__ import annotations

import faulthandler
import json
import os
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Row = dict[str, Any]

MEASURED = ("tile", "systematic", "block")  # samplers, the GPU's first; a checkout need not have all of them
RESTART = 75  # exit code of a stage whose CUDA context is broken: what is left needs another process


@dataclass(frozen=True)
class Session:
    """
    Attributes:
        stage: name of the running stage.
        device: "cuda" or "cpu".
        card: name of the device, written into each row.
        tiny: toy sizes, which show that the script works.
        out: folder of rows.jsonl.
        deadline: when the stage is killed, in seconds of `time.time()`.
        samplers: those to be measured, of `MEASURED`.
    """

    stage: str
    device: str
    card: str
    tiny: bool
    out: Path
    deadline: float
    samplers: tuple[str, ...] = MEASURED

    @property
    def file(self) -> Path:
        return self.out / "rows.jsonl"

    def left(self) -> float:
        """Seconds until the stage must have ended, less what ending takes."""
        return self.deadline - time.time() - 2

    def write(self, row: Row) -> None:
        """Appends a row in one system call, so that processes can share the file and a kill leaves whole lines."""
        line = json.dumps({"stage": self.stage, "card": self.card, **row}, default=str) + "\n"
        descriptor = os.open(self.file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(descriptor, line.encode())
        finally:
            os.close(descriptor)

    def own(self) -> list[Row]:
        """The rows of this stage so far, those of its earlier processes with them."""
        return [row for row in read(self.file) if row["stage"] == self.stage]

    def started(self) -> set[str]:
        """Units of this stage that were begun, whether or not they ended."""
        return {row["key"] for row in self.own() if row.get("begun")}

    def within(self, seconds: float) -> None:
        """The process exits in so many seconds, or at the stage's end, from a thread that needs no help of Python's.

        A kernel that never ends would stop everything else. Another call sets the time anew.
        """
        faulthandler.dump_traceback_later(max(0.1, min(seconds, self.left() + 1)), exit=True)

    def unit(self, key: str, measure: Callable[[], Iterable[Row]], limit: float = 120) -> None:
        """Writes the rows that `measure` yields; an error is a row too.

        Past `limit` seconds the process exits (see `within`); after an error that broke the CUDA context it exits with
        `RESTART`. In both cases the stage is started again and goes on with the next unit.
        """
        if key in self.started():
            return
        if self.left() < 1:
            self.write({"key": key, "note": "not run: no time left"})
            return
        self.write({"key": key, "begun": True})
        self.within(limit)
        begin = time.time()
        try:
            for row in measure():
                self.write({"key": key, **row})
        except Exception as error:
            self.write({"key": key, "error": describe(error), "seconds": round(time.time() - begin, 1)})
            if broken():
                sys.exit(RESTART)
        finally:
            faulthandler.cancel_dump_traceback_later()
        self.write({"key": key, "ended": True})


def describe(error: BaseException) -> str:
    first = next((line for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {first[:200]}"


def broken() -> bool:
    """Whether the CUDA context has met an error that stays."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
    except Exception:
        return True
    return False


MARKS = {"begun", "trying", "ended"}  # rows that say where a process is; all others are results


def is_result(row: Row) -> bool:
    return not MARKS & row.keys()


def read(file: Path) -> list[Row]:
    """The rows of a file; a line that a kill cut short is left out."""
    rows = []
    for line in file.read_text().splitlines() if file.exists() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows

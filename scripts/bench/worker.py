"""A contender in a process of its own, kept alive and driven in turn: it times one call and
measures its peak memory.
"""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import contenders


@dataclass(frozen=True)
class Measured:
    """One call of a contender."""

    seconds: float
    # resident memory at its highest above what stood before; means something of a trimmed call
    # alone
    peak_bytes: int
    value: float  # what the call computed (a loss), to compare


IMPORTED_ONCE = (
    "contenders",
    "steps",
    "peft.tuners.lora",
    "trl",
    "lorakit.lora.inject",
    "lorakit.loss.head",
)


class Worker:
    """Starts ``contenders.BUILDERS[kind]`` with ``settings`` in a new process.

    It is forked from a server that has imported the libraries and done nothing with them: an import
    takes longer than many a row.
    """

    def __init__(self, kind: str, settings: dict[str, Any], threads: int) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(list(IMPORTED_ONCE))  # what is not installed is passed over
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(
            target=_serve, args=(theirs, kind, settings, threads), daemon=True
        )
        self._process.start()
        theirs.close()  # a process that dies is the end of the pipe then, which is waited for else
        self.problem: str | None = self._receive()

    def call(self, *, trim: bool = False) -> Measured:
        """Run the contender once; with ``trim``, after memory that earlier calls freed has been
        given back to the system.

        The C library keeps freed memory and a later call takes it again without a trace in the
        resident size, so that a peak is told from a trimmed call alone; and its time is not, as
        every page is then faulted in anew.
        """
        result = self._receive("trim" if trim else "go")
        if isinstance(result, str):
            raise RuntimeError(result)
        return result

    def _receive(self, asked: str | None = None) -> Any:
        try:
            if asked:
                self._pipe.send(asked)
            return self._pipe.recv()
        except (EOFError, OSError):
            self._process.join()
            raise RuntimeError(
                f"a contender's process has ended with exit code {self._process.exitcode}"
            ) from None

    def stop(self) -> None:
        self._process.terminate()
        self._process.join()


def _serve(pipe: Connection, kind: str, settings: dict[str, Any], threads: int) -> None:
    import torch

    torch.set_num_threads(threads)
    try:
        run = contenders.BUILDERS[kind](**settings)
    except ImportError as error:
        pipe.send(f"not installed: {error}")
        return
    pipe.send(None)
    while True:
        if pipe.recv() == "trim":
            gc.collect()
            ctypes.CDLL("libc.so.6").malloc_trim(0)
        before = _reset_peak()
        start = time.perf_counter()
        try:
            value = run()
        except Exception as error:  # told to the driver, which stops
            pipe.send(f"{kind} {settings}: {type(error).__name__}: {error}")
            return
        seconds = time.perf_counter() - start
        pipe.send(Measured(seconds, _status("VmHWM") - before, float(value)))


def _reset_peak() -> int:
    """Make the highest resident memory the present one (Linux, /proc/PID/clear_refs) and return
    it.
    """
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _status(field: str) -> int:
    line = next(
        line
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith(field)
    )
    return int(line.split()[1]) * 1024

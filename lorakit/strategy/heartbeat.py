"""A watcher beside each process: it notices one that is killed, stalled, cut off or stuck, says so,
and ends its own.

torchrun's agent sees only that a process of its own has ended. A process that is stopped, or a
machine that is gone, leaves the others waiting in a collective operation, until a timeout that
names nobody. So each process forks a watcher, which needs neither its interpreter nor its network:
the watchers tell one another twice a second, through a store of their own, that they and their
processes live. A process that is busy for minutes, loading or writing, is alive; only a step has a
limit.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import mmap
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import lightning as L
import torch.distributed as dist

BEAT_S = 0.5
STALLED_S = 10.0  # how long a process may be stopped
SILENT_S = 20.0  # of a watcher, after which its machine or the network counts as gone
# how long a process may outlive one that has ended: it has its own error to report
GRACE_S = 10.0
FINISHED = "finished"  # the phase after which a process may end
# environment: where a watcher writes what it has found, for who started the processes
FAULT_FILE = "LORAKIT_FAULT_FILE"
_PAGE = 4096


@dataclass(frozen=True)
class Heartbeat:
    """What a watcher says of its process."""

    number: int
    host: str
    phase: str
    seconds: float  # in this phase

    def describe(self, rank: int) -> str:
        return f"{describe_rank(rank, self.host)} in {self.phase} for {self.seconds:.0f} s"


class Phases:
    """What this process is doing, where its watcher can read it: in memory that both share."""

    def __init__(self) -> None:
        self._page = mmap.mmap(-1, _PAGE)

    def enter(self, phase: str) -> None:
        """Say that a new phase has begun."""
        text = json.dumps([phase, time.monotonic()]).encode()
        # one copy: a reader that comes between sees JSON that is torn, and reads again
        self._page[:] = text.ljust(_PAGE)

    def read(self) -> tuple[str, float]:
        """Return the phase and how many seconds it lasts."""
        try:
            phase, since = json.loads(self._page[:].rstrip(b" \0") or b'["start", 0]')
        except ValueError:
            return "?", 0.0
        return phase, time.monotonic() - since if since else 0.0


PHASES = Phases()


class PhaseCallback(L.Callback):
    """Tells the watcher what the process is doing."""

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        PHASES.enter("the data")

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        PHASES.enter(f"step {trainer.global_step + 1}, forward")

    def on_before_backward(self, trainer: L.Trainer, pl_module: Any, loss: Any) -> None:
        PHASES.enter(f"step {trainer.global_step + 1}, backward")

    def on_after_backward(self, trainer: L.Trainer, pl_module: Any) -> None:
        PHASES.enter(f"step {trainer.global_step + 1}, optimiser")

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        PHASES.enter("callbacks, checkpoint or data")

    def on_validation_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        PHASES.enter("evaluation")

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        PHASES.enter("the end of the run")


def start(rank: int, size: int, *, step_limit_s: float) -> Callable[[str, int], None]:
    """Fork this process's watcher; return what tells it (host, port) of the watchers' store, once
    that is agreed on.

    Called before anything starts threads: a fork takes only the thread that forks.
    """
    reader, writer = os.pipe()
    parent = os.getpid()
    if os.fork() == 0:
        os.close(writer)
        # Ctrl-C is for the process, which decides when it ends
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        try:
            address = os.read(reader, _PAGE)  # nothing, where the process ended before
            if address:
                host, port = json.loads(address)
                _Watcher(parent, rank, size, step_limit_s, host, port).run()
        finally:
            os._exit(0)
    os.close(reader)

    def tell(host: str, port: int) -> None:
        os.write(writer, json.dumps([host, port]).encode())
        os.close(writer)

    return tell


def describe_rank(rank: int, host: str | None = None) -> str:
    """Return ``rank 3 (host n2)``; of this machine where no host is given."""
    return f"rank {rank} (host {host or socket.gethostname()})"


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as found:
        found.bind(("", 0))
        return int(found.getsockname()[1])


class _Watcher:
    """The loop of a watcher. It ends with its process, or ends it."""

    def __init__(
        self, parent: int, rank: int, size: int, step_limit_s: float, host: str, port: int
    ) -> None:
        self.parent, self.rank, self.size, self.step_limit_s = parent, rank, size, step_limit_s
        wait = datetime.timedelta(seconds=60)
        self.store = dist.TCPStore(
            host, port, is_master=rank == 0, wait_for_workers=False, timeout=wait
        )
        self.store.set_timeout(datetime.timedelta(seconds=SILENT_S))
        self.number, self.listened = 0, time.monotonic()
        # when the store last did: an operation on a network that is cut never returns
        self.answered = time.monotonic()
        self.stopped_since: float | None = None
        # rank -> number of its last beat, and when it came
        self.heard: dict[int, tuple[int, float]] = {}
        self.beats: dict[int, Heartbeat] = {}

    def run(self) -> None:
        # a store's operation never returns where the network is cut, whatever its timeout
        threading.Thread(target=self.talk, daemon=True).start()
        looked = time.monotonic()
        while self.is_needed():
            now = time.monotonic()
            if now - looked > SILENT_S / 4:  # this watcher was itself stopped
                self.answered = now
            looked = now
            if now - self.answered > SILENT_S:
                self.lose(f"no answer for {SILENT_S:.0f} s")
            time.sleep(BEAT_S)
        farewell = threading.Thread(target=self.say_farewell, daemon=True)
        farewell.start()
        farewell.join(BEAT_S)
        if self.rank == 0:
            time.sleep(3 * BEAT_S)  # the store is here; let the others read

    def talk(self) -> None:
        """Tell and hear, over and over."""
        while self.is_needed():
            try:
                self.beat()
                self.listen()
            except (RuntimeError, OSError) as error:
                # the store is gone, and with it the first process or the way to it
                self.lose(str(error))
            self.answered = time.monotonic()
            time.sleep(BEAT_S)

    def say_farewell(self) -> None:
        with contextlib.suppress(RuntimeError, OSError):
            self.store.set(f"gone/{self.rank}", PHASES.read()[0])

    def is_needed(self) -> bool:
        return os.getppid() == self.parent

    def lose(self, reason: str) -> None:
        """The store cannot be reached; where the run has not finished the process is ended,
        unless it ends by itself.
        """
        first = self.beats.get(0)
        end = time.monotonic() + GRACE_S
        while time.monotonic() < end:
            has_finished = FINISHED in (PHASES.read()[0], first and first.phase)
            if has_finished or not self.is_needed():
                os._exit(0)
            time.sleep(BEAT_S)
        where = describe_rank(0, first.host) if first else "rank 0"
        own, cause = describe_rank(self.rank), "its machine or the network is gone"
        self.end(f"{own} cannot reach {where}: {cause} ({reason})", tells=False)

    def beat(self) -> None:
        """Tell the others; end the process where it is stopped, or its step takes too long."""
        phase, seconds = PHASES.read()
        self.number += 1
        beat = [self.number, socket.gethostname(), phase, seconds]
        self.store.set(f"beat/{self.rank}", json.dumps(beat))
        now = time.monotonic()
        if now - self.listened > SILENT_S / 4:
            self.stopped_since = None
        self.stopped_since = (self.stopped_since or now) if _is_stopped(self.parent) else None
        if self.stopped_since and now - self.stopped_since > STALLED_S:
            own = describe_rank(self.rank)
            self.end(f"{own} is stalled: it has been stopped for {STALLED_S:.0f} s, in {phase}")
        if phase.startswith("step") and seconds > self.step_limit_s:
            where = "; ".join(one.describe(rank) for rank, one in sorted(self.beats.items()))
            self.end(
                f"a step has not ended in launch.collective_timeout_seconds={self.step_limit_s:g}:"
                f" {where}"
            )

    def listen(self) -> None:
        """Hear the others; end the process where one has ended, or is not heard of."""
        now = time.monotonic()
        # this watcher was itself stopped, with the whole job, say: nobody can be blamed
        if now - self.listened > SILENT_S / 4:
            self.heard.clear()
        self.listened = now
        for rank in range(self.size):
            if self.store.check([f"fault/{rank}"]):
                self.end(self.store.get(f"fault/{rank}").decode(), tells=False)
            if not self.store.check([f"beat/{rank}"]):
                continue  # not here yet
            beat = Heartbeat(*json.loads(self.store.get(f"beat/{rank}")))
            self.beats[rank] = beat
            number, since = self.heard.get(rank, (-1, now))
            self.heard[rank] = (beat.number, now if beat.number != number else since)
            silence = now - self.heard[rank][1]
            if self.store.check([f"gone/{rank}"]):
                phase = self.store.get(f"gone/{rank}").decode()
                if phase != FINISHED and silence > GRACE_S:
                    self.end(f"{describe_rank(rank, beat.host)} has ended, in {phase}")
            elif silence > SILENT_S:
                self.end(
                    f"{beat.describe(rank)} has not been heard of for {SILENT_S:.0f} s: its machine"
                    " or the network is gone"
                )

    def end(self, reason: str, *, tells: bool = True) -> NoReturn:
        """Say why, and end the process, which may be in no state to end itself."""
        if tells:
            with contextlib.suppress(RuntimeError, OSError):
                self.store.set(f"fault/{self.rank}", reason)
        _report(reason)
        os.kill(self.parent, signal.SIGKILL)
        if self.rank == 0:
            time.sleep(3 * BEAT_S)
        os._exit(0)


def take_fault() -> str | None:
    """Return, and remove, what a watcher has written for the process that started the others."""
    path = Path(os.environ.get(FAULT_FILE) or "/")
    if not path.is_file():
        return None
    reason = path.read_text(encoding="utf-8")
    path.unlink()
    return reason


def _report(reason: str) -> None:
    """Say ``reason`` once for this machine: in the file that the starting process reads, else on
    standard error.
    """
    path = os.environ.get(FAULT_FILE)
    if path is None:
        print(f"lorakit: {reason}", file=sys.stderr, flush=True)
        return
    try:
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
    except OSError:
        return  # another watcher was first
    with os.fdopen(descriptor, "w") as file:
        file.write(reason)


def _is_stopped(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8") as file:
            return file.read().rpartition(")")[2].split()[0] in ("T", "t")
    except (OSError, IndexError):
        return False

"""The processes that run a service together: the first takes requests, the others do what it does.

Everything that changes a worker is a command, a method's name and its arguments, which all
processes execute in the same order. One process alone sends nothing.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable
from typing import Any

from lorakit.errors import LorakitError, TrainingError
from lorakit.strategy.world import World, broadcast_object, current_world, join

log = logging.getLogger("lorakit")
# after which the first process says that it is there, and finds out whether the others are
KEEP_ALIVE_SECONDS = 5.0


class Executor:
    """This process among those of the service.

    Args:
        open_replica: makes what commands are executed on, by its key; every process has its own.
    """

    def __init__(
        self, open_replica: Callable[[str], Any], *, device: str, timeout_seconds: float = 600.0
    ) -> None:
        self.world: World = current_world()
        if self.world.size > 1:
            join(self.world, device=device, timeout_seconds=timeout_seconds)
        self.problem: BaseException | None = None
        self.on_problem: list[Callable[[BaseException], None]] = []
        self._open_worker = open_replica
        self._replicas: dict[str, Any] = {}
        self._lock = threading.RLock()  # commands of several engines come one after the other
        self._ended = threading.Event()
        if self.world.size > 1 and self.world.is_rank_zero:
            threading.Thread(target=self._keep_alive, name="lorakit-executor", daemon=True).start()

    @property
    def size(self) -> int:
        return self.world.size

    def open(self, key: str) -> Any:
        """Return this process's worker ``key``, which every process makes at the first time."""
        with self._lock:
            if key not in self._replicas:
                self._send(("open", key, "", ()))
                self._replicas[key] = self._open_worker(key)
            return self._replicas[key]

    def do(self, key: str, method: str, *args: Any) -> Any:
        """Execute a method of worker ``key`` in every process, and return what it returned here.

        Raises:
            LorakitError: what the method raised, in every process; they continue.
            TrainingError: another process is gone, and so all end.
        """
        with self._lock:
            self._send(("do", key, method, args))
            try:
                return getattr(self._replicas[key], method)(*args)
            except LorakitError:
                raise
            except Exception as error:
                if self.size > 1:  # the others may be waiting in the middle of it
                    self._fail(error)
                raise

    def follow(self) -> None:
        """Execute what the first process says until it ends. What goes wrong here ends this
        process, and so all of them.
        """
        while True:
            command: Any = broadcast_object(None)
            kind, key, method, args = command
            if kind == "end":
                return
            if kind == "open":
                self._replicas[key] = self._open_worker(key)
            elif kind == "do":
                try:
                    getattr(self._replicas[key], method)(*args)
                except LorakitError as error:
                    # the first process has it too, and tells the caller
                    log.debug("%s: %s", method, error)

    def end(self) -> None:
        """Let the others go."""
        self._ended.set()
        with self._lock:
            if self.size > 1 and self.problem is None and self.world.is_rank_zero:
                self._send(("end", "", "", ()))

    def _send(self, command: tuple[str, str, str, tuple[Any, ...]]) -> None:
        if self.problem is not None:
            raise TrainingError(f"the processes of this service have ended: {self.problem}")
        if self.size == 1:
            return
        try:
            broadcast_object(command)
        except Exception as error:
            self._fail(error)
            raise TrainingError(f"another process of this service is gone: {error}") from error

    def _fail(self, error: BaseException) -> None:
        if self.problem is None:
            self.problem = error
            for tell in self.on_problem:
                tell(error)

    def _keep_alive(self) -> None:
        while not self._ended.wait(KEEP_ALIVE_SECONDS) and self.problem is None:
            with self._lock:
                if self._ended.is_set():
                    return
                try:
                    self._send(("noop", "", "", ()))
                except LorakitError:
                    return


def leave() -> None:
    """End a process that has followed to the end: its program is the first process's."""
    logging.shutdown()
    os._exit(0)

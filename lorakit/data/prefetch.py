"""Items made ahead in a thread, while the step computes: a device does not wait for the tokenizer."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Iterator
from typing import Any, TypeVar

Item = TypeVar("Item")
_END = object()


def prefetch(items: Iterator[Item], depth: int = 2) -> Iterator[Item]:
    """Yield ``items`` in their order, ``depth`` of them made ahead. What making them raises is raised where they are asked for.

    Closing the generator ends the thread.
    """
    ready: queue.Queue[tuple[Any, BaseException | None]] = queue.Queue(maxsize=depth)
    closed = threading.Event()

    def put(item: Any, error: BaseException | None = None) -> None:
        while not closed.is_set():
            with contextlib.suppress(queue.Full):
                ready.put((item, error), timeout=0.1)
                return

    def work() -> None:
        try:
            for item in items:
                put(item)
                if closed.is_set():
                    return
        except BaseException as error:
            put(_END, error)
        else:
            put(_END)

    thread = threading.Thread(target=work, name="lorakit-prefetch", daemon=True)
    thread.start()
    try:
        while True:
            item, error = ready.get()
            if error is not None:
                raise error
            if item is _END:
                return
            yield item
    finally:
        closed.set()

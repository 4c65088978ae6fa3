"""Items made ahead in a thread, so that a device does not wait for the tokenizer."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Iterator
from typing import Any, TypeVar

Item = TypeVar("Item")
_END = object()


def prefetch(items: Iterator[Item], depth: int = 2) -> Iterator[Item]:
    """Yield ``items`` in their order, ``depth`` of them made ahead. What making them raises is
    raised where they are asked for.

    Closing the generator ends the thread, and so does the end of the program, which waits for it: a
    thread that is torn down in the middle of a native call aborts the process.
    """
    ready: queue.Queue[tuple[Any, BaseException | None]] = queue.Queue(maxsize=depth)
    closed = threading.Event()

    def is_wanted() -> bool:
        return not closed.is_set() and threading.main_thread().is_alive()

    def put(item: Any, error: BaseException | None = None) -> None:
        while is_wanted():
            with contextlib.suppress(queue.Full):
                ready.put((item, error), timeout=0.1)
                return

    def work() -> None:
        try:
            for item in items:
                put(item)
                if not is_wanted():
                    return
        except BaseException as error:
            put(_END, error)
        else:
            put(_END)

    threading.Thread(target=work, name="lorakit-prefetch").start()
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

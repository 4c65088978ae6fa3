"""Items made ahead: the same items, the same errors, and no thread left behind."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest

from lorakit.data.batch.prefetch import prefetch


def test_items_come_in_order_and_are_made_ahead() -> None:
    made: list[int] = []

    def items() -> Iterator[int]:
        for number in range(6):
            made.append(number)
            yield number

    stream = prefetch(items(), depth=2)
    assert next(stream) == 0
    deadline = time.monotonic() + 10
    while len(made) < 3 and time.monotonic() < deadline:
        time.sleep(0.001)
    assert 3 <= len(made) <= 4  # two wait, one is in hand
    assert list(stream) == [1, 2, 3, 4, 5]


def test_what_making_raises_is_raised_behind_the_items_before_it() -> None:
    def items() -> Iterator[int]:
        yield 1
        raise ValueError("row 2")

    stream = prefetch(items())
    assert next(stream) == 1
    with pytest.raises(ValueError, match="row 2"):
        next(stream)


def test_closing_ends_the_thread() -> None:
    before = {*threading.enumerate()}  # others of this process may end meanwhile
    stream = prefetch(iter(range(1_000_000)))
    assert next(stream) == 0
    (thread,) = (
        one for one in threading.enumerate() if one not in before and one.name == "lorakit-prefetch"
    )
    stream.close()
    thread.join(10)
    assert not thread.is_alive()


def test_a_program_ends_while_items_wait() -> None:
    code = (
        "import itertools; from lorakit.data.batch.prefetch import prefetch; stream ="
        " prefetch(itertools.count()); print(next(stream)); raise KeyboardInterrupt"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert (
        done.stdout == "0\n"
        and done.returncode in (1, 130, -2)
        and "terminate called" not in done.stderr
    )

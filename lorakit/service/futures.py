"""What a call returns at once: a result to wait for, with or without asyncio."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Generator
from concurrent.futures import Future
from typing import Any, Generic, Self, TypeVar

Result = TypeVar("Result")


class APIFuture(Generic[Result]):
    """The result of a call that is queued: ``.result()``, ``await``, or ``.result_async()``.
    Errors are raised there.
    """

    def __init__(self, future: Future[Any], convert: Callable[[Any], Result] | None = None) -> None:
        self._future, self._convert = future, convert

    def result(self, timeout: float | None = None) -> Result:
        """Wait, at most ``timeout`` seconds, and return the result. Raises TimeoutError, or what
        the call raised.
        """
        return self._converted(self._future.result(timeout))

    async def result_async(self, timeout: float | None = None) -> Result:
        """The same for asyncio."""
        waiting = asyncio.shield(asyncio.wrap_future(self._future))
        return self._converted(await asyncio.wait_for(waiting, timeout))

    def __await__(self) -> Generator[Any, None, Result]:
        return self.result_async().__await__()

    async def coroutine(self) -> Result:
        """This future for what takes a coroutine only, ``asyncio.create_task``, say."""
        return await self

    def future(self) -> Future[Any]:
        """The ``concurrent.futures.Future`` that it wraps."""
        return self._future

    def done(self) -> bool:
        """Whether waiting would return at once."""
        return self._future.done()

    def _converted(self, found: Any) -> Result:
        return self._convert(found) if self._convert else found


class AsFuture:
    """Lets a client be used where the public SDK returns a future of one."""

    def result(self, timeout: float | None = None) -> Self:
        return self

    async def result_async(self, timeout: float | None = None) -> Self:
        return self

    def __await__(self) -> Generator[Any, None, Self]:
        return self.result_async().__await__()


def finished(value: Any) -> Future[Any]:
    """Return a future that has ``value`` already."""
    future: Future[Any] = Future()
    future.set_result(value)
    return future

"""Results by request: finished ones are in the database before they are sent, so that a killed
server still has them.
"""

from __future__ import annotations

import asyncio
import datetime
import json
import logging
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass, field
from typing import Any

from lorakit.errors import LorakitError, TrainingError
from lorakit.service.database import Database, now
from lorakit.service.engine import EngineEnded
from lorakit.service.futures import finished
from lorakit.service.http import codec

log = logging.getLogger("lorakit")
KEPT_HOURS = 24.0
_AS_JSON = {
    "ForwardBackwardOutput": codec.forward_backward_as_json,
    "SampleResponse": codec.sample_response_as_json,
}
Encode = Callable[[Any], tuple[str, bytes]]  # what a call gave -> kind and payload


@dataclass(frozen=True)
class Answer:
    """A finished request's payload: JSON, or a protobuf message of this kind."""

    kind: str
    payload: bytes
    # else the server has ended before: a new one does not know the request, and the SDK sends it
    # again
    is_final: bool = True

    def body(self, *, accepts_protobuf: bool) -> tuple[str, bytes]:
        """Return media type and bytes."""
        if self.kind == "json":
            return "application/json", self.payload
        if accepts_protobuf:
            return "application/x-protobuf", self.payload
        return "application/json", json.dumps(_AS_JSON[self.kind](self.payload)).encode()


@dataclass(eq=False)
class PendingRequest:
    """A request that was accepted."""

    request_id: str
    owner: str
    answer: Answer | None = None
    future: Future[Any] | None = None  # of the work, once it is given out
    waiters: set[asyncio.Future[None]] = field(default_factory=set)
    is_written: bool = True  # whether the database has the answer


class PendingRequests:
    """All pending requests of a server. Methods are called in the event loop, but for ``settle``'s
    work, which has a thread.
    """

    def __init__(self, database: Database) -> None:
        self.database = database
        self.num_open = 0  # requests that are not finished
        # by (owner, request): clients choose their ids, and see their own only
        self._pending: dict[tuple[str, str], PendingRequest] = {}
        self._done = queue.SimpleQueue[tuple[PendingRequest, Encode, Any] | None]()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._writer = threading.Thread(target=self._write, name="lorakit-results", daemon=True)

    def start(self) -> None:
        """Begin, in the event loop that will ask."""
        self._loop = asyncio.get_running_loop()
        self._writer.start()

    def stop(self) -> None:
        """End when what is finished is written."""
        self._done.put(None)
        self._writer.join(10)

    def open(self, request_id: str, owner: str) -> tuple[PendingRequest, bool]:
        """Return the request, and whether it is new: one that comes again is the same."""
        if (owner, request_id) in self._pending:
            return self._pending[owner, request_id], False
        found = self.database.result(request_id, owner)
        request = self._pending[owner, request_id] = PendingRequest(request_id, owner)
        if found is None:
            self.num_open += 1
        else:  # of before a restart
            request.answer = Answer(found.kind, found.payload)
        return request, found is None

    def settle(self, request: PendingRequest, future: Future[Any], encode: Encode) -> None:
        """Let ``request`` be what ``future`` gives, encoded."""
        request.future = future
        future.add_done_callback(lambda done: self._done.put((request, encode, done)))

    def fail(self, request: PendingRequest, message: str, category: str = "user") -> None:
        """Let ``request`` be an error."""
        self.settle(request, finished({"error": message, "category": category}), encode_json)

    def find(self, request_id: str, owner: str) -> PendingRequest | None:
        """Return a pending request of ``owner``, or None where it is not known (any more)."""
        if (request := self._pending.get((owner, request_id))) is not None:
            return request
        if (found := self.database.result(request_id, owner)) is None:
            return None
        return PendingRequest(request_id, owner, Answer(found.kind, found.payload))

    async def wait(self, request: PendingRequest, seconds: float) -> Answer | None:
        """Return the answer, or None where it takes longer than that."""
        if request.answer is None:
            waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            request.waiters.add(waiter)
            try:
                await asyncio.wait_for(waiter, seconds)
            except TimeoutError:
                return None
            finally:
                request.waiters.discard(waiter)
        return request.answer

    def forget(self) -> None:
        """Drop from memory what was finished, and from the database what is older than a day."""
        self._pending = {
            name: p
            for name, p in self._pending.items()
            if p.answer is None or not p.is_written or p.waiters
        }
        self.database.drop_results_before(now() - datetime.timedelta(hours=KEPT_HOURS))
        unwritten = [(p, p.answer) for p in self._pending.values() if p.answer and not p.is_written]
        self.database.add_results(_rows(unwritten))  # raises while the disk is still full
        for request, _ in unwritten:
            request.is_written = True

    # ---- the writer's thread

    def _write(self) -> None:
        while (first := self._done.get()) is not None:
            batch, is_last = [first], False
            while not self._done.empty():
                if (more := self._done.get()) is None:
                    is_last = True
                    break
                batch.append(more)
            self._write_batch(batch)
            if is_last:
                return

    def _write_batch(self, batch: list[tuple[PendingRequest, Encode, Any]]) -> None:
        answers = [(request, _answer(encode, future)) for request, encode, future in batch]
        rows = _rows(answers)
        for attempt in range(3):
            try:
                self.database.add_results(rows)
                break
            except Exception as error:
                log.error("results could not be written (%s)", error)
                time.sleep(0.1 * 4**attempt)
        else:  # a full disk: answers stay in memory, and only a restart loses them
            for request, _ in answers:
                request.is_written = False
        assert self._loop is not None
        self._loop.call_soon_threadsafe(self._tell, answers)

    def _tell(self, answers: list[tuple[PendingRequest, Answer]]) -> None:
        self.num_open -= len(answers)
        for request, answer in answers:
            request.answer, request.future = answer, None
            for waiter in request.waiters:
                if not waiter.done():
                    waiter.set_result(None)


def _rows(answers: list[tuple[PendingRequest, Answer]]) -> list[dict[str, Any]]:
    """What the database keeps of finished requests."""
    finished = now()
    return [
        {
            "request_id": request.request_id,
            "owner": request.owner,
            "kind": answer.kind,
            "payload": answer.payload,
            "finished": finished,
        }
        for request, answer in answers
        if answer.is_final
    ]


def _answer(encode: Encode, future: Future[Any]) -> Answer:
    try:
        return Answer(*encode(future.result()))
    except CancelledError:
        return Answer(*encode_json({"error": "it was cancelled", "category": "user"}))
    except BaseException as error:
        is_users = isinstance(error, LorakitError) and not isinstance(error, TrainingError)
        if not isinstance(error, LorakitError):
            log.error("a request failed", exc_info=error)
        text = str(error) or type(error).__name__
        kind, payload = encode_json({"error": text, "category": "user" if is_users else "server"})
        return Answer(kind, payload, is_final=not isinstance(error, EngineEnded))


def encode_json(value: Any) -> tuple[str, bytes]:
    """Any plain value."""
    return "json", json.dumps(value).encode()


def encode_forward_backward(value: Any) -> tuple[str, bytes]:
    return "ForwardBackwardOutput", codec.write_forward_backward(value)


def encode_sample(value: Any) -> tuple[str, bytes]:
    return "SampleResponse", codec.write_sample_response(value)

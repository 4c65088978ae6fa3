"""What a server holds while it runs: sessions, the order of each model's calls, samplers, keys."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from fastapi import HTTPException

from lorakit.errors import CheckpointError
from lorakit.service.core import Service
from lorakit.service.database import ClientSession, SamplerRow, TrainingRun, now
from lorakit.service.http.keys import ApiKeyStore
from lorakit.service.http.pending import PendingRequests

log = logging.getLogger("lorakit")
# of a session, in memory only: an adapter each; those that were sampled last stay
MAX_SNAPSHOTS = 16
MAX_READ = 16  # of a session, read from checkpoints: one that had to go is read again


@dataclass
class SequenceBuffer:
    """One model's calls, which come in any order and twice, given out by their seq_id, from 1."""

    next_seq_id: int = 1
    held: dict[int, Callable[[], None]] = field(default_factory=dict)

    def put(self, seq_id: int, dispatch: Callable[[], None]) -> None:
        """Give out now, or when all before have come."""
        self.held[seq_id] = dispatch
        while (ready := self.held.pop(self.next_seq_id, None)) is not None:
            self.next_seq_id += 1
            ready()


@dataclass
class Session:
    """A program that is connected."""

    id: str
    owner: str
    has_ended: bool = False
    last_seen: float = field(default_factory=time.monotonic)
    model_ids: set[str] = field(default_factory=set)
    sampler_ids: set[str] = field(default_factory=set)
    # Samplers with an adapter in memory, each whether it is there only; those that were asked last
    # are last.
    holding: dict[str, bool] = field(default_factory=dict)


class ServerState:
    """Everything that routes need."""

    def __init__(
        self,
        service: Service,
        *,
        session_timeout_seconds: float = 600.0,
        max_waiting: int = 16_384,
        max_body_bytes: int = 256 << 20,
        poll_seconds: float = 30.0,
    ) -> None:
        self.service, self.database = service, service.database
        self.pending = PendingRequests(service.database)
        self.completions: set[Future[Any]] = set()  # that OpenAI clients wait for
        self.session_timeout_seconds, self.max_waiting = session_timeout_seconds, max_waiting
        self.max_body_bytes, self.poll_seconds = max_body_bytes, poll_seconds
        self.sessions: dict[str, Session] = {}
        self.order: dict[str, SequenceBuffer] = {}
        # id -> owner, and the future of its Weights
        self.samplers: dict[str, tuple[str, Future[Any]]] = {}
        self.pool = ThreadPoolExecutor(8, thread_name_prefix="lorakit-http")
        self.keys = ApiKeyStore(service.database)
        self._sweeper: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    def start(self) -> None:
        """Begin, in the event loop."""
        self._loop = asyncio.get_running_loop()
        self.pending.start()
        self._sweeper = asyncio.create_task(self._sweep())

    async def stop(self) -> None:
        if self._sweeper is not None:
            self._sweeper.cancel()
        await asyncio.to_thread(self.service.close_engines)
        self.pending.stop()
        self.database.close()

    @property
    def num_waiting(self) -> int:
        """Requests that are not finished."""
        return self.pending.num_open + len(self.completions)

    def refuse_too_many(self, num_more: int = 1) -> None:
        """Raise 429 where this many more would be too many."""
        if self.num_waiting + num_more > self.max_waiting:
            raise HTTPException(
                429, f"{self.max_waiting:,} requests wait already; send it again later"
            )

    # ---- sessions

    def open_session(
        self, owner: str, *, display_name: str | None, user_metadata: dict[str, Any]
    ) -> Session:
        session = Session(secrets.token_hex(8), owner)
        self.sessions[session.id] = session
        self.database.add(
            ClientSession(
                id=session.id,
                owner=owner,
                created=now(),
                ended=None,
                display_name=display_name,
                user_metadata=user_metadata,
            )
        )
        return session

    def session(self, session_id: str, owner: str) -> Session | None:
        """Return an open session of ``owner``, also from before a restart, or None."""
        if (session := self.sessions.get(session_id)) is not None:
            if session.owner != owner:
                return None
            session.last_seen = time.monotonic()
            return session
        row = self.database.get(ClientSession, session_id)
        if row is None or row.owner != owner or row.ended is not None:
            return None
        session = self.sessions[session_id] = Session(session_id, owner)
        return session

    def end_session(self, session: Session) -> None:
        """Free what the session trains and samples, or nothing where that cannot be written."""
        row = self.database.get(ClientSession, session.id)
        if row is not None:  # before held calls are dispatched: they would find it open
            row.ended = now()
            self.database.add(row)
        self.sessions.pop(session.id, None)
        session.has_ended = True
        for model_id in session.model_ids:
            self.drop_model(model_id)
        for sampler_id in session.sampler_ids:
            self.samplers.pop(sampler_id, None)

    async def _sweep(self) -> None:
        """End sessions that nobody has heard of, and forget old results."""
        while True:
            await asyncio.sleep(min(5.0, self.session_timeout_seconds / 4))
            limit = time.monotonic() - self.session_timeout_seconds
            for session in [one for one in self.sessions.values() if one.last_seen < limit]:
                with self._later():
                    self.end_session(session)
            with self._later():
                self.pending.forget()
            for clean in (self.service.checkpoints.delete_expired, self.service.charge_all):
                with self._later():
                    await asyncio.to_thread(clean)

    @staticmethod
    @contextlib.contextmanager
    def _later() -> Iterator[None]:
        """What fails within it, for a full disk, say, is tried again at the next sweep."""
        try:
            yield
        except Exception as error:
            log.error("cleaning up failed: %s", error)

    # ---- models and samplers

    def is_others(self, model_id: str, owner: str) -> bool:
        """Whether a model is known, and another user's."""
        if (model := self.service.trained.get(model_id)) is not None:
            return model.owner != owner
        run = self.database.get(TrainingRun, model_id)
        return run is not None and run.owner != owner

    def drop_model(self, model_id: str) -> None:
        """Free a model after what it was asked; what waits for calls that never came fails with
        that it is gone.
        """
        self.service.drop_model(model_id)
        if (order := self.order.pop(model_id, None)) is not None:
            for dispatch in order.held.values():
                dispatch()

    def drop_if_ended(self, session: Session, model_id: str) -> None:
        """Free a model whose session has ended while it was made. From any thread."""
        if session.has_ended and self._loop is not None:
            with contextlib.suppress(RuntimeError):  # the server has ended, too
                self._loop.call_soon_threadsafe(self.drop_model, model_id)

    def in_background(self, start: Callable[[], Future[Any]]) -> Future[Any]:
        """Return the future of what ``start()`` returns, which another thread calls: a base may
        have to be read first, which takes a while.
        """
        return chained(self.pool.submit(as_future, start), lambda future: future)

    def weights(self, sampler_id: str, owner: str) -> Future[Any]:
        """Return the future of a sampler's Weights. Raises CheckpointError where there is none."""
        if (found := self.samplers.get(sampler_id)) is not None and found[0] == owner:
            session = self.sessions.get(sampler_id.partition(":")[0])
            if session is not None and sampler_id in session.holding:
                session.holding[sampler_id] = session.holding.pop(sampler_id)
            return found[1]
        row = self.database.get(SamplerRow, sampler_id)
        if row is None or row.owner != owner:
            raise CheckpointError(f"there is no sampler {sampler_id}")
        if (session := self.session(row.session_id, owner)) is None:
            raise CheckpointError(
                f"the session of {sampler_id} has ended; make a new sampling client"
            )
        if row.model_path == EPHEMERAL:
            raise CheckpointError(
                f"the weights of {sampler_id} were in memory only, and are gone: {MAX_SNAPSHOTS}"
                " newer ones came, or the server was started anew; save_weights_for_sampler keeps"
                " them on disk"
            )
        future = self.service.weights(base_model=row.base_model, path=row.model_path, owner=owner)
        self._hold(session, sampler_id, future, row.model_path)
        return future

    def add_sampler(
        self,
        session: Session,
        sampler_id: str,
        future: Future[Any],
        *,
        base_model: str,
        model_path: str | None,
    ) -> None:
        """Remember a sampler, whose Weights ``future`` gives."""
        self._hold(session, sampler_id, future, model_path)
        self.database.add(
            SamplerRow(
                id=sampler_id,
                session_id=session.id,
                owner=session.owner,
                base_model=base_model,
                model_path=model_path,
            )
        )

    def _hold(
        self, session: Session, sampler_id: str, future: Future[Any], model_path: str | None
    ) -> None:
        """Keep a sampler's Weights, and let go those of its kind that were not asked for
        longest, where they are too many.
        """
        session.sampler_ids.add(sampler_id)
        self.samplers[sampler_id] = (session.owner, future)
        if model_path is None:  # the base itself
            return
        is_snapshot = session.holding[sampler_id] = model_path == EPHEMERAL
        alike = [name for name, kind in session.holding.items() if kind == is_snapshot]
        for name in alike[: max(0, len(alike) - (MAX_SNAPSHOTS if is_snapshot else MAX_READ))]:
            del session.holding[name]
            self.samplers.pop(name, None)


EPHEMERAL = "memory"  # instead of a sampler's path


def chained(first: Future[Any], then: Callable[[Any], Future[Any]]) -> Future[Any]:
    """Return the future of what ``then`` returns for the result of ``first``, errors of either
    included.

    Cancelling it cancels what ``then`` returned, not ``first``, which others may wait for.
    """
    found: Future[Any] = Future()
    # Emptied in time, so that there is no circle of futures: what they hold, adapters among it,
    # would stay until garbage is collected.
    waiting: list[Future[Any]] = []

    def on_second(done: Future[Any]) -> None:
        waiting.clear()
        if done.cancelled() or not found.set_running_or_notify_cancel():
            return
        if (error := done.exception()) is not None:
            found.set_exception(error)
        else:
            found.set_result(done.result())

    def on_first(done: Future[Any]) -> None:
        try:
            second = then(done.result())
            waiting.append(second)
            found.add_done_callback(
                lambda done: [one.cancel() for one in waiting] if done.cancelled() else None
            )
            second.add_done_callback(on_second)
        except BaseException as error:
            if found.set_running_or_notify_cancel():
                found.set_exception(error)

    first.add_done_callback(on_first)
    return found


def as_future(start: Callable[[], Future[Any]]) -> Future[Any]:
    """Return ``start()``, or a future of what it raises: pending requests must be settled."""
    try:
        return start()
    except Exception as error:
        failed: Future[Any] = Future()
        failed.set_exception(error)
        return failed

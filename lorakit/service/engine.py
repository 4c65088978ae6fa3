"""Runs what clients ask of one base: each model's calls in their order, those of different models
together where they can be.

One thread owns the base. Calls come from any thread and return futures; an error arrives in the
call's own future, and what was queued after it continues.
"""

from __future__ import annotations

import atexit
import collections
import contextlib
import itertools
import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import psutil
import torch

from lorakit.errors import LorakitError, TrainingError
from lorakit.sampling.request import Request, SampledSequence
from lorakit.service.base import Base
from lorakit.service.executor import Executor
from lorakit.service.forward_request import ForwardRequest
from lorakit.service.worker import SampleOrder, Worker

log = logging.getLogger("lorakit")
MAX_TOGETHER = 16  # calls in one pass
MAX_RANK_TOGETHER = 512  # summed over the adapters of a pass: each token meets the columns of all
LINGER_SECONDS = 0.002  # for other models' calls to come, where several have called lately
RECENT_SECONDS = 1.0
# after which an idle engine looks for snapshots that nobody holds: finalisers may not wake it
DROP_SECONDS = 1.0


class EngineEnded(TrainingError):
    """What was asked will not be done: the engine has ended before."""


@dataclass
class Usage:
    """What a model has cost so far."""

    tokens: int = 0
    seconds: float = 0.0
    calls: int = 0
    calls_charged: int = 0  # of them, those that the database knows of


@dataclass
class _Task:
    """A call that waits: a ForwardRequest, or anything else as a function."""

    model_id: str
    name: str
    number: int
    prepare: Callable[[], ForwardRequest] | None
    run: Callable[[], Any] | None
    future: Future[Any] = field(default_factory=Future)
    request: ForwardRequest | None = None


@dataclass
class _Asked:
    """A request that waits to be sampled."""

    number: int
    make: Callable[[], SampleOrder]
    future: Future[Any]
    each: Callable[[SampledSequence], None] | None


class Engine:
    """Runs one base, and everything that is trained and sampled on it. Only the executor's
    first process has engines.
    """

    def __init__(self, executor: Executor, key: str) -> None:
        self.executor, self.key = executor, key
        self.usage: dict[str, Usage] = collections.defaultdict(Usage)
        self._queues: dict[str, collections.deque[_Task]] = {}
        self._asked: collections.deque[_Asked] = collections.deque()
        self._cancelled: collections.deque[int] = collections.deque()
        # snapshots that nobody holds; appended by finalisers, anywhere
        self.dropped: collections.deque[str] = collections.deque()
        self._sampling: dict[int, Future[Any]] = {}
        self._last_call: dict[str, float] = {}
        self._numbers = itertools.count()
        self._changed = threading.Condition()
        self._problem: BaseException | None = None
        self._is_closed = False
        opened: Future[Worker] = Future()
        self._thread = threading.Thread(
            target=self._serve, args=(opened,), name="lorakit-engine", daemon=True
        )
        self._thread.start()
        # A program that ends without closing: in the middle of torch the thread would bring the
        # interpreter down with it.
        atexit.register(self.close)
        try:
            self.worker = opened.result()
        except Exception:
            atexit.unregister(self.close)
            raise
        executor.on_problem.append(self._end_by)

    @property
    def base(self) -> Base:
        return self.worker.base

    @property
    def problem(self) -> str | None:
        """What ended it; None while it runs, or was closed."""
        return None if self._problem is None else str(self._problem) or type(self._problem).__name__

    def do(self, method: str, *args: Any) -> Any:
        """Execute a method of the worker in every process; in the engine's own thread, that is
        inside of a call.
        """
        return self.executor.do(self.key, method, *args)

    # ---- asking, from any thread

    def submit(self, model_id: str, name: str, run: Callable[[], Any]) -> Future[Any]:
        """Queue ``run`` after what ``model_id`` has asked before; its result, or error, arrives
        in the future.
        """
        return self._put(_Task(model_id, name, next(self._numbers), None, run))

    def submit_request(
        self, model_id: str, name: str, prepare: Callable[[], ForwardRequest]
    ) -> Future[Any]:
        """Queue a request, which may go through the base with those of other models. ``prepare``
        is called when its turn comes.
        """
        return self._put(_Task(model_id, name, next(self._numbers), prepare, None))

    def sample(
        self,
        snapshot_id: str | None,
        make: Callable[[], Request],
        each: Callable[[SampledSequence], None] | None = None,
    ) -> Future[Any]:
        """Let a request join those that are being sampled. Cancelling the future ends it, whenever
        that is.

        Args:
            make: makes the request; called by the engine, so that its errors arrive in the future.
            each: is called with every token, in the engine's thread.
        """
        future: Future[Any] = Future()
        number = next(self._numbers)
        with self._changed:
            if self._is_over:
                future.set_exception(self._ended())
                return future
            self._asked.append(
                _Asked(number, lambda: SampleOrder(number, snapshot_id, make()), future, each)
            )
            self._changed.notify_all()
        future.add_done_callback(
            lambda done: self._cancelled.append(number) if done.cancelled() else None
        )
        return future

    def close(self, timeout_seconds: float = 30.0) -> None:
        """End after what runs now; whatever waits gets an error."""
        atexit.unregister(self.close)
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        if threading.current_thread() is not self._thread:
            self._thread.join(timeout_seconds)

    def _put(self, task: _Task) -> Future[Any]:
        with self._changed:
            if self._is_over:
                task.future.set_exception(self._ended())
                return task.future
            self._queues.setdefault(task.model_id, collections.deque()).append(task)
            if task.prepare is not None:
                self._last_call[task.model_id] = time.monotonic()
            self._changed.notify_all()
        return task.future

    @property
    def _is_over(self) -> bool:
        return self._is_closed or self._problem is not None

    def _ended(self) -> EngineEnded:
        return EngineEnded(f"the engine has ended{f': {self._problem}' if self._problem else ''}")

    # ---- doing, in the engine's own thread

    def _serve(self, opened: Future[Worker]) -> None:
        # The base is read here too: each thread that computes has OpenMP threads of its own, and
        # where these are more than the processors, none of them waits awake for the next product,
        # which is what small products need.
        try:
            opened.set_result(self.executor.open(self.key))
        except BaseException as error:
            opened.set_exception(error)
            return
        try:
            while (tasks := self._next()) is not None:
                while self.dropped:  # before a pass, which may need their memory
                    self.do("drop_snapshot", self.dropped.popleft())
                began = time.perf_counter()
                if tasks:
                    self._run(tasks)
                del tasks  # it holds data and results
                self._sample(min_seconds=time.perf_counter() - began)
        except BaseException as error:
            self._problem = error
            log.exception("the engine has ended")
        with self._changed:
            self._is_closed = True
            left = [task.future for queue in self._queues.values() for task in queue]
            left += [one.future for one in self._asked]
            self._queues.clear()
            self._asked.clear()
        for future in (*left, *self._sampling.values()):
            _fail(future, self._ended())
        self._sampling.clear()

    def _end_by(self, problem: BaseException) -> None:
        """Another process is gone."""
        with self._changed:
            self._problem = self._problem or problem
            self._is_closed = True
            self._changed.notify_all()

    def _sample(self, min_seconds: float) -> None:
        """Sample for as long as training took, or until training is asked for."""
        end = time.perf_counter() + min_seconds
        while True:
            orders, cancelled = self._admit(), []
            while self._cancelled:
                cancelled.append(self._cancelled.popleft())
                self._sampling.pop(cancelled[-1], None)
            if not orders and not cancelled and not self._sampling:
                return
            try:
                if self.base.is_partitioned:  # each process has a part, so all sample
                    finished = self.do("sample", orders, cancelled)
                else:
                    finished = self.worker.sample(orders, cancelled)
            except Exception as error:
                log.exception("sampling failed")
                if not isinstance(error, LorakitError):
                    error = TrainingError(f"sampling failed: {error}")
                self.worker.fail_samples(error)
                finished = [(number, error) for number in self._sampling]
            for number, outcome in finished:
                if (future := self._sampling.pop(number, None)) is not None:
                    _settle(future, outcome)
            if (self._queues and time.perf_counter() > end) or self._is_closed:
                return

    def _admit(self) -> list[SampleOrder]:
        with self._changed:
            asked, self._asked = list(self._asked), collections.deque()
        orders = []
        for one in asked:
            if one.future.cancelled():
                continue
            try:
                orders.append(one.make())
            except Exception as error:
                _fail(one.future, error)
                continue
            self._sampling[one.number] = one.future
            if one.each is not None:
                self.worker.listeners[one.number] = one.each
        return orders

    def _next(self) -> list[_Task] | None:
        """Wait for calls and return those to run now: one, or several Works; none where there is
        only sampling. None: it is over.
        """
        with self._changed:
            while not (
                self._queues or self._asked or self._sampling or self.dropped or self._is_closed
            ):
                self._changed.wait(DROP_SECONDS)
            if self._is_closed:
                return None
            if not self._queues:
                return []
            first = min((queue[0] for queue in self._queues.values()), key=lambda task: task.number)
            if first.prepare is None:
                return [self._take(first.model_id)]
            now = time.monotonic()
            self._last_call = {
                model: last
                for model, last in self._last_call.items()
                if now - last < RECENT_SECONDS
            }
            recent = len(self._last_call)
            waiting = sum(queue[0].prepare is not None for queue in self._queues.values())
        if recent > 1 and waiting < recent:
            time.sleep(LINGER_SECONDS)
        with self._changed:
            heads = sorted((queue[0].number, model_id) for model_id, queue in self._queues.items())
            tasks: list[_Task] = []
            for _, model_id in heads:
                while (
                    (queue := self._queues.get(model_id))
                    and queue[0].prepare is not None
                    and len(tasks) < MAX_TOGETHER
                ):
                    tasks.append(self._take(model_id))
            return tasks

    def _take(self, model_id: str) -> _Task:
        queue = self._queues[model_id]
        task = queue.popleft()
        if not queue:
            del self._queues[model_id]
        return task

    def _run(self, tasks: list[_Task]) -> None:
        tasks = [task for task in tasks if task.future.set_running_or_notify_cancel()]
        for task in tasks:
            if task.prepare is not None:
                try:
                    task.request = task.prepare()
                except Exception as error:
                    _fail(task.future, error)
        for group in self._groups([task for task in tasks if task.request is not None]):
            began, passes = time.perf_counter(), self.worker.runner.num_passes
            if self.base.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(self.base.device)
            try:
                outcomes = self.do("run", [task.request for task in group])
            except Exception as error:
                outcomes = [error] * len(group)
            self._log(group, time.perf_counter() - began, self.worker.runner.num_passes - passes)
            for task, outcome in zip(group, outcomes, strict=True):
                _settle(task.future, outcome)
        for task in tasks:
            if task.run is not None:
                began = time.perf_counter()
                try:
                    outcome = task.run()
                except Exception as error:
                    outcome = error
                self._log([task], time.perf_counter() - began, 0)
                _settle(task.future, outcome)

    def _groups(self, tasks: list[_Task]) -> list[list[_Task]]:
        """Which calls go through the base together: as many as the limits allow, in order."""
        groups: list[list[_Task]] = []
        for task in tasks:
            last = groups[-1] if groups else []
            models = {t.model_id for t in (*last, task)} & self.worker.training_states.keys()
            ranks = [self.worker.training_states[model].layout.spec.rank for model in models]
            is_alone = any(t.request is not None and t.request.is_alone for t in (*last, task))
            if not last or is_alone or sum(ranks) > MAX_RANK_TOGETHER:
                groups.append([])
            groups[-1].append(task)
        return groups

    def _log(self, tasks: list[_Task], seconds: float, num_passes: int) -> None:
        """Log time and memory of calls, and charge each model its share by tokens."""
        tokens = [task.request.num_tokens if task.request else 0 for task in tasks]
        for task, own in zip(tasks, tokens, strict=True):
            if task.model_id not in self.worker.training_states:
                continue
            usage = self.usage[task.model_id]
            usage.tokens += own
            usage.calls += 1
            usage.seconds += seconds * (own / sum(tokens) if sum(tokens) else 1 / len(tasks))
        if log.isEnabledFor(logging.INFO):
            log.info(
                "%s: %d calls of %d models, %s tokens, %d base forwards, %.4f s, %.0f MB",
                tasks[0].name,
                len(tasks),
                len({task.model_id for task in tasks}),
                f"{sum(tokens):,}",
                num_passes,
                seconds,
                _memory_mb(self.base.device),
            )


def _memory_mb(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    return psutil.Process().memory_info().rss / 1e6


def _settle(future: Future[Any], outcome: Any) -> None:
    if isinstance(outcome, BaseException):
        _fail(future, outcome)
    else:
        with contextlib.suppress(Exception):  # it was cancelled
            future.set_result(outcome)


def _fail(future: Future[Any], error: BaseException) -> None:
    if not isinstance(error, LorakitError):  # the caller is given it, traceback and all
        log.debug("a call failed", exc_info=error)
    with contextlib.suppress(Exception):
        future.set_exception(error)

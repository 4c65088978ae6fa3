"""Passes of one token for each row, recorded once and replayed without Python, which is half of
their time where products are small.

torch's tracer is its one recorder that needs no compiler. What a recording takes as given would be
wrong silently. So everything that changes is an input of it (cache, masks, adapters); a pass that
torch warns of is never recorded; and a recording is compared to the bit with the plain pass at
several steps and at the first other number of rows, where the plain one is in force. A replay also
leaves the interpreter to other threads, those of a server.
"""

from __future__ import annotations

import collections
import contextlib
import linecache
import logging
import threading
import warnings
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lorakit.lora.adapter_batch import AdapterBatch
from lorakit.model.partition import is_partitioned
from lorakit.sampling.cache import KVCache

log = logging.getLogger("lorakit")
RECORD_AFTER = 16  # passes of one kind: a recording costs as much as some ten
MAX_RECORDINGS = 16
CHECKS = 3  # steps at which a recording is compared before it is trusted
_recording_lock = threading.Lock()  # filters of warnings belong to all threads
# tokens and positions, (B, 1) -> what the unembedding is given
Compute = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass
class _Recording:
    """A recorded pass, and how far it was compared with the plain one."""

    function: Any
    made_with: int | None  # rows; None when it was compared with another number
    num_checks: int = 0

    def replay(
        self, tokens: torch.Tensor, positions: torch.Tensor, inputs: Sequence[torch.Tensor]
    ) -> torch.Tensor | None:
        """Return what the pass gives; None where it cannot be run."""
        try:
            with torch.jit.optimized_execution(False):  # else the first calls are watched, and slow
                hidden: torch.Tensor = self.function(tokens, positions, *inputs)
        except RuntimeError as error:  # of shapes
            log.debug("a recorded pass fails: %s", error)
            return None
        return hidden

    def is_trusted(self, num_rows: int) -> bool:
        """Whether it need not be compared for this many rows."""
        return self.num_checks >= CHECKS and self.made_with in (None, num_rows)


class TracedStep:
    """Runs a model's passes of one token for each row: as they are, until a kind has come often."""

    def __init__(self, model: Any) -> None:
        self.model, self.num_replayed = model, 0
        is_whole = not any(map(is_partitioned, model.parameters()))
        self.records = model.device.type == "cpu" and is_whole  # passes at all
        self._seen: collections.Counter[Hashable] = collections.Counter()
        self._recordings: dict[Hashable, _Recording | None] = {}

    def run(
        self,
        compute: Compute,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        cache: KVCache,
        adapter_batch: AdapterBatch | None,
        way: Hashable,
    ) -> torch.Tensor:
        """Return what ``compute`` returns. It reads and writes ``cache``, has the adapters of
        ``adapter_batch``, and goes one ``way``.
        """
        kind = self._kind(cache, adapter_batch, way)
        if kind is None or (kind in self._recordings and self._recordings[kind] is None):
            return compute(tokens, positions)
        recording = self._recordings.get(kind)
        inputs = [*cache.step_tensors(), *(adapter_batch.tensors() if adapter_batch else ())]
        if recording is not None:
            found = recording.replay(tokens, positions, inputs)
            if found is not None and recording.is_trusted(len(tokens)):
                self.num_replayed += 1
                return found
            # after it: what it has written into the cache is written over
            hidden = compute(tokens, positions)
            self._recordings[kind] = _compared(recording, found, hidden)
            return hidden
        self._seen[kind] += 1
        num_recordings = sum(one is not None for one in self._recordings.values())
        if self._seen[kind] == RECORD_AFTER and num_recordings < MAX_RECORDINGS:
            with _frozen(self.model):
                self._recordings[kind] = _record(
                    compute, tokens, positions, cache, adapter_batch, inputs
                )
        return compute(tokens, positions)  # after the recorder, which has run it too

    def _kind(
        self, cache: KVCache, adapter_batch: AdapterBatch | None, way: Hashable
    ) -> Hashable | None:
        """What a recording holds for good; None for what is not recorded."""
        if (
            not self.records
            or torch.is_autocast_enabled("cpu")
            or (shape := cache.step_kind()) is None
        ):
            return None
        structure = () if adapter_batch is None else adapter_batch.structure()
        return None if structure is None else (shape, way, structure)


def _compared(
    recording: _Recording, found: torch.Tensor | None, hidden: torch.Tensor
) -> _Recording | None:
    """Return ``recording``, which gave ``found``, where that is ``hidden`` to the bit."""
    if found is None or not torch.equal(found, hidden):
        log.debug("a recorded pass is not used: it differs")
        return None
    recording.num_checks += 1
    if recording.made_with != len(hidden):
        recording.made_with = None
    return recording


@contextlib.contextmanager
def _frozen(model: Any) -> Iterator[None]:
    """A recording refuses to hold what may have a gradient."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


def _record(
    compute: Compute,
    tokens: torch.Tensor,
    positions: torch.Tensor,
    cache: KVCache,
    adapter_batch: AdapterBatch | None,
    inputs: Sequence[torch.Tensor],
) -> _Recording | None:
    num_of_cache = len(cache.step_tensors())

    def run(
        tokens: torch.Tensor, positions: torch.Tensor, *static_inputs: torch.Tensor
    ) -> torch.Tensor:
        of_adapters = (
            adapter_batch.static_inputs(static_inputs[num_of_cache:])
            if adapter_batch is not None
            else contextlib.nullcontext()
        )
        with cache.static_inputs(static_inputs[:num_of_cache]), of_adapters:
            return compute(tokens, positions)

    given = (tokens, positions, *inputs)
    with _recording_lock, warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        try:
            # What torch.jit.trace does, but for keeping the graph, its weights and this closure as
            # long as the process lives.
            graph, _ = torch._C._create_graph_by_tracing(run, given, _name_of, True, False)
            function = torch._C._create_function_from_graph("step", graph)
        except (RuntimeError, AttributeError, TypeError) as error:
            log.debug("this pass cannot be recorded: %s", error)
            return None
    for warning in warned:
        # the embedding's, of itself
        is_size_check = "padding_idx" in linecache.getline(warning.filename, warning.lineno)
        if warning.category is torch.jit.TracerWarning and not is_size_check:
            where = f"{warning.filename}:{warning.lineno}"
            log.debug("this pass is not recorded: %s: %s", where, warning.message)
            return None
    return _Recording(function, len(tokens))


def _name_of(value: Any) -> str:
    return ""  # names of values are for reading graphs

"""Passes of one token for each row, recorded once and replayed without Python, which is half of their time where products are small.

``torch.jit.trace`` is torch's one recorder that needs no compiler. What a recording takes as given would be wrong silently, so
everything that changes is an input of it (cache, masks, adapters), it is compared to the bit with the plain pass when it is made and
when the number of rows is another for the first time, and a pass that torch warns of is never recorded. A replay also leaves the
interpreter to other threads, those of a server.
"""

from __future__ import annotations

import collections
import contextlib
import logging
import warnings
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lorakit.lora.bank import Mix
from lorakit.model.partition import is_partitioned
from lorakit.sampling.cache import KVCache

log = logging.getLogger("lorakit")
RECORD_AFTER = 16  # passes of one kind: a recording costs as much as some ten
MAX_RECORDINGS = 16
Compute = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # tokens and positions, (B, 1) -> what the unembedding is given


@dataclass
class _Recording:
    """A recorded pass, and the number of rows that it was made with, until it was compared with another number."""

    function: Any
    made_with: int | None

    def __call__(self, tokens: torch.Tensor, positions: torch.Tensor, inputs: Sequence[torch.Tensor]) -> torch.Tensor:
        with torch.jit.optimized_execution(False):  # else the first calls are watched, and slow
            hidden: torch.Tensor = self.function(tokens, positions, *inputs)
        return hidden


class Replayer:
    """Runs a model's passes of one token for each row: as they are, until a kind of pass has come often."""

    def __init__(self, model: Any) -> None:
        self.model, self.num_replayed = model, 0
        self.records = model.device.type == "cpu" and not any(map(is_partitioned, model.parameters()))  # passes at all
        self._seen: collections.Counter[Hashable] = collections.Counter()
        self._recordings: dict[Hashable, _Recording | None] = {}

    def run(
        self, compute: Compute, tokens: torch.Tensor, positions: torch.Tensor, cache: KVCache, mix: Mix | None, way: Hashable
    ) -> torch.Tensor:
        """Return what ``compute`` returns. It reads and writes ``cache``, has the adapters of ``mix``, and goes one ``way``."""
        kind = self._kind(cache, mix, way)
        if kind is None or (kind in self._recordings and self._recordings[kind] is None):
            return compute(tokens, positions)
        recording = self._recordings.get(kind)
        inputs = [*cache.step_tensors(), *(mix.tensors() if mix is not None else ())]
        if recording is None:
            hidden = compute(tokens, positions)
            self._seen[kind] += 1
            if self._seen[kind] == RECORD_AFTER and len(self._recordings) < MAX_RECORDINGS:
                with _frozen(self.model):
                    recording = _record(compute, tokens, positions, cache, mix, inputs)
                self._recordings[kind] = _checked(recording, hidden, tokens, positions, inputs)
            return hidden
        if recording.made_with not in (None, len(tokens)):
            hidden = compute(tokens, positions)
            self._recordings[kind] = recording = _checked(recording, hidden, tokens, positions, inputs)
            if recording is not None:
                recording.made_with = None
            return hidden
        self.num_replayed += 1
        return recording(tokens, positions, inputs)

    def _kind(self, cache: KVCache, mix: Mix | None, way: Hashable) -> Hashable | None:
        """What a recording holds for good; None for what is not recorded."""
        if not self.records or torch.is_autocast_enabled("cpu") or (shape := cache.step_kind()) is None:
            return None
        structure = () if mix is None else mix.structure()
        return None if structure is None else (shape, way, structure)


def _checked(
    recording: _Recording | None, hidden: torch.Tensor, tokens: torch.Tensor, positions: torch.Tensor,
    inputs: Sequence[torch.Tensor],
) -> _Recording | None:  # fmt: skip
    """Return ``recording`` where it gives ``hidden`` to the bit. The pass writes what it has written before."""
    if recording is None:
        return None
    try:
        if torch.equal(recording(tokens, positions, inputs), hidden):
            return recording
        problem = "it differs"
    except RuntimeError as error:
        problem = str(error)
    log.debug("a recorded pass is not used: %s", problem)
    return None


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
    compute: Compute, tokens: torch.Tensor, positions: torch.Tensor, cache: KVCache, mix: Mix | None,
    inputs: Sequence[torch.Tensor],
) -> _Recording | None:  # fmt: skip
    num_of_cache = len(cache.step_tensors())

    def run(tokens: torch.Tensor, positions: torch.Tensor, *lent: torch.Tensor) -> torch.Tensor:
        of_mix = mix.lent(lent[num_of_cache:]) if mix is not None else contextlib.nullcontext()
        with cache.lent(lent[:num_of_cache]), of_mix:
            return compute(tokens, positions)

    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        try:
            function = torch.jit.trace(run, (tokens, positions, *inputs), check_trace=False)
        except RuntimeError as error:
            log.debug("this pass cannot be recorded: %s", error)
            return None
    doubtful = [w for w in warned if w.category is torch.jit.TracerWarning and not w.filename.endswith("nn/functional.py")]
    if doubtful:  # but for the embedding's check of its own size
        log.debug("this pass is not recorded: %s:%s: %s", doubtful[0].filename, doubtful[0].lineno, doubtful[0].message)
        return None
    return _Recording(function, len(tokens))

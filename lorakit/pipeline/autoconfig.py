"""What ``auto`` comes to: rank, layout of experts, tokens per batch, checkpointing, batches per
step; each with its reason.

``CHOICES`` is the order in which they are made: each says which keys it sets, whether it applies,
and how it chooses from what the ones before it have chosen.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from lorakit.config.schema import RunConfig
from lorakit.data.examples import DatasetReport
from lorakit.data.specs import DEFAULT_BATCH_SIZE
from lorakit.errors import ConfigError
from lorakit.lora.plan import LoRAPlan, plan_lora
from lorakit.lora.spec import PER_EXPERT, SHARED_OUTER
from lorakit.pipeline.build import build_step_plan
from lorakit.pipeline.processes import Place
from lorakit.planner.memory import WARN_SHARE
from lorakit.planner.step_plan import row_sizes, strategy_name
from lorakit.weights.adapter import AdapterFiles

Values = dict[str, Any]  # by keys in dots
RANK, LAYOUT = "lora.rank", "lora.expert_layout"
TOKENS, PACK = "data.tokens_per_batch", "data.pack_tokens"
CHECKPOINTING = "trainer.activation_checkpointing"
ACCUMULATE = "trainer.accumulate_grad_batches"
_WITH = (PACK,)  # is chosen with data.tokens_per_batch
RANKS = (128, 64, 32, 16, 8, 4, 2, 1)
LEAST_RANK = 16  # where the file allows it
FILE_BYTES = 300e6  # of an adapter in bf16, at most
# LoRA learns as full fine-tuning does while the data hold less than it can: about a bit per trained
# token, of which a parameter holds two ("LoRA Without Regret", Thinking Machines, September 2025,
# "Capacity").
TOKENS_PER_PARAMETER = 2
MICRO_BATCH = {"cpu": 2048, "cuda": 8192}  # positions at a time: more make no product faster
# positions at a time: rather than fewer, activations are computed twice
KEEPS_ACTIVATIONS_FROM = 2048
STEP = 32_768  # positions of an optimiser step, over all processes
LEAST_STEPS = 100  # of a run of few rows, for which a step has fewer positions


@dataclass(frozen=True)
class RunFacts:
    """What is known of a run before its settings are chosen."""

    skeleton: Any
    report: DatasetReport | None  # of the training rows; None where nobody has named any
    val_report: DatasetReport | None
    place: Place
    streams: int  # processes that take different rows


class Choice(Protocol):
    """A choice among ``CHOICES``."""

    keys: ClassVar[tuple[str, ...]]

    def applies(self, config: RunConfig) -> bool:
        """Whether it is this one that decides."""
        ...

    def choose(self, config: RunConfig, facts: RunFacts, wanted: set[str]) -> tuple[Values, str]:
        """Return values for the ``wanted`` ones of its keys, and the reason."""
        ...


def choose(
    config: RunConfig,
    facts: RunFacts,
    say: Callable[[str], Any],
    earlier: Mapping[str, Any] | None = None,
) -> tuple[RunConfig, Values]:
    """Return ``config`` with a value for each ``auto``, and these values by their keys.

    Args:
        say: prints each choice with its reason.
        earlier: what they came to when the run that is resumed began: they stay so.

    Raises:
        ConfigError: a setting beside them cannot be used.
    """
    earlier = earlier or {}
    chosen = {key: earlier[key] for key in (*config.auto, *_WITH) if key in earlier}
    for key, value in chosen.items():
        say(f"{key}=auto: {_shown(value)} (as when the run began)")
    config = config.with_values(chosen)
    for choice in CHOICES:
        wanted = set(choice.keys) & config.auto
        if not wanted or not choice.applies(config):
            continue
        values, reason = choice.choose(config, facts, wanted)
        values = {key: value for key, value in values.items() if key in (*wanted, *_WITH)}
        config, chosen = config.with_values(values), chosen | values
        shown = ", ".join(f"{key}=auto: {_shown(value)}" for key, value in values.items())
        say(f"{shown} ({reason})")
    return config, chosen


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:,}" if isinstance(value, int) else str(value)


def _plan(config: RunConfig, facts: RunFacts, **changes: Any) -> LoRAPlan:
    return plan_lora(facts.skeleton, dataclasses.replace(config.lora_with_tokens, **changes))


class AsInitialAdapter:
    """Rank and layout of the adapter that the run starts from."""

    keys: ClassVar[tuple[str, ...]] = (RANK, LAYOUT)

    def applies(self, config: RunConfig) -> bool:
        return bool(config.lora.init_from)

    def choose(self, config: RunConfig, facts: RunFacts, wanted: set[str]) -> tuple[Values, str]:
        assert config.lora.init_from is not None
        adapter = AdapterFiles.open(config.lora.init_from)
        layout = SHARED_OUTER if adapter.expert_matrices() else PER_EXPERT
        values = {RANK: adapter.config.get("r"), LAYOUT: layout}
        return values, "as lora.init_from has them"


class ExpertLayout:
    """Shared factors where there are experts."""

    keys: ClassVar[tuple[str, ...]] = (LAYOUT,)

    def applies(self, config: RunConfig) -> bool:
        return True

    def choose(self, config: RunConfig, facts: RunFacts, wanted: set[str]) -> tuple[Values, str]:
        if any(target.outer for target in _plan(config, facts).targets):
            reason = "experts share the factor on the hidden width, as Tinker trains them"
            return {LAYOUT: SHARED_OUTER}, reason
        return {LAYOUT: PER_EXPERT}, "no experts to share a factor"


class Rank:
    """The least rank with enough parameters for the trained tokens."""

    keys: ClassVar[tuple[str, ...]] = (RANK,)

    def applies(self, config: RunConfig) -> bool:
        return True

    def choose(self, config: RunConfig, facts: RunFacts, wanted: set[str]) -> tuple[Values, str]:
        plans = {rank: _plan(config, facts, rank=rank) for rank in RANKS}
        fitting = [rank for rank in RANKS if plans[rank].num_params * 2 <= FILE_BYTES] or [1]
        if (report := facts.report) is None:
            rank = min(max(fitting), 32)
            params = plans[rank].num_params / 1e6
            return {
                RANK: rank
            }, f"{params:.1f} million parameters; without data.path the usual rank"
        tokens = report.num_trained_tokens * report.num_rows / max(1, report.num_rows_profiled)
        needed = tokens / TOKENS_PER_PARAMETER
        enough = [r for r in fitting if plans[r].num_params >= needed and r >= LEAST_RANK]
        rank = min(enough, default=max(fitting))
        if enough:
            least = rank == LEAST_RANK
            why = "the least that is chosen" if least else "the least rank that has them"
        elif rank == max(RANKS):
            why = "the largest that is chosen"
        else:
            why = "the largest whose file stays below 300 MB"
        return (
            {RANK: rank},
            f"{plans[rank].num_params / 1e6:.2f} million parameters; {tokens / 1e6:.2f} million"
            f" trained tokens ask for {needed / 1e6:.2f} million: {why}",
        )


class MicroBatchSize:
    """Positions at a time, and whether activations are kept: the fastest that fits, by the same
    plan as the run's own.
    """

    keys: ClassVar[tuple[str, ...]] = (TOKENS, CHECKPOINTING)

    def applies(self, config: RunConfig) -> bool:
        return True

    def choose(self, config: RunConfig, facts: RunFacts, wanted: set[str]) -> tuple[Values, str]:
        found = [*_candidates(config, facts, wanted)]
        first, end, taken = 0, len(found), None
        # each takes less memory than the one before it, and a plan of a large model takes seconds
        while first < end:
            middle = (first + end) // 2 if end < len(found) or first else 0
            try:
                bytes_taken = _bytes_of(config.with_values(found[middle]), facts)
            except ConfigError:
                return found[
                    -1
                ], "the least there is, for no plan can be made of this model's memory"
            if bytes_taken is None:
                first = middle + 1
            else:
                end, taken = middle, bytes_taken
        if taken is None:
            return found[-1], "the least there is, and by the plan too much"
        values = found[end]
        how = "computed twice" if values[CHECKPOINTING] else "kept"
        much = f"{taken / 1e9:.1f}" if taken else "a small part"
        size = f"{_why_size(config, facts, values)}; " if TOKENS in values else ""
        return (
            values,
            f"{size}activations are {how}; the plan takes {much} of the"
            f" {facts.place.memory_per_process_bytes / 1e9:.1f} GB there are",
        )


class Accumulation:
    """Micro-batches per step: steps of a usual size."""

    keys: ClassVar[tuple[str, ...]] = (ACCUMULATE,)

    def applies(self, config: RunConfig) -> bool:
        return True

    def choose(self, config: RunConfig, facts: RunFacts, wanted: set[str]) -> tuple[Values, str]:
        batches = config.data.batches
        rows = batches.batch_size or DEFAULT_BATCH_SIZE
        positions = batches.tokens_per_batch or rows * row_positions(config, facts.report)
        each, size, why = positions * facts.streams, STEP, f"steps of {STEP:,} positions"
        if (seen := _positions_seen(config, facts)) is not None and seen // LEAST_STEPS < STEP:
            size = seen // LEAST_STEPS
            why = f"the {seen:,} tokens of all epochs are to make {LEAST_STEPS} steps"
        count = max(1, round(size / each))
        return {ACCUMULATE: count}, f"{why}; a step has {count * each:,}"


CHOICES: tuple[Choice, ...] = (
    AsInitialAdapter(),
    ExpertLayout(),
    Rank(),
    MicroBatchSize(),
    Accumulation(),
)


def _why_size(config: RunConfig, facts: RunFacts, chosen: Values) -> str:
    """Why a micro-batch is not larger than it was ``chosen``."""
    if chosen[TOKENS] < _sizes(config, facts)[0][TOKENS]:
        return "the largest that fits"
    seen = _positions_seen(config, facts)
    if seen is not None and seen // LEAST_STEPS // facts.streams < _best_size(facts):
        return f"{LEAST_STEPS} steps share the {seen:,} tokens of all epochs"
    return f"of more than {_best_size(facts):,} no product is faster"


def _best_size(facts: RunFacts) -> int:
    """Positions of a micro-batch from which on the device's products are no faster."""
    return MICRO_BATCH["cpu" if facts.place.accelerator == "cpu" else "cuda"]


def row_positions(config: RunConfig, report: DatasetReport | None) -> int:
    """Positions of the longest row, packed or not; of a pair both answers."""
    if (row_tokens := config.row_tokens) is not None:
        return row_tokens
    longest = report.longest if report else None
    each = 2 if config.is_of_pairs else 1
    return each * min(config.data.rendering.max_tokens, longest or 1 << 62)


def _candidates(config: RunConfig, facts: RunFacts, wanted: set[str]) -> Iterator[Values]:
    """What can be chosen, the fastest first."""
    sizes = _sizes(config, facts) if TOKENS in wanted else [{}]
    asked, is_open = config.trainer.activation_checkpointing, CHECKPOINTING in wanted
    if is_open or not asked:
        enough = min(KEEPS_ACTIVATIONS_FROM, sizes[0].get(TOKENS, 0))
        kept = [size for size in sizes if not is_open or size.get(TOKENS, 0) >= enough]
        yield from ({**size, CHECKPOINTING: False} for size in kept)
    if is_open or asked:
        yield from ({**size, CHECKPOINTING: True} for size in sizes)


def _sizes(config: RunConfig, facts: RunFacts) -> list[Values]:
    """Sizes of a micro-batch, the largest first: halves of the device's best, or of what few
    rows have for a step.
    """
    row, most = row_positions(config, facts.report), _best_size(facts)
    if (seen := _positions_seen(config, facts)) is not None:
        most = min(most, seen // LEAST_STEPS // facts.streams)
    batches, longest = config.data.batches, facts.report.longest if facts.report else None
    # a row for each step, and no longer
    if batches.packing and batches.pack_tokens is None and longest and most < row:
        each = 2 if config.is_of_pairs else 1
        row = min(row, max(64 * math.ceil(longest * each / 64), 64 * math.ceil(most / 64)))
        return [{TOKENS: row, PACK: row}]
    rows = max(1, most // row)
    return [{TOKENS: row * (rows >> shift)} for shift in range(rows.bit_length())]


def _positions_seen(config: RunConfig, facts: RunFacts) -> int | None:
    """Tokens of all epochs; None where nobody knows."""
    report, epochs = facts.report, config.data.batches.epochs
    if report is None or epochs is None:
        return None
    return round(report.num_tokens * report.num_rows / max(1, report.num_rows_profiled) * epochs)


def _bytes_of(config: RunConfig, facts: RunFacts) -> int | None:
    """What the plan says that the run takes in each process: 0 where that is surely little, None
    where it is too much.

    Raises:
        ConfigError: no plan can be made.
    """
    memory_bytes = facts.place.memory_per_process_bytes
    step = build_step_plan(
        config,
        facts.skeleton,
        _plan(config, facts),
        accelerator=facts.place.accelerator,
        precision=facts.place.precision,
        rows=row_sizes(facts.report),
        val_rows=row_sizes(facts.val_report),
    )
    if step.is_small_for(memory_bytes):
        return 0
    name: str | None
    if config.strategy.target == "auto":
        name = step.first_that_fits(facts.place.world.size, memory_bytes, offloads=False)
    else:
        name = strategy_name(config.strategy)
    total = step.memory(name, facts.place.world.size).total if name else None
    return total if total is not None and total <= WARN_SHARE * memory_bytes else None

"""What ``auto`` comes to: rank, layout of experts, tokens per batch, checkpointing, batches per
step; each with its reason.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from lorakit.config.auto import STAND_INS, auto_keys, with_values
from lorakit.data.examples import DatasetReport
from lorakit.data.specs import DEFAULT_BATCH_SIZE
from lorakit.errors import ConfigError
from lorakit.lora.inject import LoRAPlan
from lorakit.lora.inject import plan as plan_lora
from lorakit.lora.spec import PER_EXPERT, SHARED_OUTER
from lorakit.pipeline import build
from lorakit.planner.memory import WARN_SHARE
from lorakit.planner.step_plan import is_of_pairs, name_of, row_sizes
from lorakit.strategy.world import World
from lorakit.weights.adapter import AdapterFiles

Config = dict[str, Any]
_WITH = ("data.pack_tokens",)  # is chosen with data.tokens_per_batch
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
    """What choices are made from."""

    skeleton: Any
    report: DatasetReport | None  # of the training rows; None where nobody has named any
    val_report: DatasetReport | None
    accelerator: str
    precision: str
    there: int  # bytes that each process has
    world: World
    streams: int  # processes that take different rows


def choose(
    config: Config, known: RunFacts, say: Callable[[str], Any], earlier: Config | None = None
) -> tuple[Config, Config]:
    """Return ``config`` with a value for each ``auto``, and these values by their keys.

    Args:
        say: is told each choice with its reason.
        earlier: what they came to when the run began that goes on now: it stays so.

    Raises:
        ConfigError: a setting beside them cannot be used.
    """
    wanted = auto_keys(config)
    kept = {key: (earlier or {})[key] for key in (*wanted, *_WITH) if key in (earlier or {})}
    config, wanted = with_values(config, kept), [key for key in wanted if key not in kept]
    for key, value in kept.items():
        say(f"{key}=auto: {_shown(value)} (as when the run began)")
    chosen: Config = {}

    def settle(values: Config, reason: str) -> None:
        nonlocal config
        values = {key: value for key, value in values.items() if key in (*wanted, *_WITH)}
        config, _ = with_values(config, values), chosen.update(values)
        say(
            f"{', '.join(f'{key}=auto: {_shown(value)}' for key, value in values.items())}"
            f" ({reason})"
        )

    open_config = with_values(config, {key: STAND_INS[key] for key in wanted})
    if (start := config["lora"]["init_from"]) and {"lora.rank", "lora.expert_layout"} & set(wanted):
        settle(*_as_in(start))
        wanted = [key for key in wanted if key not in ("lora.rank", "lora.expert_layout")]
    if "lora.expert_layout" in wanted:
        settle(*_choose_layout(open_config, known))
    if "lora.rank" in wanted:
        settle(*_choose_rank(_open(config, wanted, chosen), known))
    if {"data.tokens_per_batch", "trainer.activation_checkpointing"} & set(wanted):
        settle(*_choose_batch(_open(config, wanted, chosen), known, wanted))
    if "trainer.accumulate_grad_batches" in wanted:
        settle(*_choose_accumulation(_open(config, wanted, chosen), known))
    return config, {**kept, **chosen}


def _open(config: Config, wanted: list[str], chosen: Config) -> Config:
    """``config`` with stand-ins for what is not chosen yet."""
    return with_values(config, {key: STAND_INS[key] for key in wanted if key not in chosen})


def _shown(value: Any) -> str:
    return (
        str(value).lower()
        if isinstance(value, bool)
        else f"{value:,}"
        if isinstance(value, int)
        else str(value)
    )


def _plan(config: Config, known: RunFacts, **changes: Any) -> LoRAPlan:
    return plan_lora(known.skeleton, dataclasses.replace(build.build_spec(config), **changes))


def _as_in(folder: str) -> tuple[Config, str]:
    adapter = AdapterFiles.open(folder)
    layout = SHARED_OUTER if adapter.expert_matrices() else PER_EXPERT
    return {
        "lora.rank": adapter.config.get("r"),
        "lora.expert_layout": layout,
    }, "as lora.init_from has them"


def _choose_layout(config: Config, known: RunFacts) -> tuple[Config, str]:
    if any(target.outer for target in _plan(config, known).targets):
        return {
            "lora.expert_layout": SHARED_OUTER
        }, "experts share the factor on the hidden width, as Tinker trains them"
    return {"lora.expert_layout": PER_EXPERT}, "no experts to share a factor"


def _choose_rank(config: Config, known: RunFacts) -> tuple[Config, str]:
    plans = {rank: _plan(config, known, rank=rank) for rank in RANKS}
    fitting = [rank for rank in RANKS if plans[rank].num_params * 2 <= FILE_BYTES] or [1]
    if known.report is None:
        rank = min(max(fitting), 32)
        return (
            {"lora.rank": rank},
            (
                f"{plans[rank].num_params / 1e6:.1f} million parameters; without data.path the"
                " usual rank"
            ),
        )
    report = known.report
    tokens = report.num_trained_tokens * report.num_rows / max(1, report.num_rows_profiled)
    needed = tokens / TOKENS_PER_PARAMETER
    enough = [rank for rank in fitting if plans[rank].num_params >= needed and rank >= LEAST_RANK]
    rank = min(enough, default=max(fitting))
    if not enough:
        why = (
            "the largest that is chosen"
            if rank == max(RANKS)
            else "the largest whose file stays below 300 MB"
        )
    else:
        why = "the least that is chosen" if rank == LEAST_RANK else "the least rank that has them"
    return (
        {"lora.rank": rank},
        (
            f"{plans[rank].num_params / 1e6:.2f} million parameters; {tokens / 1e6:.2f} million"
            f" trained tokens ask for {needed / 1e6:.2f} million: {why}"
        ),
    )


def _choose_batch(config: Config, known: RunFacts, wanted: list[str]) -> tuple[Config, str]:
    """Positions at a time, and whether activations are kept: the fastest that fits, by the same
    plan as the run's own.
    """
    found = [*_candidates(config, known, wanted)]
    first, behind, taken = 0, len(found), None
    # each takes less memory than the one before it, and a plan of a large model takes seconds
    while first < behind:
        middle = (first + behind) // 2 if behind < len(found) or first else 0
        try:
            bytes_taken = _bytes_of(with_values(config, found[middle]), known)
        except ConfigError:
            return found[-1], "the least there is, for no plan can be made of this model's memory"
        if bytes_taken is None:
            first = middle + 1
        else:
            behind, taken = middle, bytes_taken
    if taken is None:
        return found[-1], "the least there is, and by the plan too much"
    chosen = found[behind]
    how = "computed twice" if chosen["trainer.activation_checkpointing"] else "kept"
    much = f"{taken / 1e9:.1f}" if taken else "a small part"
    size = f"{_why_size(config, known, chosen)}; " if "data.tokens_per_batch" in chosen else ""
    return (
        chosen,
        (
            f"{size}activations are {how}; the plan takes {much} of the {known.there / 1e9:.1f} GB"
            " there are"
        ),
    )


def _why_size(config: Config, known: RunFacts, chosen: Config) -> str:
    """Why a micro-batch is not larger than it was ``chosen``."""
    if chosen["data.tokens_per_batch"] < _sizes(config, known)[0]["data.tokens_per_batch"]:
        return "the largest that fits"
    seen = _positions_seen(config, known)
    if seen is not None and seen // LEAST_STEPS // known.streams < _best_size(known):
        return f"{LEAST_STEPS} steps share the {seen:,} tokens of all epochs"
    return f"of more than {_best_size(known):,} no product is faster"


def _best_size(known: RunFacts) -> int:
    """Positions of a micro-batch from which on the device's products are no faster."""
    return MICRO_BATCH["cpu" if known.accelerator == "cpu" else "cuda"]


def row_positions(config: Config, report: DatasetReport | None) -> int:
    """Positions of the longest row, packed or not; of a pair both answers."""
    data, each = config["data"], 2 if is_of_pairs(config) else 1
    if data["packing"]:
        return int(data["pack_tokens"] or data["max_tokens"] * each)
    longest = report.longest if report else None
    return each * min(data["max_tokens"], longest or 1 << 62)


def _candidates(config: Config, known: RunFacts, wanted: list[str]) -> Iterator[Config]:
    """What can be chosen, the fastest first."""
    checkpointing = "trainer.activation_checkpointing"
    sizes = _sizes(config, known) if "data.tokens_per_batch" in wanted else [{}]
    asked, is_open = config["trainer"]["activation_checkpointing"], checkpointing in wanted
    if is_open or not asked:
        enough = min(KEEPS_ACTIVATIONS_FROM, sizes[0].get("data.tokens_per_batch", 0))
        kept = [
            size for size in sizes if not is_open or size.get("data.tokens_per_batch", 0) >= enough
        ]
        yield from ({**size, checkpointing: False} for size in kept)
    if is_open or asked:
        yield from ({**size, checkpointing: True} for size in sizes)


def _sizes(config: Config, known: RunFacts) -> list[Config]:
    """Sizes of a micro-batch, the largest first: halves of the device's best, or of what few
    rows have for a step.
    """
    tokens, row = "data.tokens_per_batch", row_positions(config, known.report)
    most = _best_size(known)
    if (seen := _positions_seen(config, known)) is not None:
        most = min(most, seen // LEAST_STEPS // known.streams)
    data, longest = config["data"], known.report.longest if known.report else None
    # a row for each step, and no longer
    if data["packing"] and data["pack_tokens"] is None and longest and most < row:
        each = 2 if is_of_pairs(config) else 1
        row = min(row, max(64 * math.ceil(longest * each / 64), 64 * math.ceil(most / 64)))
        return [{tokens: row, "data.pack_tokens": row}]
    rows = max(1, most // row)
    return [{tokens: row * (rows >> shift)} for shift in range(rows.bit_length())]


def _positions_seen(config: Config, known: RunFacts) -> int | None:
    """Tokens of all epochs; None where nobody knows. A limit by ``trainer.max_steps`` makes no
    step smaller.
    """
    report, epochs = known.report, config["data"]["epochs"]
    if report is None or epochs is None:
        return None
    return round(report.num_tokens * report.num_rows / max(1, report.num_rows_profiled) * epochs)


def _bytes_of(config: Config, known: RunFacts) -> int | None:
    """What the plan says that the run takes in each process: 0 where that is surely little, None
    where it is too much.

    Raises:
        ConfigError: no plan can be made.
    """
    step = build.build_step_plan(
        config,
        known.skeleton,
        _plan(config, known),
        accelerator=known.accelerator,
        precision=known.precision,
        rows=row_sizes(known.report),
        val_rows=row_sizes(known.val_report),
    )
    if step.is_small_for(known.there):
        return 0
    name: str | None
    if config["strategy"]["_target_"] == "auto":
        name = step.first_that_fits(known.world.size, known.there, offloads=False)
    else:
        name = name_of(config["strategy"])
    total = step.memory(name, known.world.size).total if name else None
    return total if total is not None and total <= WARN_SHARE * known.there else None


def _choose_accumulation(config: Config, known: RunFacts) -> tuple[Config, str]:
    data = config["data"]
    positions = data["tokens_per_batch"] or (
        data["batch_size"] or DEFAULT_BATCH_SIZE
    ) * row_positions(config, known.report)
    each, wanted, why = positions * known.streams, STEP, f"steps of {STEP:,} positions"
    if (seen := _positions_seen(config, known)) is not None and seen // LEAST_STEPS < STEP:
        wanted, why = (
            seen // LEAST_STEPS,
            f"the {seen:,} tokens of all epochs are to make {LEAST_STEPS} steps",
        )
    count = max(1, round(wanted / each))
    return {"trainer.accumulate_grad_batches": count}, f"{why}; a step has {count * each:,}"

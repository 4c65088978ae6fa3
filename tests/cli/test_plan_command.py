"""`lorakit plan`, and what a run does with its plan."""

from __future__ import annotations

import dataclasses
import io
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from small import SMALL
from transformers import AutoConfig

from lorakit.config.resolve import to_plain
from lorakit.config.schema import RunConfig
from lorakit.config.settings import Component
from lorakit.errors import ConfigError
from lorakit.lora.plan import plan_lora
from lorakit.lora.spec import LoRASpec
from lorakit.model.load import load_skeleton
from lorakit.pipeline import allocator, strategy_choice
from lorakit.pipeline.build import build_step_plan
from lorakit.pipeline.processes import Place
from lorakit.planner import fitting, presets
from lorakit.planner import step_plan as planning
from lorakit.planner.fake_images import SampleShapes
from lorakit.planner.fitting import suggest
from lorakit.planner.step_plan import StepPlan, step_shape, strategy_name
from lorakit.strategy.deepspeed import ZeroStrategy
from lorakit.strategy.world import World

Call = Callable[..., tuple[int, str, str]]


@pytest.mark.parametrize(
    ("num_layers", "num_parameters", "trainable", "gigabytes"),
    [
        (4, "3,114,814,464", "26,771,456", 6.2),
        pytest.param(48, "30,532,122,624", "321,257,472", 48, marks=pytest.mark.slow),
    ],
)
def test_the_plan_needs_no_rows_and_no_weights(
    lorakit: Call,
    monkeypatch: pytest.MonkeyPatch,
    num_layers: int,
    num_parameters: str,
    trainable: str,
    gigabytes: float,
) -> None:
    config = presets.preset_config("Qwen/Qwen3-30B-A3B")
    config.num_hidden_layers = num_layers
    monkeypatch.setattr(presets, "preset_config", lambda _: config)
    terminal = io.StringIO()
    monkeypatch.setattr(
        planning, "Console", lambda **_: Console(file=terminal, force_terminal=True)
    )
    code, out, err = lorakit(
        "plan",
        "model.path=Qwen/Qwen3-30B-A3B-Instruct-2507",
        "plan.gpus=[1,2]",
        "plan.tokens=1e6",
        f"plan.memory_gb={gigabytes}",
        "data.batch_size=1",
        "data.max_tokens=256",
        "lora.rank=8",
    )
    assert code == 0, err
    assert f"{num_parameters} parameters" in out and f"{trainable} trainable" in out
    for word in ("zero3_offload", "too much", "activations", "GFLOP per token", "minutes"):
        assert word in out, word
    assert "planning memory: going through a step" in terminal.getvalue()
    assert (
        "1 GPU: it fits with: strategy=zero3_offload" in out
        and "it fits as it is on 2 GPUs with strategy=zero3 " in out
    )


def test_a_run_that_does_not_fit_is_refused_with_what_would(lorakit: Call, tmp_path: Path) -> None:
    code, _, err = lorakit(
        "train",
        *SMALL,
        f"paths.runs={tmp_path}",
        "plan.memory_gb=0.1",
        "data.batch_size=64",
        "trainer.precision=32-true",
    )
    assert code == 2 and "this run needs" in err and "110" not in err
    assert (
        "it fits with: trainer.activation_checkpointing=true" in err and "plan.enforce=false" in err
    )
    assert not [path for path in tmp_path.iterdir() if not path.name.startswith(".")]


def test_a_user_may_insist(lorakit: Call, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="lorakit"):
        code, out, err = lorakit(
            "train",
            *SMALL,
            f"paths.runs={tmp_path}",
            "trainer.max_steps=1",
            "plan.memory_gb=0.05",
            "trainer.precision=32-true",
            "plan.enforce=false",
        )
    assert code == 0, err
    assert "memory: 0." in out
    assert "this run needs" in caplog.text + err


def config_of(**changes: Any) -> RunConfig:
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    from lorakit.config.paths import conf_dir

    GlobalHydra.instance().clear()
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        composed = compose(
            "train",
            overrides=[
                "experiment=pig_latin",
                *(f"{key}={value}" for key, value in changes.items()),
            ],
        )
    return RunConfig.from_dict(to_plain(composed))


def step_plan(num_longest: int | None = None, accelerator: str = "cpu", **changes: Any) -> StepPlan:
    skeleton = load_skeleton("tiny")
    planned = plan_lora(skeleton, LoRASpec(rank=8))
    config = config_of(**changes).with_values({"lora.rank": 8})
    return build_step_plan(
        config,
        skeleton,
        planned,
        accelerator=accelerator,
        precision="32-true",
        rows=SampleShapes(num_longest),
    )


def test_the_largest_micro_batch_is_planned() -> None:
    config = config_of()
    shape = step_shape(config, accelerator="cpu", precision="32-true")
    assert (shape.num_rows, shape.num_positions, shape.dtype) == (96, 256, "float32")
    assert (
        step_shape(
            config, accelerator="cpu", precision="32-true", rows=SampleShapes(40)
        ).num_positions
        == 40
    )
    config = config.with_values(
        {
            "data.packing": True,
            "data.pack_tokens": 512,
            "data.batch_size": None,
            "data.tokens_per_batch": 2048,
        }
    )
    shape = step_shape(config, accelerator="cpu", precision="bf16-mixed", rows=SampleShapes(40))
    assert (shape.num_rows, shape.num_positions, shape.dtype) == (4, 512, "bfloat16")


def test_an_evaluation_that_takes_more_than_a_step_is_planned() -> None:
    small = {
        "data.batch_size": 2,
        "data.val_batch_size": "null",
        "data.val_path": "pig_latin/heldout",
        "callbacks.samples.num_prompts": 1,
    }
    step, evaluated = step_plan(**small), step_plan(**{**small, "data.val_batch_size": 256})
    sampled = step_plan(
        **{**small, "callbacks.samples.num_prompts": 100, "callbacks.samples.max_tokens": 1000}
    )
    sizes = [plan.memory("single", 1).total for plan in (step, evaluated, sampled)]
    assert step.evaluation_bytes == 0 and sizes[0] < sizes[2] and 2 * sizes[0] < sizes[1]
    # Keys and values of 100 prompts of 256 tokens and 1,000 samples: 4 layers, 2 heads of 32 of
    # each, float32.
    assert sampled.evaluation_bytes > 100 * 1256 * 2 * 4 * 2 * 32 * 4
    assert suggest(evaluated, 1, round(sizes[0] * 1.3)).startswith(
        "it fits with: data.val_batch_size=null"
    )
    alone = step_plan(
        **{**small, "data.val_path": "null", "data.val_rows": "null", "data.val_batch_size": 256}
    )
    assert alone.evaluation_bytes == 0


def test_evaluation_and_sampling_have_the_rows_that_there_are_and_are_shared_as_they_run() -> None:
    keys = {
        "data.val_path": "pig_latin/heldout",
        "data.val_batch_size": 128,
        "data.val_rows": 16,
        "data.batch_size": 2,
    }
    samples = {"callbacks.samples.num_prompts": 4, "callbacks.samples.max_tokens": 600}
    config = config_of(**keys, **samples)
    step = step_shape(config, accelerator="cpu", precision="32-true")
    found = planning.passes_without_gradients(config, step, rows=SampleShapes(100))
    assert [(one.shape.num_rows, one.shape.num_positions, one.num_kept) for one in found] == [
        (16, 100, 0),
        (4, 100, 4 * 700),
    ]
    # Of four processes that share rows each evaluates a quarter of them, and samples whole ones.
    shared = planning.passes_without_gradients(
        config, dataclasses.replace(step, num_positions=64, sp_size=4), rows=SampleShapes(100)
    )
    assert [(one.shape.num_rows, one.shape.num_positions) for one in shared] == [(16, 25), (4, 100)]
    small = step_plan(
        **{
            **keys,
            "data.val_batch_size": "null",
            **samples,
            "callbacks.samples.num_prompts": 100,
            "data.val_rows": 200,
        }
    )
    advice = suggest(small, 1, round(0.7 * small.memory("single", 1).total))
    assert advice.startswith("it fits with: callbacks.samples.num_prompts=1"), advice
    assert planning.cache_bytes(AutoConfig.for_model("mamba"), "float32") == 0


def test_changes_are_suggested_until_it_fits() -> None:
    found = step_plan(**{"data.batch_size": 16, "data.val_batch_size": "null"})
    needed = found.memory("single", 1).total
    text = suggest(found, 1, round(needed * 0.6))
    assert text.startswith("it fits with: trainer.activation_checkpointing=true")
    tight = suggest(found, 1, round(needed * 0.25))
    assert "data.batch_size=" in tight and tight.count("data.batch_size") == 1
    assert "no setting makes it fit" in suggest(found, 1, 1_000_000)


@pytest.mark.parametrize(
    "changes",
    [
        {"data.batch_size": "null", "data.tokens_per_batch": 16384, "data.max_tokens": 2048},
        {
            "data.batch_size": 4,
            "data.packing": "true",
            "data.max_tokens": 2048,
            "data.pack_tokens": 4096,
        },
    ],
)
def test_what_is_suggested_is_accepted_and_makes_the_batch_smaller(changes: dict[str, Any]) -> None:
    found = step_plan(**changes)
    sizes = [found.shape.num_rows * found.shape.num_positions]
    for made, changed in fitting._changed_plans(found, 1):
        changed.config.data.check_sizes()  # refuses what cannot be
        sizes.append(changed.shape.num_rows * changed.shape.num_positions)
        assert sizes[-1] <= sizes[-2], made
    assert sizes[-1] == 512


def test_all_processes_plan_for_the_least_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        planning, "available_bytes", lambda accelerator, num_local: 24_000_000_000 // num_local
    )
    monkeypatch.setattr(planning, "all_gather_object", lambda value: [value, 7_000_000_000])
    two = World(0, 2, 0, 2)
    assert planning.agree_on_memory(None, "cpu", two) == 7_000_000_000
    assert planning.agree_on_memory(0.5, "cpu", two) == 500_000_000


def test_several_processes_take_the_first_strategy_that_fits() -> None:
    found = step_plan(accelerator="cuda", num_longest=16, **{"data.batch_size": 1})
    totals = {name: found.memory(name, 8).total for name in ("zero1", "zero2", "zero3")}
    assert found.first_that_fits(8, totals["zero1"] * 2) == "zero1"
    assert found.first_that_fits(8, 1000) is None


def test_strategies_have_their_files_names() -> None:
    assert (
        strategy_name(
            Component.from_dict(
                {"_target_": "lorakit.strategy.deepspeed.ZeroStrategy", "stage": 3, "offload": True}
            )
        )
        == "zero3_offload"
    )
    assert (
        strategy_name(
            Component.from_dict(
                {"_target_": "lorakit.strategy.deepspeed.ZeroStrategy", "stage": 2, "offload": True}
            )
        )
        == "zero2"
    )
    assert (
        strategy_name(Component.from_dict({"_target_": "lorakit.strategy.ddp.AdapterDDP"})) == "ddp"
    )
    assert (
        strategy_name(Component.from_dict({"_target_": "lorakit.strategy.single.single"}))
        == "single"
    )


def test_auto_goes_by_the_size_of_the_base_where_no_plan_can_be_made(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*_: Any) -> Any:
        raise ConfigError("no plan can be made")

    monkeypatch.setattr(planning, "trace_step", refuse)
    found, two = step_plan(), World(0, 2, 0, 2)
    chosen = {}
    for name, there in (("roomy", found.base_bytes * 10), ("tight", found.base_bytes)):
        chosen[name], reason = strategy_choice._choose(found, Place(two, "cpu", "32-true", there))
        assert "by the size of the base alone: no plan can be made" in reason
    assert chosen == {"roomy": "ddp", "tight": "zero3"}


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux's C library is told")
@pytest.mark.parametrize(
    ("needed", "num_base_params", "threshold"),
    [(4, 10**9, 128 << 10), (4, 1, 128 << 10), (2, 10**9, None), (None, 1, 1 << 30)],
)
def test_freed_memory_goes_back_where_it_is_tight_and_stays_where_a_model_is_small(
    monkeypatch: pytest.MonkeyPatch, needed: int | None, num_base_params: int, threshold: int | None
) -> None:
    told: list[int] = []
    monkeypatch.setattr(
        allocator, "_mallopt", lambda mmap_threshold, trim_threshold: told.append(mmap_threshold)
    )
    for name in ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_"):
        monkeypatch.delenv(name, raising=False)
    allocator.tune_allocator(needed, 10, num_base_params)
    assert told == ([] if threshold is None else [threshold])
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "1")
    allocator.tune_allocator(needed, 10, num_base_params)  # a user who has said so decides
    assert len(told) == (threshold is not None)


def test_zero_gathers_and_buckets_no_more_than_it_is_told() -> None:
    strategy = ZeroStrategy(stage=3, live_elements=7, bucket_elements=1000)
    zero = strategy.config["zero_optimization"]
    assert zero["stage3_max_live_parameters"] == zero["stage3_max_reuse_distance"] == 7
    strategy._fit_bucket(10)
    assert zero["reduce_bucket_size"] == 10
    strategy._fit_bucket(2000)
    assert zero["reduce_bucket_size"] == 10

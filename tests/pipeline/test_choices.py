"""One preset for the usual job: what is `auto` is chosen from model, rows and memory, said with
its reason, and kept on resuming.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from chat_models import config_of, shapes

from lorakit.callbacks import memory_probe
from lorakit.data.datum import TruncationStats
from lorakit.data.examples import DatasetReport
from lorakit.lora.plan import plan_lora
from lorakit.pipeline.autoconfig import FILE_BYTES, RANKS, RunFacts, choose
from lorakit.pipeline.build import build_step_plan
from lorakit.pipeline.processes import Place
from lorakit.strategy.world import World
from lorakit.training.precision import resolve_precision, why_precision

Call = Callable[..., tuple[int, str, str]]
A3B = "Qwen/Qwen3-30B-A3B-Instruct-2507"
KEYS = (
    *(
        "lora.rank",
        "lora.expert_layout",
        "data.tokens_per_batch",
        "trainer.activation_checkpointing",
    ),
    "trainer.accumulate_grad_batches",
)


def report_of(num_rows: int, length: int) -> DatasetReport:
    return DatasetReport(
        num_rows=num_rows,
        num_rows_profiled=num_rows,
        num_rows_skipped=0,
        first_skipped=None,
        num_examples=num_rows,
        lengths=np.full(num_rows, length),
        num_trained_tokens=num_rows * length // 2,
        num_without_stop=0,
        num_images=0,
        num_image_tokens=0,
        num_image_bytes=0,
        largest_image=0,
        image_share=0.0,
        cuts=TruncationStats(),
        formats=["messages"],
        unused_columns={},
        fingerprint="",
    )


@pytest.mark.parametrize(
    ("name", "gigabytes", "report", "expected"),
    [
        (
            "small",
            24,
            report_of(300, 200),
            {"data.tokens_per_batch": 1216, "data.pack_tokens": 1216},
        ),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                (
                    "0.6B",
                    24,
                    report_of(20_000, 800),
                    {"lora.rank": 16, "trainer.activation_checkpointing": False},
                ),
                (
                    "4B",
                    24,
                    report_of(20_000, 800),
                    {"trainer.activation_checkpointing": True, "lora.expert_layout": "per_expert"},
                ),
                ("8B", 80, report_of(20_000, 800), {"trainer.activation_checkpointing": False}),
                ("32B", 96, report_of(20_000, 800), {"trainer.activation_checkpointing": True}),
                (
                    A3B,
                    80,
                    report_of(20_000, 800),
                    {"lora.expert_layout": "shared_outer", "lora.rank": 8},
                ),
            )
        ),
    ],
    ids=["few rows", "0.6B", "4B on 24 GB", "8B on 80 GB", "32B on 96 GB", "30B-A3B on 80 GB"],
)
def test_the_choice_fits_and_is_the_fastest_that_does(
    name: str, gigabytes: int, report: DatasetReport, expected: dict[str, Any]
) -> None:
    skeleton, said = shapes(name), list[str]()
    known = RunFacts(
        skeleton, report, None, Place(World(), "cuda", "bf16-mixed", gigabytes * 10**9), 1
    )
    config, chosen = choose(config_of(), known, said.append)
    assert set(KEYS) <= set(chosen) and expected.items() <= chosen.items(), chosen
    assert all("auto: " in line and line.endswith(")") for line in said) and len(said) == 4
    planned = plan_lora(skeleton, config.lora_with_tokens)
    assert planned.num_params * 2 <= FILE_BYTES and planned.spec.rank in RANKS
    taken = (
        build_step_plan(config, skeleton, planned, accelerator="cuda", precision="bf16-mixed")
        .memory("single", 1)
        .total
    )
    assert taken <= 0.9 * gigabytes * 1e9
    # keeping them would not have fitted, with 2,048 positions or more
    if chosen["trainer.activation_checkpointing"]:
        keeps = config.with_values(
            {"trainer.activation_checkpointing": False, "data.tokens_per_batch": 4096}
        )
        plan_kept = build_step_plan(
            keeps, skeleton, planned, accelerator="cuda", precision="bf16-mixed"
        )
        assert plan_kept.memory("single", 1).total > 0.9 * gigabytes * 1e9


def test_what_is_set_stays_and_what_is_known_from_before_too() -> None:
    known = RunFacts(
        shapes("small"),
        report_of(20_000, 800),
        None,
        Place(World(), "cuda", "bf16-mixed", 24 * 10**9),
        1,
    )
    overrides = (
        "lora.rank=5",
        "trainer.accumulate_grad_batches=3",
        "trainer.activation_checkpointing=true",
    )
    config, chosen = choose(config_of(*overrides), known, lambda text: None)
    assert config.lora.rank == 5 and config.trainer.accumulate_grad_batches == 3
    assert set(chosen) == {
        "lora.expert_layout",
        "data.tokens_per_batch",
        "trainer.activation_checkpointing",
    } - {"trainer.activation_checkpointing"}
    _, again = choose(
        config_of(), known, lambda text: None, {"lora.rank": 7, "data.tokens_per_batch": 4096}
    )
    assert (
        again["lora.rank"] == 7
        and again["data.tokens_per_batch"] == 4096
        and again["trainer.accumulate_grad_batches"] == 8
    )


@pytest.mark.parametrize(
    ("name", "rows", "rank", "why"),
    [
        ("small", 1_000, 16, "the least that is chosen"),
        ("small", 3_000, 32, "the least rank that has them"),
        ("small", 6_000, 64, "the least rank that has them"),
        ("small", 100_000, 128, "the largest that is chosen"),
        ("4B", 100_000_000, 64, "the largest whose file stays below 300 MB"),
    ],
)
def test_more_rows_ask_for_a_higher_rank_whose_file_stays_small(
    name: str, rows: int, rank: int, why: str
) -> None:
    said = list[str]()
    # of which the first thousand were looked at
    report = dataclasses.replace(report_of(1_000, 800), num_rows=rows)
    known = RunFacts(
        shapes(name), report, None, Place(World(), "cuda", "bf16-mixed", 24 * 10**9), 1
    )
    _, chosen = choose(
        config_of("data.tokens_per_batch=4096", "trainer.activation_checkpointing=true"),
        known,
        said.append,
    )
    (line,) = (line for line in said if line.startswith("lora.rank=auto: "))
    assert chosen["lora.rank"] == rank and why in line, line


def write_chats(folder: Path, count: int = 120) -> None:
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"{i}?"},
                {"role": "assistant", "content": f"It is {i * i}. " * (1 + i % 5)},
            ]
        }
        for i in range(count)
    ]
    (folder / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_model_and_rows_suffice_and_a_resumed_run_keeps_its_choices(
    workplace: Path, lorakit: Call
) -> None:
    write_chats(workplace)
    settings = (
        "experiment=chat_sft",
        "model.path=tiny",
        "data.path=chats.jsonl",
        "data.chat_template=chatml",
        "run=it",
    )
    settings += ("callbacks.samples=null", "trainer.eval_every_steps=100", "trainer.max_steps=60")
    code, out, err = lorakit("train", *settings)
    assert code == 0, err
    for key in (*KEYS, "trainer.precision", "optim.lr"):
        assert f"{key}=auto: " in out, key
    assert re.search(
        r"trainer\.precision=auto: \S+"
        rf" \({re.escape(why_precision(resolve_precision('auto', 'cpu'), 'cpu'))}\)",
        out,
    )
    assert re.search(r"optim\.lr=auto: \S+ \(\w+", out), out
    info = json.loads((workplace / "runs/it/run.json").read_text())
    assert set(KEYS) <= info["resolved"].keys() and info["total_steps"] == 60
    assert yaml.safe_load((workplace / "runs/it/config.yaml").read_text())["lora"]["rank"] == "auto"
    config = json.loads((workplace / "runs/it/adapter/adapter_config.json").read_text())
    assert config["r"] == info["resolved"]["lora.rank"]
    for command in (
        ("sample", "it", "--max-tokens", "3", "--", "2?"),
        ("evaluate", "it", "--no-samples"),
        ("merge", "it"),
    ):
        code, _, err = lorakit(*command)
        assert code == 0, (command, err)

    start = (
        f"lora.init_from={workplace / 'runs/it/adapter'}",
        "lora.any_base=true",
        "run=three",
        "trainer.max_steps=1",
    )
    code, out, err = lorakit("train", *settings[:-1], *start)
    assert code == 0 and "(as lora.init_from has them)" in out, err

    code, _, err = lorakit(
        "train", *settings[:-1], "run=two", "trainer.max_steps=4", "checkpoint.every_steps=2"
    )
    assert code == 0, err
    folder = workplace / "runs/two"
    found = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps({**found, "status": "interrupted", "step": None}))
    import shutil

    shutil.rmtree(folder / "checkpoints/step-000004")
    code, out, err = lorakit(
        "train",
        *settings[:-1],
        "run=two",
        "trainer.max_steps=4",
        "checkpoint.every_steps=2",
        "resume=true",
        "plan.memory_gb=1.5",
    )
    assert code == 0 and "resuming from step 2" in out and "(as when the run began)" in out, err
    assert json.loads((folder / "run.json").read_text())["resolved"] == found["resolved"]


def test_the_longest_row_is_tried_once_where_the_batch_was_chosen(
    workplace: Path, lorakit: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_chats(workplace)
    tried = list[int]()

    def watched(trainer: Any, module: Any, batch: Any) -> int | None:
        tried.append(batch.input_ids.numel())
        return run_once(trainer, module, batch)

    run_once = memory_probe.run_once
    monkeypatch.setattr(memory_probe, "run_once", watched)
    monkeypatch.setattr(memory_probe, "refuses_memory", lambda device: True)
    settings = (
        "experiment=chat_sft",
        "model.path=tiny",
        "data.path=chats.jsonl",
        "data.chat_template=chatml",
    )
    settings += ("callbacks.samples=null", "trainer.max_steps=1")
    code, _, err = lorakit("train", *settings, "run=chosen")
    assert code == 0, err
    resolved = json.loads((workplace / "runs/chosen/run.json").read_text())["resolved"]
    assert (
        len(tried) == 1
        and 0.9 * resolved["data.tokens_per_batch"] < tried[0] <= resolved["data.tokens_per_batch"]
    )
    code, _, err = lorakit("train", *settings, "run=given", "data.tokens_per_batch=4096")
    assert code == 0 and len(tried) == 1, err


def test_commands_that_do_not_train_take_the_preset_as_well(workplace: Path, lorakit: Call) -> None:
    write_chats(workplace, 20)
    settings = (
        "experiment=chat_sft",
        "model.path=tiny",
        "data.path=chats.jsonl",
        "data.chat_template=chatml",
    )
    code, out, err = lorakit("plan", *settings, "trainer.accelerator=cpu", "plan.gpus=[1]")
    assert code == 0 and "lora.rank=auto: " in out, err
    code, _, err = lorakit("show", *settings)
    assert code == 0, err
    code, _, err = lorakit("train", *settings, "data.batch_size=1")
    assert code == 2 and "data.batch_size and data.tokens_per_batch=auto are both set" in err
    code, _, err = lorakit(
        "train", *settings, "lora.rank=automatic", "trainer.accumulate_grad_batches=aut"
    )
    assert code == 2 and "lora.rank=automatic" in err and "accumulate_grad_batches=aut" in err

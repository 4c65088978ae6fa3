"""The program on one GPU: what it computes on a CPU, under every strategy; and experts of real
widths as their preset has them.
"""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import transformers
from program import start
from small import SMALL

from lorakit.model.load import BUNDLED
from lorakit.runs.folder import History, open_run

pytestmark = [pytest.mark.slow, pytest.mark.gpu]
STEPS = ("trainer.max_steps=6", "logger=none", "checkpoint.every_steps=2", "data.shuffle=false")
FLOAT32 = ("trainer.precision=32-true",)
RUNS = {
    "cpu": (*FLOAT32, "trainer.accelerator=cpu", "trainer.threads=4"),
    "single": FLOAT32,
    **{
        name: (*FLOAT32, f"strategy={name}")
        for name in ("ddp", "zero1", "zero2", "zero3", "zero3_offload")
    },
    "bf16": (),
    "bf16-zero3": ("strategy=zero3",),
    "packed-cpu": (*FLOAT32, "trainer.accelerator=cpu", "trainer.threads=4", "data.packing=true"),
    "packed": (*FLOAT32, "data.packing=true", "trainer.activation_checkpointing=true"),
    "fp16": ("trainer.precision=16-mixed",),
}
EXPERTS = {
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_hidden_layers": 6,
    "head_dim": 128,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "vocab_size": 151936,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "max_position_embeddings": 40960,
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, dict[str, str]]]:
    """A folder with the runs, all made at the same time, and what went wrong."""
    assert torch.cuda.is_available(), 'this test needs a GPU; pytest -m "not gpu" leaves it out'
    folder = tmp_path_factory.mktemp("trained")
    running = {
        name: start("train", *SMALL, *STEPS, f"run={name}", *more, cwd=folder)
        for name, more in RUNS.items()
    }
    errors = {name: process.communicate(timeout=300)[1] for name, process in running.items()}
    yield folder, {name: errors[name] for name, process in running.items() if process.returncode}


@pytest.mark.parametrize("name", [name for name in RUNS if not name.endswith("cpu")])
def test_a_gpu_computes_what_a_cpu_does(name: str, trained: tuple[Path, dict[str, str]]) -> None:
    folder, problems = trained
    assert name not in problems, problems[name][-3000:]
    ours, theirs = (
        History(folder / "runs" / run).read()
        for run in (name, "packed-cpu" if name == "packed" else "cpu")
    )
    tolerance = 2e-4 if FLOAT32[0] in RUNS[name] else 0.03
    for key in ("train/loss", "train/grad_norm", "val/loss"):
        found, expected = (
            [record[key] for record in run if key in record] for run in (ours, theirs)
        )
        print(name, key, [f"{abs(a - b) / b:.1e}" for a, b in zip(found, expected, strict=True)])
        assert found == pytest.approx(expected, rel=tolerance)
    if tolerance > 0.01:  # in 16 bit, which rounds
        assert ours[0]["train/loss"] != pytest.approx(theirs[0]["train/loss"], rel=1e-5)


@pytest.mark.parametrize("name", ["bf16", "zero3"])
def test_what_a_gpu_has_trained_is_evaluated_sampled_and_merged(
    name: str, trained: tuple[Path, dict[str, str]]
) -> None:
    folder, _ = trained
    data = ("--data", "pig_latin/heldout", "--limit", "4", "--json", "figures.json")
    commands = (
        ("evaluate", name, *data),
        ("sample", name, "--max-tokens", "4", "--", "a"),
        ("merge", name, "--out", f"merged-{name}"),
    )
    for command in commands:
        process = start(*command, cwd=folder)
        _, errors = process.communicate(timeout=200)
        assert process.returncode == 0, errors[-3000:]
    figures = json.loads((folder / "figures.json").read_text())
    assert figures["loss"] == pytest.approx(
        open_run(folder / "runs" / name).info["val_loss"], rel=0.03
    )


def test_the_preset_of_the_30b_trains_and_takes_what_was_planned(tmp_path: Path) -> None:
    assert torch.cuda.is_available()
    make = (
        "import sys, json, torch, transformers; torch.manual_seed(0);"
        " torch.set_default_device('cuda');"
        " config = transformers.Qwen3MoeConfig(**json.loads(sys.argv[1]));"
        " transformers.Qwen3MoeForCausalLM._from_config(config,"
        " dtype=torch.bfloat16).save_pretrained('model')"
    )
    subprocess.run(
        [sys.executable, "-c", make, json.dumps(EXPERTS)],
        cwd=tmp_path,
        check=True,
        capture_output=True,
    )
    transformers.AutoTokenizer.from_pretrained(BUNDLED["tiny"]).save_pretrained(tmp_path / "model")
    generator = random.Random(0)
    with (tmp_path / "rows.jsonl").open("w") as file:
        for _ in range(200):
            tokens = [generator.randrange(3, 270) for _ in range(generator.randrange(200, 2000))]
            file.write(
                json.dumps({"tokens": tokens, "weights": [0.0] + [1.0] * (len(tokens) - 1)}) + "\n"
            )
    settings = (
        "model.path=model",
        "data.path=rows.jsonl",
        "trainer.max_steps=4",
        "trainer.accumulate_grad_batches=2",
    )
    process = start(
        "train",
        "experiment=qwen3_30b_a3b",
        *settings,
        "run=it",
        "logger=none",
        "plan.memory_gb=20",
        "callbacks.samples=null",
        "optim.lr=1e-4",
        cwd=tmp_path,
    )
    output, errors = process.communicate(timeout=300)
    print(output[-1500:], errors[-1500:])
    assert process.returncode == 0
    match = re.search(r"memory: ([\d.]+) GB", output)
    assert match
    most = max(
        record["memory/gigabytes"]
        for record in History(tmp_path / "runs/it").read()
        if "memory/gigabytes" in record
    )
    print(f"planned {match[1]} GB, measured {most:.2f} GB")
    assert float(match[1]) == pytest.approx(most, rel=0.1)

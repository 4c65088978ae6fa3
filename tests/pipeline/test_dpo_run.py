"""`lorakit train loss=dpo` from rows to figures, in one process and in two under each strategy."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from program import start

from lorakit.runs.folder import History
from lorakit.training.module import LoRAModule

Call = Callable[..., tuple[int, str, str]]
SETTINGS = (
    *(
        "loss=dpo",
        "model.path=tiny",
        "data.path=pairs.jsonl",
        "data.val_fraction=0.2",
        "data.batch_size=4",
        "data.shuffle=false",
    ),
    *(
        "optim.lr=3e-3",
        "trainer.max_steps=6",
        "data.epochs=null",
        "trainer.eval_every_steps=6",
        "lora.rank=4",
        "logger=none",
    ),
    *(
        "callbacks.samples.num_prompts=1",
        "callbacks.samples.max_tokens=2",
        "trainer.precision=32-true",
        "data.window_rows=16",
    ),
)


@pytest.fixture
def pairs(workplace: Path) -> Path:
    rows = [
        {"prompt": f"{i} is", "chosen": " even" + "!" * (i % 3), "rejected": f" odd {i}"}
        for i in range(40)
    ]
    (workplace / "pairs.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8"
    )
    return workplace


def count_models() -> int:
    """Models with weights that are alive in this process."""
    gc.collect()
    found = [one for one in gc.get_objects() if type(one).__name__ == "Qwen3MoeForCausalLM"]
    return sum(next(one.parameters()).device.type != "meta" for one in found)


def test_a_run_learns_to_prefer_and_evaluates_what_it_prefers(
    pairs: Path, lorakit: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, during, clip = count_models(), list[int](), LoRAModule.configure_gradient_clipping

    def counting(module: LoRAModule, *given: Any, **options: Any) -> None:
        during.append(count_models() - before)
        clip(module, *given, **options)

    monkeypatch.setattr(LoRAModule, "configure_gradient_clipping", counting)
    code, out, err = lorakit("train", *SETTINGS, "run=dpo", "optim.lr=1e-2")
    assert code == 0, err
    assert during == [1] * 6  # the reference is the same model, its adapter switched off
    assert "40 rows" not in out and "32 rows (preference), 64 examples" in out
    records = [record for record in History(pairs / "runs/dpo").read() if "train/loss" in record]
    assert (
        records[0]["train/loss"] == pytest.approx(0.6931, abs=1e-3)
        and records[-1]["train/loss"] < 0.2
    )
    (held_out,) = [record for record in History(pairs / "runs/dpo").read() if "val/loss" in record]
    assert held_out["val/rewards/accuracies"] == 1.0 and held_out["val/rewards/margins"] > 1
    code, out, err = lorakit("evaluate", "dpo")
    assert code == 0, err
    figures = json.loads(out)
    assert figures["pairs"] == 8 and figures["rewards/accuracies"] == 1.0
    assert figures["loss"] == pytest.approx(held_out["val/loss"], rel=0.02)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (("loss=cross_entropy",), "rows of chosen and rejected need a loss of pairs: set loss=dpo"),
        (
            ("data.path=pig_latin/train",),
            "is a loss of pairs, but these are rows of prompt_completion",
        ),
        (("strategy=zero2", "strategy.sequence_parallel=2"), "sequence_parallel=1"),
        (("loss.beta=x",), "loss.beta=x: expected float"),
        (("loss.bta=1",), "did you mean loss.beta?"),
        (("loss=dop",), "there are: cross_entropy, dpo"),
        (("loss._target_=lorakit.loss.policy.ppo",), "takes logprobs, advantages"),
    ],
    ids=str,
)
def test_a_loss_that_does_not_fit_is_one_message(
    pairs: Path, lorakit: Call, settings: tuple[str, ...], words: str
) -> None:
    code, _, err = lorakit("train", *SETTINGS, *settings)
    assert code == 2 and words in err, err
    assert not (pairs / "runs").exists()


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "zero1", "zero2", "zero3"])
def test_two_processes_do_what_one_does(pairs: Path, strategy: str) -> None:
    runs = {}
    for name, options in (
        ("one", ["trainer.devices=1", "trainer.accumulate_grad_batches=2"]),
        ("two", ["trainer.devices=2", f"strategy={strategy}"]),
    ):
        process = start("train", *SETTINGS, *options, f"run={name}", "trainer.threads=1", cwd=pairs)
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
        runs[name] = [
            record for record in History(pairs / "runs" / name).read() if "train/loss" in record
        ]
    assert len(runs["one"]) == len(runs["two"]) == 6
    for one, two in zip(runs["one"], runs["two"], strict=True):
        for figure in (
            "train/loss",
            "train/grad_norm",
            "train/rewards/margins",
            "train/rewards/accuracies",
        ):
            assert two[figure] == pytest.approx(one[figure], rel=2e-3, abs=1e-5), figure

"""What the callbacks log and write: throughput, expert load, samples, history; compared with
counts by hand.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from tiny_models import Loader, adamw, make_batches, make_datums, make_model, make_trainer

from lorakit.callbacks import throughput as throughput_module
from lorakit.callbacks.expert_load import ExpertLoad
from lorakit.callbacks.history import RunHistory, draw_losses
from lorakit.callbacks.samples import Samples
from lorakit.callbacks.throughput import Throughput
from lorakit.data.batch.stream import BatchStream
from lorakit.lora.inject import inject
from lorakit.lora.spec import LoRASpec
from lorakit.model.families import router_modules
from lorakit.model.load import load_model, load_tokenizer
from lorakit.sampling.generate import generate
from lorakit.training.module import LoRAModule
from lorakit.types import Batch, SamplingParams

DATUMS = make_datums(8)


class Metrics(L.Callback):
    """All metrics after each micro-batch."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        self.steps.append({name: float(value) for name, value in trainer.callback_metrics.items()})


def fit(
    folder: Path,
    callbacks: list[Any],
    *,
    family: str = "qwen3_moe",
    accumulate: int = 2,
    evaluate: bool = False,
    model: Any = None,
    tokenizer: Any = None,
    batches: Any = None,
) -> list[dict[str, float]]:
    model, metrics = model or inject(make_model(family), LoRASpec(rank=4)), Metrics()
    module = LoRAModule(lambda: model, optimizer=adamw(), tokenizer=tokenizer)
    batches = batches or make_batches(DATUMS, 2, accumulate)
    options = (
        {"check_val_every_n_epoch": None, "val_check_interval": 2, "limit_val_batches": None}
        if evaluate
        else {}
    )
    trainer = make_trainer(
        folder, callbacks=[*callbacks, metrics], accumulate_grad_batches=accumulate, **options
    )
    loader = Loader(batches) if isinstance(batches, list) else batches
    trainer.fit(module, loader, Loader(make_batches(DATUMS[:3], 2, 1)) if evaluate else None)
    return metrics.steps


def test_throughput_counts_tokens_trained_tokens_padding_and_seconds(
    tmp_path: Path, monkeypatch: Any
) -> None:
    clock = iter(range(0, 10_000, 10))
    monkeypatch.setattr(throughput_module.time, "perf_counter", lambda: float(next(clock)))
    callback = Throughput()
    steps = fit(tmp_path, [callback], accumulate=1)
    pairs = [DATUMS[start : start + 2] for start in range(0, 8, 2)]
    # each step takes the ten seconds between two looks at the clock
    for pair, metrics in zip(pairs, steps, strict=True):
        tokens, trained = (
            sum(map(len, pair)),
            sum(int((datum.weights != 0).sum()) for datum in pair),
        )
        assert metrics["speed/tokens_per_second"] == pytest.approx(tokens / 10)
        assert metrics["speed/trained_tokens_per_second"] == pytest.approx(trained / 10)
        assert metrics["data/padding_share"] == pytest.approx(
            1 - tokens / (2 * max(map(len, pair)))
        )
        assert metrics["memory/gigabytes"] > 0.05
    assert callback.num_tokens == sum(map(len, DATUMS))
    assert callback.seconds == 40
    assert callback.first_step_seconds is not None and 0 < callback.first_step_seconds < 60
    assert callback.tokens_per_second == pytest.approx(sum(map(len, DATUMS)) / 40)


def test_expert_load_is_the_busiest_experts_share_over_the_window_counted_by_hand(
    tmp_path: Path,
) -> None:
    model = inject(make_model(), LoRASpec(rank=4))
    choices: list[list[Any]] = [[], []]
    for layer, (_, router) in enumerate(router_modules(model)):
        router.register_forward_hook(
            lambda module, inputs, output, layer=layer: choices[layer].append(output[-1].tolist())
        )
    steps = fit(tmp_path, [ExpertLoad()], model=model, accumulate=2)
    batches = make_batches(DATUMS, 2, 2)
    for step in (0, 1):
        for layer in (0, 1):
            chosen = []
            for batch, rows in zip(
                batches[2 * step :][:2], choices[layer][2 * step :][:2], strict=True
            ):
                width = batch.input_ids.shape[1]
                tokens = [
                    row * width + position
                    for row, start, end in batch.spans
                    for position in range(start, end)
                ]
                # padding is routed, but nobody's token
                chosen += [expert for token in tokens for expert in rows[token]]
            counts = [chosen.count(expert) for expert in range(4)]
            expected = max(counts) / sum(counts) * 4
            assert steps[2 * step + 1][f"expert_load/layer_{layer:02d}_max"] == pytest.approx(
                expected, rel=1e-5
            )
            assert 1 <= expected <= 4


def wider(batch: Batch, columns: int) -> Batch:
    """The same documents with more padding behind them."""

    def pad(tensor: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.pad(tensor, (0, columns))

    return replace(
        batch,
        input_ids=pad(batch.input_ids),
        targets=pad(batch.targets),
        weights=pad(batch.weights),
    )


def test_expert_load_is_not_moved_by_more_padding(tmp_path: Path) -> None:
    batches = make_batches(DATUMS, 2, 2)
    loads = []
    for given in (batches, [wider(batch, 40) for batch in batches]):
        steps = fit(tmp_path, [ExpertLoad()], batches=given)
        loads.append(
            [
                value
                for step in steps
                for name, value in step.items()
                if name.startswith("expert_load")
            ]
        )
    assert len(loads[0]) >= 4
    assert loads[1] == pytest.approx(loads[0], rel=1e-6)


def test_throughput_leaves_out_other_callbacks_and_evaluation_and_counts_the_waiting_for_batches(
    tmp_path: Path, monkeypatch: Any
) -> None:
    clock = [0.0]
    monkeypatch.setattr(throughput_module.time, "perf_counter", lambda: clock[0])

    class Pause(L.Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            clock[0] += 100

        on_validation_batch_end = on_validation_end = on_train_batch_end

    def prefetch(groups: Iterator[Any]) -> Iterator[Any]:
        for group in groups:
            clock[0] += 10  # the step had to wait for it
            yield group

    monkeypatch.setattr("lorakit.data.batch.stream.prefetch", prefetch)
    examples: Any = SimpleNamespace(datums=lambda index: [DATUMS[index]])
    mixture: Any = SimpleNamespace(rows=lambda epoch: np.arange(8))
    stream = BatchStream(
        examples,
        mixture,
        pad_token_id=0,
        batch_size=2,
        row_tokens=None,
        accumulate=2,
        window_rows=4,
        num_epochs=2,
    )
    callback = Throughput()
    fit(tmp_path, [callback, Pause()], family="llama", evaluate=True, batches=stream)
    assert clock[0] > 1000
    # windows of two batches of two rows, in two epochs of eight
    assert callback.seconds == stream.seconds == 4 * 10
    assert callback.num_tokens == 2 * sum(map(len, DATUMS))


def test_expert_load_leaves_no_hook_behind_and_says_nothing_of_dense_models(tmp_path: Path) -> None:
    model = inject(make_model(), LoRASpec(rank=4))
    fit(tmp_path, [ExpertLoad()], model=model)
    assert not any(router._forward_hooks for _, router in router_modules(model))
    assert not any(
        "expert" in name for step in fit(tmp_path, [ExpertLoad()], family="llama") for name in step
    )


def test_evaluation_does_not_count_as_expert_load(tmp_path: Path) -> None:
    steps = [fit(tmp_path, [ExpertLoad()], evaluate=evaluate)[-1] for evaluate in (False, True)]
    loads = [
        {name: value for name, value in step.items() if name.startswith("expert_load")}
        for step in steps
    ]
    assert loads[0] == loads[1]
    assert loads[0]


def test_samples_are_written_at_every_evaluation_and_are_what_generate_gives(
    tmp_path: Path,
) -> None:
    tokenizer = load_tokenizer("tiny")
    model = inject(load_model("tiny"), LoRASpec(rank=2))
    expected = [
        generate(
            model,
            tokenizer,
            [tokenizer(text)["input_ids"]],
            SamplingParams(max_tokens=6, temperature=0),
        )
        for text in ("ab", "c")
    ]
    callback = Samples(tmp_path, prompts=["ab", "c"], max_tokens=6)
    trainer = SimpleNamespace(
        is_global_zero=True,
        sanity_checking=False,
        state=SimpleNamespace(fn="fit"),
        global_step=7,
        loggers=[],
    )
    callback.on_validation_end(trainer, SimpleNamespace(model=model, tokenizer=tokenizer))
    rows = [
        json.loads(line)
        for line in (tmp_path / "samples.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    assert [(row["step"], row["prompt"], row["sample"]) for row in rows] == [
        (7, text, sample[0].text) for text, sample in zip(("ab", "c"), expected, strict=True)
    ]
    fit(tmp_path, [callback], model=model, tokenizer=tokenizer, evaluate=True)
    rows = [
        json.loads(line)
        for line in (tmp_path / "samples.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    # a fit from step 0 forgets what lies behind it
    assert [row["step"] for row in rows] == [1, 1, 2, 2]


def test_samples_change_neither_losses_nor_mode(tmp_path: Path) -> None:
    tokenizer = load_tokenizer("tiny")
    losses = []
    for callbacks in ([], [Samples(tmp_path, prompts=["ab"], max_tokens=4, temperature=1.0)]):
        model = inject(load_model("tiny"), LoRASpec(rank=2, experts=False, dropout=0.3))
        torch.manual_seed(0)
        steps = fit(tmp_path, callbacks, model=model, tokenizer=tokenizer, evaluate=True)
        losses.append([step["train/loss"] for step in steps if "train/loss" in step])
    assert losses[0] == losses[1]


def test_history_holds_each_step_and_each_evaluation_and_the_curve_is_drawn(tmp_path: Path) -> None:
    callback = RunHistory(tmp_path)
    steps = fit(tmp_path, [callback], evaluate=True)
    records = callback.history.read()
    assert [(record["step"], "val/loss" in record) for record in records] == [
        (1, False),
        (1, True),
        (2, False),
        (2, True),
    ]
    assert [record["train/loss"] for record in records if "train/loss" in record] == [
        steps[1]["train/loss"],
        steps[3]["train/loss"],
    ]
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_history_behind_the_step_of_a_resumed_run_is_cut_and_a_torn_line_left_out(
    tmp_path: Path,
) -> None:
    callback = RunHistory(tmp_path)
    for step in (1, 2, 3):
        callback.history.append({"step": step, "train/loss": 1 / step})
    with callback.history.path.open("a") as file:
        file.write('{"step": 4, "trai')
    callback.on_train_start(SimpleNamespace(is_global_zero=True, global_step=2), None)
    callback.history.append({"step": 3, "train/loss": 7.0})
    assert callback.history.read() == [
        {"step": 1, "train/loss": 1.0},
        {"step": 2, "train/loss": 0.5},
        {"step": 3, "train/loss": 7.0},
    ]


@pytest.mark.parametrize(
    "records", [[], [{"step": 1, "train/loss": float("nan")}], [{"step": 1, "train/loss": -2.0}]]
)
def test_a_curve_of_nothing_or_of_nothing_finite_is_drawn_all_the_same(
    records: list, tmp_path: Path
) -> None:
    draw_losses(records, tmp_path / "loss.png")
    assert (tmp_path / "loss.png").stat().st_size > 1000


def test_history_has_no_loss_of_a_step_that_was_skipped(tmp_path: Path) -> None:
    batches = make_batches(DATUMS, 2, 1)[:3]
    batches[1] = replace(
        batches[1], weights=torch.zeros_like(batches[1].weights), window_weight=0.0
    )
    callback = RunHistory(tmp_path)
    fit(tmp_path, [callback], family="llama", accumulate=1, batches=batches)
    first, skipped, last = callback.history.read()
    assert not {"train/loss", "train/grad_norm"} & skipped.keys()
    assert skipped["train/empty_windows"] == 1
    assert first["train/loss"] != last["train/loss"]


def test_samples_behind_the_step_of_a_resumed_run_are_cut(tmp_path: Path) -> None:
    callback = Samples(tmp_path, prompts=["a"])
    lines = [
        json.dumps({"step": step, "prompt": "ä", "sample": "b\n"}, ensure_ascii=False)
        for step in (1, 2, 2, 3)
    ]
    callback.history.path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    callback.on_train_start(SimpleNamespace(is_global_zero=True, global_step=2), None)
    assert callback.history.path.read_text(encoding="utf-8") == "".join(
        line + "\n" for line in lines[:3]
    )
    callback.on_train_start(SimpleNamespace(is_global_zero=True, global_step=0), None)
    assert callback.history.path.read_text(encoding="utf-8") == ""

"""A run that is broken off and continued computes what an uninterrupted one does, to the last
byte.
"""

from __future__ import annotations

import hashlib
import json
import random
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from tiny_models import FakeTokenizer, adamw, make_model, make_trainer, trainable

from lorakit.callbacks.adapter_checkpoint import AdapterCheckpoint
from lorakit.data.datamodule import LoRADataModule
from lorakit.lora.inject import inject
from lorakit.lora.spec import LoRASpec
from lorakit.runs.checkpoint import STATE_FILE, list_checkpoints
from lorakit.training.module import LoRAModule
from lorakit.training.optim import cosine

SPEC = LoRASpec(rank=4, experts=False, dropout=0.2)
# rows of one: 18 micro-batches of 2 over both epochs, 9 optimiser steps
ROWS, EPOCHS, ACCUMULATE = 18, 2, 2


class Losses(L.Callback):
    """The loss of each optimiser step by its number; ends the fit before ``stop_at``, as a crash
    would.
    """

    def __init__(self, stop_at: int | None = None) -> None:
        self.values: dict[int, float] = {}
        self.stop_at = stop_at

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        if self.stop_at is not None and trainer.global_step >= self.stop_at:
            raise KeyboardInterrupt

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if "train/loss" in trainer.callback_metrics:
            self.values[trainer.global_step] = float(trainer.callback_metrics["train/loss"])


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    generator, path = random.Random(0), tmp_path / "rows.jsonl"
    with path.open("w") as file:
        for number in range(ROWS):
            tokens = [generator.randrange(3, 64) for _ in range(4 + number % 7)]
            weights = [0.0, *(generator.choice([0.5, 1.0]) for _ in tokens[1:])]
            file.write(json.dumps({"tokens": tokens, "weights": weights}) + "\n")
    return path


def fit(
    folder: Path,
    rows: Path,
    *,
    every: int,
    resume: Path | None = None,
    stop_at: int | None = None,
    packing: bool = False,
    evaluate: bool = False,
    keep_last: int = 100,
) -> tuple[dict[int, float], dict[str, torch.Tensor]]:
    """Train, with everything made anew; return each step's loss and the final adapter."""
    # a resumed process starts with whatever random state it likes
    L.seed_everything(99 if resume else 1, verbose=False)
    datamodule = LoRADataModule(
        path=str(rows),
        batch_size=2,
        epochs=EPOCHS,
        max_tokens=16,
        packing=packing,
        val_fraction=0.0,
        window_rows=7,
        seed=3,
        val_path=str(rows) if evaluate else None,
        val_rows=4 if evaluate else None,
    )
    datamodule.set_tokenizer(FakeTokenizer())
    module = LoRAModule(
        lambda: inject(make_model("qwen3_moe"), SPEC),
        optimizer=adamw(),
        schedule=cosine,
        total_steps=9,
        clip_norm=1.0,
    )
    losses = Losses(stop_at)
    trainer = make_trainer(
        folder,
        accumulate_grad_batches=ACCUMULATE,
        check_val_every_n_epoch=None,
        val_check_interval=2 * ACCUMULATE if evaluate else None,
        limit_val_batches=None if evaluate else 0,
        callbacks=[
            losses,
            AdapterCheckpoint(folder / "checkpoints", every_steps=every, keep_last=keep_last),
        ],
    )
    state = None if resume is None else resume / STATE_FILE
    try:
        trainer.fit(
            module, datamodule=datamodule, ckpt_path=state, weights_only=True if state else None
        )
    except (KeyboardInterrupt, SystemExit):
        assert stop_at is not None
    return losses.values, trainable(module.model)


def digest(folder: Path) -> str:
    return hashlib.sha256((folder / "adapter_model.safetensors").read_bytes()).hexdigest()


@pytest.mark.parametrize(
    "options",
    [{}, {"evaluate": True}, {"packing": True}],
    ids=["plain", "with evaluation", "packed"],
)
def test_every_checkpoint_leads_to_the_same_losses_and_bytes(
    options: dict, rows: Path, tmp_path: Path
) -> None:
    whole, adapter = fit(tmp_path / "whole", rows, every=1, **options)
    checkpoints = list_checkpoints(tmp_path / "whole" / "checkpoints")
    last = max(whole)
    assert [checkpoint.step for checkpoint in checkpoints] == list(range(1, last + 1))
    for checkpoint in (checkpoints[1], checkpoints[2], checkpoints[last // 2], checkpoints[-2]):
        folder = tmp_path / f"from{checkpoint.step}"
        rest, resumed = fit(folder, rows, every=1, resume=checkpoint.folder, **options)
        assert rest == {step: loss for step, loss in whole.items() if step > checkpoint.step}
        assert all(torch.equal(resumed[name], adapter[name]) for name in adapter)
        assert digest(list_checkpoints(folder / "checkpoints")[-1].folder) == digest(
            checkpoints[-1].folder
        )


@pytest.mark.parametrize("evaluate", [False, True])
def test_a_fit_broken_off_in_the_middle_of_a_window_goes_on_from_its_last_checkpoint(
    evaluate: bool, rows: Path, tmp_path: Path
) -> None:
    whole, adapter = fit(tmp_path / "whole", rows, every=3, evaluate=evaluate)
    fit(tmp_path / "torn", rows, every=3, stop_at=5, evaluate=evaluate)
    checkpoint = list_checkpoints(tmp_path / "torn" / "checkpoints")[-1]
    assert checkpoint.step == (4 if evaluate else 3)
    rest, resumed = fit(
        tmp_path / "torn", rows, every=3, resume=checkpoint.folder, evaluate=evaluate
    )
    assert rest == {step: loss for step, loss in whole.items() if step > checkpoint.step}
    assert all(torch.equal(resumed[name], adapter[name]) for name in adapter)


def test_resuming_from_the_very_last_checkpoint_trains_nothing_more(
    rows: Path, tmp_path: Path
) -> None:
    whole, adapter = fit(tmp_path, rows, every=1)
    checkpoint = list_checkpoints(tmp_path / "checkpoints")[-1]
    assert checkpoint.step == max(whole)
    rest, resumed = fit(tmp_path, rows, every=1, resume=checkpoint.folder)
    assert rest == {}
    assert all(torch.equal(resumed[name], adapter[name]) for name in adapter)


def test_dropout_takes_part_so_another_random_state_would_be_seen(
    rows: Path, tmp_path: Path
) -> None:
    whole, _ = fit(tmp_path / "whole", rows, every=1)
    checkpoint = list_checkpoints(tmp_path / "whole" / "checkpoints")[3].folder
    state = torch.load(checkpoint / STATE_FILE, weights_only=True)
    state["lorakit_random"][0]["torch"] = torch.Generator().manual_seed(8).get_state()
    torch.save(state, checkpoint / STATE_FILE)
    rest, _ = fit(tmp_path / "other", rows, every=1, resume=checkpoint)
    assert rest.keys() == {step for step in whole if step > 4}
    assert rest[5] != whole[5]


def test_the_training_state_holds_the_adapter_and_no_part_of_the_base(
    rows: Path, tmp_path: Path
) -> None:
    _, adapter = fit(tmp_path, rows, every=4)
    state = torch.load(
        list_checkpoints(tmp_path / "checkpoints")[-1].folder / STATE_FILE, weights_only=True
    )
    assert {name.removeprefix("model.") for name in state["state_dict"]} == adapter.keys()
    assert np.isfinite(state["lorakit_counts"]).all()

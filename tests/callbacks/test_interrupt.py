"""Ctrl-C finishes the step, writes a checkpoint and ends the fit; a second one ends it at once."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from tiny_models import (
    Loader,
    adamw,
    make_batches,
    make_datums,
    make_model,
    make_trainer,
    trainable,
)

from lorakit.callbacks.adapter_checkpoint import AdapterCheckpoint
from lorakit.lora.inject import inject
from lorakit.lora.spec import LoRASpec
from lorakit.runs.checkpoint import list_checkpoints
from lorakit.training.module import LoRAModule


@pytest.fixture(autouse=True)
def python_handles_ctrl_c() -> Iterator[None]:
    """A shell starts what it puts into the background with SIGINT ignored; here Python's own
    handler stands.
    """
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


class Press(L.Callback):
    """A signal in the middle of a window, once or twice."""

    def __init__(self, times: int, signum: int = signal.SIGINT) -> None:
        self.times, self.signum = times, signum

    def on_train_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx == 2:
            for _ in range(self.times):
                signal.raise_signal(self.signum)


def fit(
    folder: Path, times: int, signum: int = signal.SIGINT
) -> tuple[Any, Any, dict[str, torch.Tensor]]:
    checkpoint = AdapterCheckpoint(folder / "checkpoints", every_steps=0)
    module = LoRAModule(lambda: inject(make_model("llama"), LoRASpec(rank=4)), optimizer=adamw())
    trainer = make_trainer(
        folder, callbacks=[Press(times, signum), checkpoint], accumulate_grad_batches=2
    )
    trainer.fit(module, Loader(make_batches(make_datums(8), 1, 2)))
    return trainer, checkpoint, trainable(module.model)


def test_the_first_ctrl_c_finishes_the_step_and_saves_it(tmp_path: Path) -> None:
    handler = signal.getsignal(signal.SIGINT)
    trainer, checkpoint, adapter = fit(tmp_path, 1)
    assert checkpoint.interrupt == signal.SIGINT
    assert trainer.global_step == 2
    saved = list_checkpoints(tmp_path / "checkpoints")
    assert [entry.step for entry in saved] == [2]
    state = torch.load(saved[0].state_file, weights_only=True)["state_dict"]
    assert all(torch.equal(state[f"model.{name}"], tensor) for name, tensor in adapter.items())
    assert signal.getsignal(signal.SIGINT) is handler


def test_sigterm_saves_the_step_too_however_often_it_comes(tmp_path: Path) -> None:
    handler = signal.getsignal(signal.SIGTERM)
    trainer, checkpoint, _ = fit(tmp_path, 2, signal.SIGTERM)
    assert checkpoint.interrupt == signal.SIGTERM and trainer.global_step == 2
    assert [entry.step for entry in list_checkpoints(tmp_path / "checkpoints")] == [2]
    assert signal.getsignal(signal.SIGTERM) is handler


def test_the_second_ctrl_c_ends_it_at_once(tmp_path: Path) -> None:
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        fit(tmp_path, 2)
    assert list_checkpoints(tmp_path / "checkpoints") == []
    assert signal.getsignal(signal.SIGINT) is handler


def test_a_fit_without_ctrl_c_saves_its_end_and_gives_the_handler_back(tmp_path: Path) -> None:
    handler = signal.getsignal(signal.SIGINT)
    trainer, checkpoint, _ = fit(tmp_path, 0)
    assert checkpoint.interrupt is None
    assert (
        [entry.step for entry in list_checkpoints(tmp_path / "checkpoints")]
        == [trainer.global_step]
        == [4]
    )
    assert signal.getsignal(signal.SIGINT) is handler

"""A checkpoint that cannot be written ends no training: it is said, and the last good one stays
in force.
"""

from __future__ import annotations

import errno
import os
import resource
import warnings
from pathlib import Path
from typing import Any

import pytest
from tiny_models import Loader, adamw, make_batches, make_datums, make_model, make_trainer

from lorakit.callbacks import adapter_checkpoint as callback_module
from lorakit.callbacks.adapter_checkpoint import AdapterCheckpoint
from lorakit.lora.inject import inject
from lorakit.lora.spec import LoRASpec
from lorakit.runs.checkpoint import list_checkpoints, newest_whole
from lorakit.training.module import LoRAModule

BATCHES = make_batches(make_datums(6), 1, 1)


def fit(folder: Path, before_step: Any) -> tuple[Any, list[str]]:
    """Six steps with a checkpoint after each; ``before_step(global_step)`` may fill the disk."""

    class Disk(AdapterCheckpoint):
        def on_train_batch_end(self, trainer: Any, *arguments: Any) -> None:
            before_step(trainer.global_step)
            super().on_train_batch_end(trainer, *arguments)

    module = LoRAModule(lambda: inject(make_model("llama"), LoRASpec(rank=4)), optimizer=adamw())
    trainer = make_trainer(folder, callbacks=[Disk(folder / "checkpoints", every_steps=1)])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(module, Loader(BATCHES))
    return trainer, [
        str(warning.message) for warning in caught if "could not be written" in str(warning.message)
    ]


@pytest.mark.parametrize("place", ["write_adapter", "fsync"])
def test_training_goes_on_and_the_last_good_checkpoint_is_in_force(
    place: str, tmp_path: Path, monkeypatch: Any
) -> None:
    save, sync, full = callback_module.write_adapter, os.fsync, [False]

    def guarded(real: Any) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            if full[0]:
                raise OSError(errno.ENOSPC, "No space left on device")
            return real(*arguments, **options)

        return call

    if place == "write_adapter":
        monkeypatch.setattr(callback_module, "write_adapter", guarded(save))
    else:
        monkeypatch.setattr(os, "fsync", guarded(sync))

    def before_step(step: int) -> None:
        full[0] = step >= 3

    trainer, said = fit(tmp_path, before_step)
    assert trainer.global_step == 6
    assert len(said) >= 4
    assert "step 3" in said[0]
    assert "No space left" in said[0]
    assert "step 2 is still valid" in said[0]
    assert [checkpoint.step for checkpoint in list_checkpoints(tmp_path / "checkpoints")] == [1, 2]
    assert newest_whole(tmp_path / "checkpoints", said.append).step == 2
    assert not list((tmp_path / "checkpoints").glob(".writing-*"))


def test_room_that_comes_back_is_used(tmp_path: Path, monkeypatch: Any) -> None:
    real, full = os.fsync, [False]

    def fsync(descriptor: int) -> None:
        if full[0]:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)

    def before_step(step: int) -> None:
        full[0] = step in (2, 3)

    _, said = fit(tmp_path, before_step)
    assert len(said) == 2
    assert [checkpoint.step for checkpoint in list_checkpoints(tmp_path / "checkpoints")] == [5, 6]


@pytest.mark.parametrize("torn", ["adapter_model.safetensors", "training_state.ckpt"])
def test_training_goes_on_where_the_kernel_refuses_the_bytes(torn: str, tmp_path: Path) -> None:
    """Real failures: safetensors reports them by an error of its own, torch.save by a
    RuntimeError.
    """
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    class Disk(AdapterCheckpoint):
        def _save(self, trainer: Any, *arguments: Any, **options: Any) -> None:
            room = limits[0]
            if trainer.global_step >= 3:
                adapter = self.folder / "step-000001" / "adapter_model.safetensors"
                room = 4096 if torn == adapter.name else adapter.stat().st_size + 4096
            resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
            try:
                super()._save(trainer, *arguments, **options)
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    module = LoRAModule(lambda: inject(make_model("llama"), LoRASpec(rank=4)), optimizer=adamw())
    trainer = make_trainer(tmp_path, callbacks=[Disk(tmp_path / "checkpoints", every_steps=1)])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(module, Loader(BATCHES))
    said = [
        str(warning.message) for warning in caught if "could not be written" in str(warning.message)
    ]
    assert trainer.global_step == 6
    assert len(said) >= 4
    assert "step 3" in said[0] and "step 2 is still valid" in said[0]
    assert ("adapter_model" in said[0]) == (torn == "adapter_model.safetensors"), said[0]
    assert [checkpoint.step for checkpoint in list_checkpoints(tmp_path / "checkpoints")] == [1, 2]
    assert not list((tmp_path / "checkpoints").glob(".writing-*"))

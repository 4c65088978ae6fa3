"""Folders and files are whole or not there; damage is found; the last and the best checkpoints
stay.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest
from tiny_models import make_model

from lorakit.errors import CheckpointError
from lorakit.lora.inject import inject
from lorakit.lora.spec import LoRASpec
from lorakit.runs import files
from lorakit.runs.checkpoint import best, list_checkpoints, newest_whole, prune, save_checkpoint
from lorakit.weights.adapter import save_adapter


@pytest.fixture(scope="module")
def model() -> Any:
    return inject(make_model("llama"), LoRASpec(rank=2))


def save(
    root: Path, model: Any, step: int, val_loss: float | None = None, state: bytes = b"state"
) -> Any:
    return save_checkpoint(
        root,
        step=step,
        save_adapter=functools.partial(save_adapter, model),
        save_state=lambda path: path.write_bytes(state),
        val_loss=val_loss,
    )


def steps(root: Path) -> list[int]:
    return [checkpoint.step for checkpoint in list_checkpoints(root)]


def test_a_checkpoint_is_listed_as_it_was_saved(model: Any, tmp_path: Path) -> None:
    saved = [save(tmp_path, model, 20, 0.5), save(tmp_path, model, 3)]
    assert list_checkpoints(tmp_path) == [saved[1], saved[0]]
    assert saved[0].find_damage() is None
    assert set(saved[0].digests) == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "training_state.ckpt",
    }


@pytest.mark.parametrize(
    "name", ["adapter_config.json", "adapter_model.safetensors", "training_state.ckpt"]
)
@pytest.mark.parametrize("damage", ["one byte changed", "cut short", "removed"])
def test_damage_to_any_file_is_found_and_the_one_before_is_in_force(
    name: str, damage: str, model: Any, tmp_path: Path
) -> None:
    save(tmp_path, model, 1)
    path = save(tmp_path, model, 2).folder / name
    content = bytearray(path.read_bytes())
    if damage == "removed":
        path.unlink()
    else:
        content[-1] ^= 1
        path.write_bytes(content if damage == "one byte changed" else content[:-3])
    assert name in str(list_checkpoints(tmp_path)[-1].find_damage())
    said: list[str] = []
    checkpoint = newest_whole(tmp_path, said.append)
    assert checkpoint is not None
    assert checkpoint.step == 1
    assert len(said) == 1
    assert name in said[0]


def test_where_nothing_is_whole_there_is_none(model: Any, tmp_path: Path) -> None:
    (save(tmp_path, model, 1).folder / "training_state.ckpt").unlink()
    assert newest_whole(tmp_path, lambda text: None) is None
    assert newest_whole(tmp_path / "nowhere", lambda text: None) is None


def test_a_folder_torn_by_an_exception_leaves_the_old_one(model: Any, tmp_path: Path) -> None:
    save(tmp_path, model, 5, state=b"old")

    def torn(path: Path) -> None:
        path.write_bytes(b"half of a st")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(
            tmp_path,
            step=5,
            save_adapter=functools.partial(save_adapter, model),
            save_state=torn,
            val_loss=None,
        )
    assert [path.name for path in tmp_path.iterdir()] == ["step-000005"]
    assert list_checkpoints(tmp_path)[0].find_damage() is None
    assert list_checkpoints(tmp_path)[0].state_file.read_bytes() == b"old"


def test_a_folder_that_was_being_written_is_no_checkpoint_and_is_cleared_away(
    model: Any, tmp_path: Path
) -> None:
    save(tmp_path, model, 5)
    save(tmp_path, model, 6).folder.rename(tmp_path / ".writing-step-000006")
    assert steps(tmp_path) == [5]
    prune(tmp_path, keep_last=1, keep_best=0)
    assert [path.name for path in tmp_path.iterdir()] == ["step-000005"]


def test_saving_again_replaces_the_folder(model: Any, tmp_path: Path) -> None:
    save(tmp_path, model, 5, state=b"old")
    assert save(tmp_path, model, 5, state=b"new").state_file.read_bytes() == b"new"
    assert [path.name for path in tmp_path.iterdir()] == ["step-000005"]


def test_prune_keeps_the_last_and_the_best(model: Any, tmp_path: Path) -> None:
    for step, loss in ((1, 0.9), (2, 0.1), (3, 0.3), (4, None), (5, 0.4), (6, 0.5)):
        save(tmp_path, model, step, loss)
    prune(tmp_path, keep_last=2, keep_best=2)
    assert steps(tmp_path) == [2, 3, 5, 6]
    assert best(tmp_path).step == 2
    prune(tmp_path, keep_last=0, keep_best=0)
    assert steps(tmp_path) == [6]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000006"]


def test_a_checkpoint_of_a_newer_format_is_an_error_not_a_gap(model: Any, tmp_path: Path) -> None:
    manifest = save(tmp_path, model, 1).folder / "checkpoint.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "format_version": 99}))
    with pytest.raises(CheckpointError, match="newer lorakit"):
        list_checkpoints(tmp_path)


def test_a_file_that_cannot_be_written_leaves_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "value.json"
    files.write_json(path, {"a": 1})

    def torn(aside: Path) -> None:
        aside.write_text("{")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        files.write_whole(path, torn)
    assert json.loads(path.read_text()) == {"a": 1}
    assert [entry.name for entry in tmp_path.iterdir()] == ["value.json"]


def test_everything_is_synced_before_it_takes_its_name(monkeypatch: Any, tmp_path: Path) -> None:
    synced: list[str] = []
    monkeypatch.setattr(
        files, "_sync", lambda path: synced.append(path.name) or (tmp_path / "done").exists()
    )
    with files.whole_folder(tmp_path / "done") as aside:
        (aside / "inner").mkdir()
        (aside / "inner" / "file").write_text("x")
    assert sorted(synced[:-1]) == [".writing-done", "file", "inner"]
    assert synced[-1] == tmp_path.name

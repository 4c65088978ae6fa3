"""Folders on disk: what is damaged, replaced or torn is never taken for whole."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import pytest
from safetensors import SafetensorError
from tiny_models import make_model

from lorakit.errors import AdapterError, ConfigError
from lorakit.lora.inject import inject
from lorakit.lora.spec import LoRASpec
from lorakit.runs.checkpoint import (
    best,
    list_checkpoints,
    newest_whole,
    prune,
    remove_behind,
    save_checkpoint,
)
from lorakit.runs.files import recover, whole_folder
from lorakit.weights import adapter as adapter_module
from lorakit.weights.adapter import CONFIG_FILE, save_adapter, start_from


@pytest.fixture(scope="module")
def model() -> object:
    return inject(make_model("llama"), LoRASpec(rank=2))


def _save(root: Path, model: object, losses: dict[int, float | None]) -> None:
    for step, loss in losses.items():
        save_checkpoint(
            root,
            step=step,
            save_adapter=functools.partial(save_adapter, model),
            save_state=lambda path: path.write_text("state"),
            val_loss=loss,
        )


def test_a_loss_that_is_not_a_number_is_never_best(tmp_path: Path, model: object) -> None:
    _save(tmp_path, model, {1: float("nan"), 2: 1.0, 3: 2.0, 4: None})
    found = best(tmp_path)
    assert found is not None and found.step == 2
    prune(tmp_path, keep_last=1, keep_best=1)
    assert [checkpoint.step for checkpoint in list_checkpoints(tmp_path)] == [2, 4]


def test_damaged_checkpoints_never_push_out_good_ones(tmp_path: Path, model: object) -> None:
    _save(tmp_path, model, {50: 2.0, 100: 1.0})
    (tmp_path / "step-000100/training_state.ckpt").write_text("torn")
    said: list[str] = []
    good = newest_whole(tmp_path, said.append)
    assert good is not None and good.step == 50 and "step-000100" in said[0]
    found = best(tmp_path)
    assert found is not None and found.step == 50
    remove_behind(tmp_path, 50)
    _save(tmp_path, model, {75: None})
    prune(tmp_path, keep_last=1, keep_best=0)
    assert [checkpoint.step for checkpoint in list_checkpoints(tmp_path)] == [75]


@pytest.mark.parametrize("text", ["null", "[]", "{", "", "{}", None])
def test_a_manifest_that_cannot_be_read_is_passed_over_and_said(
    tmp_path: Path, model: object, text: str | None
) -> None:
    _save(tmp_path, model, {1: None, 2: None})
    manifest = tmp_path / "step-000002/checkpoint.json"
    manifest.unlink()
    if text is not None:
        manifest.write_text(text)
    said: list[str] = []
    assert [checkpoint.step for checkpoint in list_checkpoints(tmp_path, said.append)] == [1]
    assert len(said) == 1 and "step-000002" in said[0]
    found = newest_whole(tmp_path, said.append)
    assert found is not None and found.step == 1


def test_checkpoints_are_sorted_by_number(tmp_path: Path, model: object) -> None:
    _save(tmp_path, model, {1_000_000: None, 999_999: None})
    assert [checkpoint.step for checkpoint in list_checkpoints(tmp_path)] == [999_999, 1_000_000]


def test_a_replaced_folder_survives_a_failing_rename(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "adapter"
    with whole_folder(folder) as aside:
        (aside / "file").write_text("old")
    rename = Path.rename

    def failing(self: Path, target: Path) -> Path:
        if target == folder and self.name.startswith(".writing"):
            raise OSError("no")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OSError, match="no"), whole_folder(folder) as aside:
        (aside / "file").write_text("new")
    assert (folder / "file").read_text() == "old"
    monkeypatch.undo()
    folder.rename(tmp_path / ".replaced-adapter")  # as a crash between the two renames leaves it
    recover(tmp_path)
    assert (folder / "file").read_text() == "old"


def test_safetensors_full_disk_is_an_os_error(
    tmp_path: Path, model: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: object, **options: object) -> None:
        raise SafetensorError("No space left on device")

    monkeypatch.setattr(adapter_module, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        save_adapter(model, tmp_path)


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora", "loftq"])
def test_adapters_that_fit_only_a_changed_base_are_refused(
    tmp_path: Path, model: object, init: str
) -> None:
    save_adapter(model, tmp_path)
    config = json.loads((tmp_path / CONFIG_FILE).read_text())
    (tmp_path / CONFIG_FILE).write_text(json.dumps({**config, "init_lora_weights": init}))
    with pytest.raises(AdapterError, match="a base that was changed"):
        start_from(model, LoRASpec(rank=2, init_from=str(tmp_path), any_base=True), base="x")
    with pytest.raises(ConfigError, match="changes the base"):
        LoRASpec(init=init.split("_")[0])

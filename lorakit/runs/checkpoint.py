"""Checkpoints of a run: a PEFT folder beside Lightning's training state, whole or not there."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from lorakit.errors import CheckpointError
from lorakit.runs.files import ASIDE, whole_folder

STATE_FILE, MANIFEST_FILE = "training_state.ckpt", "checkpoint.json"
FORMAT_VERSION = 1


class _Manifest(msgspec.Struct):
    format_version: int
    step: int
    val_loss: float | None
    sha256: dict[str, str]


@dataclass(frozen=True)
class Checkpoint:
    """One folder ``step-000100``."""

    folder: Path
    step: int
    val_loss: float | None
    digests: dict[str, str]

    @property
    def state_file(self) -> Path:
        return self.folder / STATE_FILE

    def find_damage(self) -> str | None:
        """Return what is wrong with the files, compared with their digests, or None."""
        for name, digest in self.digests.items():
            path = self.folder / name
            if not path.is_file():
                return f"{path} is missing"
            if _digest(path) != digest:
                return f"{path} is not as it was written"
        return None


def save_checkpoint(
    root: Path,
    *,
    step: int,
    save_adapter: Callable[[Path], Any],
    save_state: Callable[[Path], Any],
    val_loss: float | None,
) -> Checkpoint:
    """Write ``root/step-<step>``: adapter, training state, and a manifest with the digests of
    both. Raises OSError.
    """
    folder = root / f"step-{step:06d}"
    with whole_folder(folder) as aside:
        save_adapter(aside)
        save_state(aside / STATE_FILE)
        digests = {path.name: _digest(path) for path in sorted(aside.iterdir())}
        manifest = {
            "format_version": FORMAT_VERSION,
            "step": step,
            "val_loss": val_loss,
            "sha256": digests,
        }
        (aside / MANIFEST_FILE).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    return Checkpoint(folder, step, val_loss, digests)


def list_checkpoints(root: Path, say: Callable[[str], Any] = lambda text: None) -> list[Checkpoint]:
    """Return the checkpoints in ``root``, oldest first; ``say`` hears of folders whose manifest
    cannot be read.

    What was being written when a run died bears another name and is not among them.
    """
    found = []
    for folder in root.glob("step-*"):
        try:
            manifest = msgspec.json.decode((folder / MANIFEST_FILE).read_bytes(), type=_Manifest)
        except (OSError, msgspec.MsgspecError) as error:
            say(f"checkpoint passed over: {folder / MANIFEST_FILE} cannot be read ({error})")
            continue
        if manifest.format_version > FORMAT_VERSION:
            raise CheckpointError(
                f"{folder} was written by a newer lorakit (format {manifest.format_version})"
            )
        found.append(Checkpoint(folder, manifest.step, manifest.val_loss, manifest.sha256))
    return sorted(found, key=lambda checkpoint: checkpoint.step)


def newest_whole(root: Path, say: Callable[[str], Any]) -> Checkpoint | None:
    """Return the newest checkpoint whose files are as they were written; ``say`` hears of each
    that is passed over.
    """
    for checkpoint in reversed(list_checkpoints(root, say)):
        damage = checkpoint.find_damage()
        if damage is None:
            return checkpoint
        say(f"checkpoint passed over: {damage}")
    return None


def prune(root: Path, *, keep_last: int, keep_best: int) -> None:
    """Remove all but the newest ``keep_last`` and the ``keep_best`` with the lowest evaluation
    loss, and what was never finished.
    """
    checkpoints = list_checkpoints(root)
    newest, scored = checkpoints[-max(keep_last, 1) :], _by_loss(checkpoints)
    kept = {checkpoint.folder for checkpoint in (*newest, *scored[:keep_best])}
    for checkpoint in checkpoints:
        if checkpoint.folder not in kept:
            _remove(checkpoint)
    for leftover in root.glob(f"{ASIDE}*"):
        shutil.rmtree(leftover, ignore_errors=True)


def best(root: Path) -> Checkpoint | None:
    """Return the checkpoint with the lowest evaluation loss, or None where none was evaluated."""
    return next((c for c in _by_loss(list_checkpoints(root)) if c.find_damage() is None), None)


def remove_behind(root: Path, step: int) -> None:
    """Remove the checkpoints after ``step``, from which a run continues: they are damaged, or
    soon written anew.
    """
    for checkpoint in list_checkpoints(root):
        if checkpoint.step > step:
            _remove(checkpoint)


def _by_loss(checkpoints: list[Checkpoint]) -> list[Checkpoint]:
    scored = [c for c in checkpoints if c.val_loss is not None and math.isfinite(c.val_loss)]
    return sorted(scored, key=lambda c: (c.val_loss or 0.0, -c.step))


def _remove(checkpoint: Checkpoint) -> None:
    # The manifest goes first: a folder without one is no checkpoint, whatever a crash leaves of it.
    (checkpoint.folder / MANIFEST_FILE).unlink(missing_ok=True)
    shutil.rmtree(checkpoint.folder, ignore_errors=True)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

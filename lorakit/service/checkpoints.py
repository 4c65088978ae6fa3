"""What was saved: checkpoints in folders, and what the database knows of them. A folder is not
replaced or removed while it is read.
"""

from __future__ import annotations

import contextlib
import datetime
import re
import shutil
import threading
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sqlalchemy as sa
import torch

from lorakit.errors import CheckpointError
from lorakit.lora.flat_parameters import FlatParameters
from lorakit.runs.files import recover
from lorakit.service.database import Checkpoint, Database, now
from lorakit.weights.trained_state import SavedState, open_trained_state, save_trained_state

LOCAL_OWNER = "local"  # may name folders, too
KINDS = ("weights", "sampler_weights", "external_weights")
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.=+-]{0,127}")


@dataclass(frozen=True)
class SaveOptions:
    """How something is to be saved."""

    kind: str
    name: str
    overwrite: bool = False
    ttl_seconds: int | None = None
    user_metadata: Mapping[str, str] | None = None


class CheckpointRegistry:
    """The checkpoints of a database's runs: the only code that touches their rows and folders."""

    def __init__(self, database: Database) -> None:
        self._database = database
        # Of a run, under which its folders, and their rows, change: a large one of another run
        # keeps nobody waiting.
        self._locks: defaultdict[str, threading.RLock] = defaultdict(threading.RLock)

    def save(
        self,
        run_id: str,
        wanted: SaveOptions,
        layout: FlatParameters,
        vector: torch.Tensor,
        optimizer_state: Mapping[str, torch.Tensor] | None,
        facts: dict[str, Any],
    ) -> Checkpoint:
        """Write a checkpoint of a run, whole or not at all. Raises CheckpointError."""
        with self._locks[run_id]:
            folder = self._folder(run_id, wanted.kind, wanted.name)
            if folder.exists() and not wanted.overwrite:
                path = f"tinker://{run_id}/{wanted.kind}/{wanted.name}"
                raise CheckpointError(f"{path} exists; choose another name, or overwrite=True")
            try:
                size = save_trained_state(folder, layout, vector, optimizer_state, facts)
            except OSError as error:
                raise CheckpointError(
                    f"{wanted.name} was not saved: {error.strerror or error}"
                ) from error
            saved = Checkpoint(
                run_id=run_id,
                kind=wanted.kind,
                name=wanted.name,
                created=now(),
                size_bytes=size,
                expires=_after(wanted.ttl_seconds),
                user_metadata=dict(wanted.user_metadata or {}),
            )
            self._database.add(saved)
            return saved

    @contextlib.contextmanager
    def opened(self, path: str, owner: str) -> Iterator[SavedState]:
        """Yield what is at ``path``, which stays as it is inside the block. Raises
        CheckpointError, AdapterError.

        Args:
            path: ``tinker://…``, or a folder of any PEFT adapter.
        """
        if not path.startswith("tinker://"):
            yield open_trained_state(_local_folder(path, owner))
            return
        self.find(path, owner)
        with self.reading(*parse_path(path)) as folder:
            yield open_trained_state(folder)

    @contextlib.contextmanager
    def reading(self, run_id: str, kind: str, name: str) -> Iterator[Path]:
        """Yield a checkpoint's folder, which stays as it is inside the block. Raises
        CheckpointError where there is none.
        """
        with self._locks[run_id]:
            folder = self._folder(run_id, kind, name)
            if self.get(run_id, kind, name) is None or not folder.is_dir():
                raise CheckpointError(f"there is no checkpoint tinker://{run_id}/{kind}/{name}")
            yield folder

    def base_of(self, path: str, owner: str) -> str:
        """Return the base's name of ``path``. Raises CheckpointError, AdapterError."""
        if path.startswith("tinker://"):
            self.find(path, owner)
            return self._database.run(parse_path(path)[0], owner).base_model
        state = open_trained_state(_local_folder(path, owner))
        facts, config = state.facts, state.adapter.config
        return str(facts.get("base_model") or config.get("base_model_name_or_path") or "")

    def find(self, path: str, owner: str) -> Checkpoint:
        """Return what is known of a checkpoint. Raises CheckpointError where there is none."""
        run_id, kind, name = parse_path(path)
        self._database.run(run_id, owner)
        if (found := self.get(run_id, kind, name)) is None:
            raise CheckpointError(f"there is no checkpoint {path}")
        return found

    def set_ttl(self, path: str, owner: str, seconds: int | None) -> Checkpoint:
        """Remove a checkpoint after ``seconds``, or never. Raises CheckpointError."""
        with self._locks[parse_path(path)[0]]:
            found = self.find(path, owner)
            found.expires = _after(seconds)
            self._database.add(found)
            return found

    def delete(self, path: str, owner: str) -> None:
        """Remove a checkpoint. Raises CheckpointError where there is none."""
        with self._locks[parse_path(path)[0]]:
            self._remove(self.find(path, owner))

    def delete_expired(self) -> None:
        """Remove checkpoints whose time is over."""
        for run_id in {checkpoint.run_id for checkpoint in self._expired()}:
            with self._locks[run_id]:
                # read again: one may have been written over
                for checkpoint in self._expired():
                    if checkpoint.run_id == run_id:
                        self._remove(checkpoint)

    def get(self, run_id: str, kind: str, name: str) -> Checkpoint | None:
        """Return what is known of a checkpoint, whatever user owns it, or None."""
        with self._database.session() as session:
            return session.get(Checkpoint, (run_id, kind, name))

    def of_runs(self, run_ids: list[str]) -> list[Checkpoint]:
        """Return the checkpoints of these runs, last first."""
        with self._database.session() as session:
            wanted = sa.select(Checkpoint).where(Checkpoint.run_id.in_(run_ids))
            return list(session.scalars(wanted.order_by(Checkpoint.created.desc())))

    def _expired(self) -> list[Checkpoint]:
        with self._database.session() as session:
            return list(session.scalars(sa.select(Checkpoint).where(Checkpoint.expires < now())))

    def _remove(self, checkpoint: Checkpoint) -> None:
        with self._database.session() as session:
            session.delete(checkpoint)
        folder = self._folder(checkpoint.run_id, checkpoint.kind, checkpoint.name)
        shutil.rmtree(folder, ignore_errors=True)

    def _folder(self, run_id: str, kind: str, name: str) -> Path:
        check_name(name)
        root = self._database.folder / "checkpoints"
        folder = root / run_id.replace(":", "_") / kind / name
        if folder.parent.is_dir():
            recover(folder.parent)
        return folder


def check_name(name: str) -> None:
    """Raise CheckpointError for a name of a checkpoint that a folder cannot have."""
    if not _NAME.fullmatch(name):
        raise CheckpointError(
            f"{name!r} cannot be a checkpoint's name: up to 128 letters, digits and _.=+- it may"
            " have, the first a letter, a digit or _"
        )


def parse_path(path: str) -> tuple[str, str, str]:
    """Return run, kind and name of ``tinker://run/kind/name``. Raises CheckpointError."""
    parts = path.removeprefix("tinker://").split("/")
    if not path.startswith("tinker://") or len(parts) != 3 or parts[1] not in KINDS or not parts[0]:
        raise CheckpointError(
            f"{path!r} is no path of a checkpoint: tinker://RUN/{{{','.join(KINDS)}}}/NAME"
        )
    check_name(parts[2])
    return parts[0], parts[1], parts[2]


def _after(seconds: int | None) -> datetime.datetime | None:
    return None if seconds is None else now() + datetime.timedelta(seconds=seconds)


def _local_folder(path: str, owner: str) -> Path:
    folder = Path(path).expanduser()
    if owner != LOCAL_OWNER or not folder.is_dir():
        raise CheckpointError(
            f"{path!r} is no path of a checkpoint (tinker://RUN/KIND/NAME), nor a folder here"
        )
    return folder

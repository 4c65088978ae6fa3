"""One W&B run for one run folder: a resume continues it, and writes no step twice."""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities import rank_zero_only

from lorakit.errors import CheckpointError, ConfigError
from lorakit.runs.folder import History, open_run

STEP = "trainer/global_step"  # what Lightning calls the step


class WandbRun(WandbLogger):
    """Lightning's logger, whose run keeps its id for as long as its run folder exists.

    Args:
        save_dir: the run's folder.
        project: None is that of WANDB_PROJECT, or lorakit; so are entity, group and tags W&B's own
            variables.
        name: of the run; None is the folder's.
        group: under which W&B shows several runs together.
        mode: online, offline, disabled; auto is offline where there is no API key, for which it
            never asks.
        options: further ones of ``wandb.init``.

    Raises:
        ConfigError: there is no such mode, or no key for mode=online.
    """

    def __init__(
        self,
        *,
        save_dir: str,
        entity: str | None = None,
        project: str | None = None,
        name: str | None = None,
        group: str | None = None,
        tags: list[str] | None = None,
        mode: str = "auto",
        **options: Any,
    ) -> None:
        self.folder = Path(save_dir).absolute()  # W&B's own process may have started elsewhere
        options.setdefault("id", _run_id(self.folder))
        mode = resolve_mode(mode)
        if "offline" in options:
            raise ConfigError("logger.wandb.offline is gone; set logger.wandb.mode=offline")
        super().__init__(
            save_dir=str(self.folder),
            project=resolve_project(project),
            name=name,
            group=group,
            offline=mode == "offline",
            resume="allow",
            entity=entity,
            tags=tags,
            mode=mode,
            **options,
        )
        self._logged: dict[str, int] | None = None

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Log what the files of this run do not hold yet.

        A run that continues repeats its last steps; and of what W&B was given before a
        kill, some may never have been written.
        """
        if step is not None and self._logged is None:
            self._logged = last_steps(self.folder)
            for record in History(self.folder).read():
                if record["step"] - 1 < step:  # Lightning counts from 0 for a logger
                    figures = {
                        key: value for key, value in record.items() if key not in ("step", "epoch")
                    }
                    self._log_fresh(figures, record["step"] - 1)
        self._log_fresh(metrics, step)

    def _log_fresh(self, metrics: Mapping[str, Any], step: int | None) -> None:
        logged = self._logged or {}
        fresh = {
            key: value
            for key, value in metrics.items()
            if step is None or step > logged.get(key, -1)
        }
        if fresh:
            super().log_metrics(fresh, step)


def resolve_project(project: str | None) -> str:
    """The project's name where the config has none."""
    return project or os.environ.get("WANDB_PROJECT") or "lorakit"


def resolve_mode(mode: str) -> str:
    """What ``mode`` comes to on this machine. Raises ConfigError."""
    if mode not in ("auto", "online", "offline", "disabled"):
        raise ConfigError(
            f"logger.wandb.mode={mode} is unknown; choose auto, online, offline or disabled"
        )
    if mode == "online" and not has_key():
        raise ConfigError(
            "logger.wandb.mode=online, but there is no API key: run `wandb login`, or set"
            " WANDB_API_KEY"
        )
    if mode != "auto":
        return mode
    if (asked := os.environ.get("WANDB_MODE", "")) in ("offline", "disabled"):
        return asked
    return "online" if has_key() else "offline"


def has_key() -> bool:
    """Whether W&B would find an API key."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    netrc = Path(os.environ.get("NETRC") or Path.home() / ".netrc")
    return netrc.is_file() and "wandb" in netrc.read_text(encoding="utf-8", errors="replace")


def last_steps(folder: Path) -> dict[str, int]:
    """Return the last step of each figure, and of each table, in the W&B files below ``folder``."""
    found: dict[str, int] = {}
    for record in read_history(folder):
        for key in record.keys() - {STEP}:
            for name in (key, key.rpartition("/")[0]):  # a table is several keys below its own
                found[name] = max(found.get(name, -1), int(record.get(STEP, -1)))
    return found


def read_history(folder: Path) -> Iterator[dict[str, Any]]:
    """Yield the history of the W&B files below the run's ``folder``, by their start.
    (wandb 0.31 has no reader for its own files.)
    """
    from google.protobuf.message import DecodeError
    from wandb.proto import wandb_internal_pb2

    messages: Any = wandb_internal_pb2  # made at import time: no type checker sees what is in it
    files = folder.glob("wandb/*run-*/*.wandb")
    for path in sorted(files, key=lambda path: path.parent.name.split("run-")[-1]):
        for data in read_records(path.read_bytes()):
            record = messages.Record()
            try:
                record.ParseFromString(data)
            except DecodeError:  # torn by a kill
                break
            if record.WhichOneof("record_type") == "history":
                yield {
                    item.key or "/".join(item.nested_key): json.loads(item.value_json)
                    for item in record.history.item
                }


def read_records(data: bytes) -> Iterator[bytes]:
    """Yield the whole records of a W&B file; what a kill has torn is left out.

    It is a header of 7 bytes and LevelDB's log: in blocks of 32 KiB, (crc 4, length 2, type 1) and
    a chunk.
    """
    position, record = 7, b""
    while position + 7 <= len(data):
        if 32768 - position % 32768 < 7:
            position += 32768 - position % 32768
            continue
        length, kind = struct.unpack_from("<HB", data, position + 4)
        if kind == 0 or position + 7 + length > len(data):
            return
        record = (b"" if kind in (1, 2) else record) + data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or last of several
            yield record
            record = b""


def _run_id(folder: Path) -> str | None:
    """The id of the run folder, which never changes, or None where ``folder`` is none."""
    try:
        run = open_run(folder)
    except CheckpointError:
        return None
    return hashlib.sha256(f"{run.info.get('created')} {run.name}".encode()).hexdigest()[:16]

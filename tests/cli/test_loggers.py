"""Loggers write real files, read back here."""

from __future__ import annotations

import csv
import json
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from small import SMALL

Call = Callable[..., tuple[int, str, str]]


def test_an_offline_wandb_run_holds_losses_config_and_samples(
    workplace: Path, lorakit: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    from wandb.proto.wandb_internal_pb2 import Record

    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(workplace))  # no ~/.netrc with a key
    code, _, err = lorakit("train", "logger=wandb", "run=one", "trainer.max_steps=2", *SMALL)
    assert code == 0, err
    (file,) = workplace.glob("runs/one/wandb/offline-run-*/*.wandb")
    losses, tables = [], 0
    config: dict[str, str] = {}
    for data in _records(file.read_bytes()):
        record = Record()
        record.ParseFromString(data)
        for update in record.config.update:
            config[update.key or ".".join(update.nested_key)] = update.value_json
        items = {item.key or "/".join(item.nested_key): item.value_json for item in record.history.item}
        losses += [json.loads(items["train/loss"])] if "train/loss" in items else []
        tables += any("table-file" in value for value in items.values())
    history = [json.loads(line) for line in (workplace / "runs/one/history.jsonl").read_text().splitlines()]
    assert losses == pytest.approx([line["train/loss"] for line in history if "train/loss" in line])
    assert tables == 1
    assert json.loads(config["lora"])["rank"] == 4


def _records(data: bytes) -> Iterator[bytes]:
    """W&B's file is a header of 7 bytes and LevelDB's log: in blocks of 32 KiB, (crc 4, length 2, type 1) and a chunk."""
    assert data.startswith(b":W&B")
    position, record = 7, b""
    while position + 7 <= len(data):
        if 32768 - position % 32768 < 7:
            position += 32768 - position % 32768
            continue
        length, kind = struct.unpack_from("<HB", data, position + 4)
        record += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or last of several
            yield record
            record = b""


def test_csv_and_tensorboard_hold_every_step(workplace: Path, lorakit: Call) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    code, _, err = lorakit("train", "logger=[csv,tensorboard]", "run=one", "trainer.max_steps=3", *SMALL)
    assert code == 0, err
    (file,) = workplace.glob("runs/one/csv/**/metrics.csv")
    losses = [float(row["train/loss"]) for row in csv.DictReader(file.open()) if row["train/loss"]]
    (folder,) = {path.parent for path in workplace.glob("runs/one/tensorboard/**/events.*")}
    events = EventAccumulator(str(folder)).Reload()
    assert [event.value for event in events.Scalars("train/loss")] == pytest.approx(losses, rel=1e-5)
    assert len(losses) == 3

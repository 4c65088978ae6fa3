"""Loggers write real files, read back here."""

from __future__ import annotations

import csv
import json
import re
import time
from collections.abc import Callable
from pathlib import Path

import preloaded
import psutil
import pytest
import yaml
from program import start
from small import SMALL

from lorakit.callbacks.wandb_run import read_history, read_records, resolve_mode, resolve_project
from lorakit.errors import ConfigError
from lorakit.runs.folder import History

Call = Callable[..., tuple[int, str, str]]


def test_an_offline_wandb_run_holds_losses_config_and_samples(
    workplace: Path, lorakit: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    from wandb.proto.wandb_internal_pb2 import Record

    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(workplace))  # no ~/.netrc with a key
    named = (
        "logger.wandb.entity=us",
        "logger.wandb.project=pigs",
        "logger.wandb.tags=[small,first]",
        "logger.wandb.name=pig-1",
    )
    code, out, err = lorakit(
        "train", "logger=wandb", *named, "run=one", "group=many", "trainer.max_steps=2", *SMALL
    )
    assert code == 0, err
    assert re.search(
        r"in all \d+\.\d s, of which \d+\.\d s for 1 evaluation with samples\n", out
    ), out
    assert re.search(r"next: lorakit sample one -- \$'English: .*\\nPig Latin:'    or: ", out), out
    (file,) = workplace.glob("runs/one/wandb/offline-run-*/*.wandb")
    assert f"the W&B run is offline; upload it with: wandb sync {file.parent}\n" in out
    losses, tables = [], 0
    config: dict[str, str] = {}
    for data in read_records(file.read_bytes()):
        record = Record()
        record.ParseFromString(data)
        if record.HasField("run"):
            run = record.run
            found = (run.entity, run.project, [*run.tags], run.display_name, run.run_group)
            assert found == ("us", "pigs", ["small", "first"], "pig-1", "many")
        for update in record.config.update:
            config[update.key or ".".join(update.nested_key)] = update.value_json
        items = {
            item.key or "/".join(item.nested_key): item.value_json for item in record.history.item
        }
        losses += [json.loads(items["train/loss"])] if "train/loss" in items else []
        tables += any("table-file" in value for value in items.values())
    history = [
        json.loads(line) for line in (workplace / "runs/one/history.jsonl").read_text().splitlines()
    ]
    assert losses == pytest.approx([line["train/loss"] for line in history if "train/loss" in line])
    assert tables == 1
    assert json.loads(config["lora"])["rank"] == 4
    whole, data = [*read_history(workplace / "runs/one")], file.read_bytes()
    # a kill tears the file, or leaves zeros behind what was written
    for cut in range(7, len(data), 97):
        for torn in (data[:cut], data[:cut] + bytes(len(data) - cut)):
            file.write_bytes(torn)
            left = [*read_history(workplace / "runs/one")]
            assert left == whole[: len(left)]


def test_the_runs_of_a_sweep_are_one_group_of_wandb(
    workplace: Path, lorakit: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    from wandb.proto.wandb_internal_pb2 import Record

    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(workplace))
    code, _, err = lorakit(
        "train",
        "-m",
        "optim.lr=1e-3,2e-3",
        "logger=wandb",
        "trainer.max_steps=1",
        *SMALL,
        "data.val_rows=2",
    )
    assert code == 0, err
    groups = []
    for file in workplace.glob("runs/*/wandb/offline-run-*/*.wandb"):
        for data in read_records(file.read_bytes()):
            record = Record()
            record.ParseFromString(data)
            groups += [record.run.run_group] if record.HasField("run") else []
    written = {
        yaml.safe_load(file.read_text())["group"] for file in workplace.glob("runs/*/config.yaml")
    }
    assert len(groups) == 2 and {*groups} == written and groups[0].startswith("sweep-")


@pytest.mark.slow
def test_a_killed_run_that_goes_on_is_one_run_of_wandb_and_no_step_is_there_twice(
    workplace: Path,
) -> None:
    settings = (
        "logger=wandb",
        "run=one",
        "checkpoint.every_steps=4",
        "trainer.max_steps=400",
        "trainer.eval_every_steps=100",
    )
    settings = (*SMALL, *settings, "trainer.devices=2", "trainer.threads=1")
    folder, environment = (
        workplace / "runs" / "one",
        {"HOME": str(workplace), "WANDB_API_KEY": "", "OMP_NUM_THREADS": "1"},
    )
    first = start("train", *settings, cwd=workplace, env=environment)
    _wait_for_step(folder, 7, first)
    for child in psutil.Process(first.pid).children(recursive=True):
        child.kill()  # W&B's own process too, and with it what it has not written yet
    first.communicate(timeout=60)
    done = max(record["step"] for record in History(folder).read())

    second = start("train", *settings, "resume=true", cwd=workplace, env=environment)
    _wait_for_step(folder, done + 3, second)
    second.terminate()
    output, _ = second.communicate(timeout=60)
    folders = sorted(folder.glob("wandb/offline-run-*"))
    assert (
        len(folders) == 2 and len({path.name.split("-")[-1] for path in folders}) == 1
    )  # one id, and one of two processes writes
    assert all(path.name in output for path in folders)
    ours = {
        record["step"]: record["train/loss"]
        for record in History(folder).read()
        if "train/loss" in record
    }
    logged = [
        (record["trainer/global_step"] + 1, record["train/loss"])
        for record in read_history(folder)
        if "train/loss" in record
    ]
    assert [step for step, _ in logged] == [*range(1, len(ours) + 1)] and len(ours) >= done + 3
    assert dict(logged) == pytest.approx(ours)


def _wait_for_step(folder: Path, step: int, process: preloaded.Process) -> None:
    end = time.monotonic() + 120
    while max((record["step"] for record in History(folder).read()), default=0) < step:
        assert process.poll() is None and time.monotonic() < end, process.communicate()[1][-6000:]
        time.sleep(0.1)


def test_csv_and_tensorboard_hold_every_step(workplace: Path, lorakit: Call) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    code, _, err = lorakit(
        "train", "logger=[csv,tensorboard]", "run=one", "trainer.max_steps=3", *SMALL
    )
    assert code == 0, err
    (file,) = workplace.glob("runs/one/csv/**/metrics.csv")
    losses = [float(row["train/loss"]) for row in csv.DictReader(file.open()) if row["train/loss"]]
    (folder,) = {path.parent for path in workplace.glob("runs/one/tensorboard/**/events.*")}
    events = EventAccumulator(str(folder)).Reload()
    assert [event.value for event in events.Scalars("train/loss")] == pytest.approx(
        losses, rel=1e-5
    )
    assert len(losses) == 3


@pytest.mark.parametrize(
    ("mode", "key", "variable", "expected"),
    [
        ("auto", "", "", "offline"),
        ("auto", "k", "", "online"),
        ("auto", "k", "offline", "offline"),
        ("auto", "", "disabled", "disabled"),
        ("offline", "k", "", "offline"),
        ("online", "k", "offline", "online"),
        ("disabled", "k", "", "disabled"),
        ("online", "", "", "mode=online, but there is no API key: run `wandb login`"),
        ("of", "k", "", "mode=of is unknown; choose auto, online, offline or disabled"),
    ],
)
def test_the_mode_is_what_is_set_or_what_a_key_allows(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    mode: str,
    key: str,
    variable: str,
    expected: str,
) -> None:
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.setenv("WANDB_API_KEY", key)
    monkeypatch.setenv("WANDB_MODE", variable)
    if len(expected) > 8:
        with pytest.raises(ConfigError, match=expected):
            resolve_mode(mode)
    else:
        assert resolve_mode(mode) == expected


def test_the_variables_of_wandb_hold_where_nothing_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    assert resolve_project(None) == "lorakit"
    monkeypatch.setenv("WANDB_PROJECT", "theirs")
    assert (resolve_project(None), resolve_project("ours")) == ("theirs", "ours")

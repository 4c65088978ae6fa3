"""`lorakit fetch` from a hub, then a run, its sampling and its merge with every socket
forbidden.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import preloaded
import pytest
from hub_stand_in import COMMIT, Hub
from program import REPOSITORY

from lorakit.model.load import BUNDLED

# Loaded by Python before anything else: no connection, no question for an address.
NO_SOCKETS = """
import socket
def refuse(*args, **options):
    raise RuntimeError(f"a socket was asked for: {args}")
socket.socket.connect = socket.socket.connect_ex = socket.socket.bind = refuse
socket.getaddrinfo = socket.create_connection = refuse
"""
RUN = (
    "model.path=me/tiny",
    "data.path=me/rows",
    "run=it",
    "trainer.max_steps=2",
    "data.batch_size=2",
    "lora.rank=4",
    "logger=csv",
)


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    """A hub with a model and a data set, a gated model, and another of which the weights are
    missing.
    """
    root = tmp_path / "hub"
    shutil.copytree(BUNDLED["tiny"], root / "models/me/tiny")
    (root / "models/me/tiny/pytorch_model.bin").write_bytes(b"not wanted")
    (root / "models/me/gated").mkdir()
    (root / "datasets/me/rows").mkdir(parents=True)
    rows = [{"prompt": f"{i}:", "completion": f" {i * i}"} for i in range(6)]
    (root / "datasets/me/rows/train.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in rows)
    )
    with Hub(root, gated=("me/gated",)).serving() as serving:
        yield serving


def lorakit(
    folder: Path, *arguments: str, hub: Hub | None, offline: bool = False, sockets: bool = True
) -> tuple[int, str, str]:
    environment = {
        **os.environ,
        "HF_HOME": str(folder / "cache"),
        "PYTHONPATH": str(REPOSITORY),
        "HF_HUB_DISABLE_XET": "1",
    }
    for name in (
        "HF_HUB_OFFLINE",
        "HF_DATASETS_OFFLINE",
        "HF_TOKEN",
        "HF_ENDPOINT",
        "HF_DATASETS_CACHE",
        "HF_HUB_CACHE",
    ):
        environment.pop(name, None)
    environment |= {"HF_ENDPOINT": hub.address} if hub else {}
    environment |= {"HF_HUB_OFFLINE": "1"} if offline else {}
    if not sockets:
        (folder / "site").mkdir(exist_ok=True)
        (folder / "site/sitecustomize.py").write_text(NO_SOCKETS)
        environment["PYTHONPATH"] = f"{folder / 'site'}:{REPOSITORY}"
    program = ["-m", "lorakit", *arguments]
    done = preloaded.run(program, cwd=folder, env=environment, timeout=240)
    return done.returncode, done.stdout, done.stderr


def test_what_was_fetched_trains_samples_and_merges_without_a_socket(
    tmp_path: Path, hub: Hub
) -> None:
    code, out, err = lorakit(tmp_path, "fetch", *RUN, hub=hub)
    assert code == 0, err
    assert (
        "model me/tiny:" in out and f"snapshots/{COMMIT}" in out and "data me/rows: 6 rows" in out
    )
    assert "without a network: HF_HUB_OFFLINE=1 lorakit train model.path=me/tiny" in out
    assert not any("pytorch_model.bin" in asked for asked in hub.asked if asked.startswith("GET"))
    before = len(hub.asked)
    for arguments in (
        ("train", *RUN),
        ("sample", "it", "--max-tokens", "3", "--", "2:"),
        ("merge", "it", "--out", "merged"),
    ):
        code, _, err = lorakit(tmp_path, *arguments, hub=hub, offline=True, sockets=False)
        assert code == 0, (arguments, err)
    assert len(hub.asked) == before and (tmp_path / "merged/model.safetensors").is_file()


def test_a_folder_stays_where_it_is_and_rows_of_any_name_are_found_again(
    tmp_path: Path, hub: Hub
) -> None:
    shutil.copytree(hub.root / "models/me/tiny", tmp_path / "my/model")
    shutil.copytree(hub.root / "datasets/me/rows", hub.root / "datasets/Open-Me/SlimRows")
    settings = (
        "model.path=my/model",
        "data.path=Open-Me/SlimRows",
        "eval.retain_path=me/rows",
        *RUN[2:],
    )
    code, out, err = lorakit(tmp_path, "fetch", *settings, hub=hub)
    assert code == 0, err
    assert "data Open-Me/SlimRows: 6 rows" in out and "unrelated me/rows: 6 rows" in out
    code, _, err = lorakit(tmp_path, "train", *settings, hub=hub, offline=True, sockets=False)
    assert code == 0, err


def test_a_revision_is_the_one_that_is_fetched_and_trained_on(tmp_path: Path, hub: Hub) -> None:
    settings = (
        "experiment=chat_sft",
        "model.path=me/tiny",
        "data.path=me/rows",
        "data.chat_template=chatml",
    )
    settings += ("trainer.max_steps=1", "callbacks.samples=null", "logger=csv")
    code, out, err = lorakit(tmp_path, "fetch", *settings, f"model.revision={COMMIT}", hub=hub)
    assert code == 0 and f"snapshots/{COMMIT}" in out, err
    asked = [line for line in hub.asked if "me/tiny" in line]
    assert any(COMMIT in line for line in asked) and not any("/main" in line for line in asked)
    code, _, err = lorakit(
        tmp_path,
        "train",
        *settings,
        f"model.revision={COMMIT}",
        hub=hub,
        offline=True,
        sockets=False,
    )
    assert code == 0, err
    # main was not fetched
    code, _, err = lorakit(tmp_path, "train", *settings, hub=hub, offline=True, sockets=False)
    assert code == 2 and "`hf download me/tiny`" in err


def test_the_control_a_socket_is_noticed(tmp_path: Path, hub: Hub) -> None:
    code, _, err = lorakit(tmp_path, "fetch", "model.path=me/tiny", hub=hub, sockets=False)
    assert code != 0 and "a socket was asked for" in err


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            ("model.path=me/gated",),
            "me/gated is gated: accept its terms on its page of the hub, then `hf auth login`",
        ),
        (
            ("model.path=me/absent",),
            (
                "me/absent: the hub has no such name, or shows it to others only: check it, or `hf"
                " auth login`"
            ),
        ),
        (("model.path=me/tiny", "model.revision=v9"), "me/tiny has no such revision"),
        (("data.path=me/nothing",), "me/nothing: the hub has no such name"),
    ],
    ids=str,
)
@pytest.mark.parametrize("command", ["fetch", pytest.param("train", marks=pytest.mark.slow)])
def test_what_the_hub_refuses_is_one_message(
    tmp_path: Path, hub: Hub, command: str, settings: tuple[str, ...], words: str
) -> None:
    more = [] if any(text.startswith("data.path") for text in settings) else ["data.path=me/rows"]
    if command == "train" and not any(text.startswith("model.path") for text in settings):
        more.append("model.path=me/tiny")
    code, _, err = lorakit(tmp_path, command, *settings, *more, hub=hub)
    assert code == 2 and words in err and "Traceback" not in err, err


def test_a_name_that_was_not_fetched_says_how_to(tmp_path: Path, hub: Hub) -> None:
    code, _, err = lorakit(tmp_path, "train", *RUN, hub=hub, offline=True, sockets=False)
    assert code == 2 and "not in the cache, and HF_HUB_OFFLINE=1 is set" in err
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    code, _, err = lorakit(
        tmp_path,
        "train",
        "model.path=me/tiny",
        "data.path=rows.jsonl",
        hub=hub,
        offline=True,
        sockets=False,
    )
    assert code == 2 and "`hf download me/tiny`" in err

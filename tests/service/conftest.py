"""A service in this process on the tiny model, and a server of the command line that the real
SDK talks to.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from serving import Server

import lorakit
from lorakit.service.base import Base


@pytest.fixture(scope="session")
def tiny_base() -> Base:
    return Base.load("tiny", accelerator="cpu")


@pytest.fixture
def service(tmp_path: Path) -> Iterator[lorakit.ServiceClient]:
    with lorakit.ServiceClient(folder=tmp_path / "service", accelerator="cpu") as client:
        yield client


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    started = Server.start(tmp_path_factory.mktemp("server"), models=("tiny", "Qwen/Qwen3-8B=tiny"))
    yield started
    started.stop()


@pytest.fixture
def sdk(server: Server, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The real SDK, told of the server by the printed variables."""
    variables = server.environment()
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    # Read when it was imported; in a program of its own the variables are enough, as recipes show.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", f"{variables['HF_HOME']}/hub")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    import tinker

    return tinker

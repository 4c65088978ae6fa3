"""Runs of the real program on the bundled model, in process (imports cost seconds) or as a
process of its own.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to run in."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.delenv("LORAKIT_DEBUG", raising=False)
    return tmp_path


@pytest.fixture
def lorakit(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """Call a command in this process as the program does; returns (exit code, standard output,
    standard error).
    """
    import importlib

    def call(command: str, *arguments: str) -> tuple[int, str, str]:
        from hydra.core.global_hydra import GlobalHydra

        from lorakit.cli.guard import run_command

        GlobalHydra.instance().clear()
        monkeypatch.setattr(sys, "argv", [f"lorakit/cli/{command}.py", *arguments])
        module = importlib.import_module(f"lorakit.cli.{command}")
        capsys.readouterr()
        try:
            run_command(module.main)
            code = 0
        except SystemExit as error:
            code = int(error.code or 0)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call

"""What every test shares: scripts/ can be imported, nothing reaches for the network, and caches
go to a folder of their own.
"""

from __future__ import annotations

import importlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import hypothesis
import pytest
from preloaded import ADDRESS

# before any test loads torch: it says how OpenMP's threads wait for one another
importlib.import_module("lorakit")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts" / "bench"))

_cache = tempfile.TemporaryDirectory(prefix="lorakit-tests-")  # removed when the process ends
os.environ["HF_DATASETS_CACHE"] = _cache.name
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

# No deadline, since machines are shared; the same examples every time; no folder of hypothesis's
# own in the checkout.
hypothesis.settings.register_profile(
    "lorakit", deadline=None, max_examples=40, derandomize=True, database=None
)
hypothesis.settings.load_profile("lorakit")


def pytest_configure(config: pytest.Config) -> None:
    """Start the process that forks programs, once for all workers; see ``preloaded.py``."""
    if ADDRESS in os.environ or Path("/proc/driver/nvidia/version").exists():
        return  # a worker of xdist, which finds it; or a GPU, whose programs start as usual
    if (config.getoption("numprocesses", None) or 1) > 1:
        # two threads in each of several workers wait for one another more than they compute
        os.environ.setdefault("OMP_NUM_THREADS", "1")
    folder = tempfile.mkdtemp(prefix="lorakit-preloaded-")
    os.environ[ADDRESS] = f"{folder}/socket"
    server = subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("preloaded.py")), os.environ[ADDRESS]],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
    )

    def end() -> None:
        server.kill()
        server.wait()
        shutil.rmtree(folder, ignore_errors=True)

    config.add_cleanup(end)


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

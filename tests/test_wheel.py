"""The wheel works on its own, in an empty folder."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [
        sys.executable,
        "-m",
        "build",
        "--wheel",
        "--no-isolation",
        "--outdir",
        str(folder),
        str(REPOSITORY),
    ]
    subprocess.run(command, check=True, capture_output=True)
    return next(folder.glob("*.whl"))


def test_the_wheel_brings_config_model_and_data(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {
        "lorakit/conf/train.yaml",
        "lorakit/conf/experiment/pig_latin.yaml",
        "lorakit/model/tiny/text/model.safetensors",
        "lorakit/model/tiny/text/tokenizer.json",
        "lorakit/examples/pig_latin/train.jsonl",
    } <= names
    assert not [name for name in names if name.startswith(("tests/", "scripts/"))]
    assert wheel.stat().st_size < 10_000_000


def test_train_works_from_the_wheel_in_an_empty_folder(wheel: Path, tmp_path: Path) -> None:
    site, empty = tmp_path / "site", tmp_path / "empty"
    empty.mkdir()
    pip = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--disable-pip-version-check",
    ]
    subprocess.run([*pip, "--target", str(site), str(wheel)], check=True, capture_output=True)
    environment = {**os.environ, "PYTHONPATH": str(site)}
    where = subprocess.run(
        [sys.executable, "-c", "import lorakit; print(lorakit.__file__)"],
        cwd=empty,
        env=environment,
        capture_output=True,
        text=True,
    ).stdout
    assert where.startswith(str(site))
    settings = [
        "trainer.max_steps=1",
        "data.batch_size=4",
        "data.val_rows=2",
        "data.check_token_rows=50",
        "callbacks.samples=null",
    ]
    command = [sys.executable, "-m", "lorakit", "train", "run=one", *settings]
    result = subprocess.run(command, cwd=empty, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert (empty / "runs/one/adapter/adapter_model.safetensors").is_file()
    assert sorted(path.name for path in empty.iterdir()) == ["runs"]

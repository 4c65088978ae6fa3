"""The wheel works on its own, in an empty folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

from lorakit.extras import PACKAGES, distribution_of

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, made from the sdist beside it."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [
        sys.executable,
        "-m",
        "build",
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


@pytest.mark.slow
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


def test_the_sdist_has_what_the_wheel_is_made_from_and_the_pinned_versions(wheel: Path) -> None:
    (sdist,) = wheel.parent.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"pyproject.toml", "lorakit/extras.py", "conf/train.yaml", "constraints.txt"} <= names


@pytest.mark.slow  # a download of a gigabyte
def test_the_base_install_alone_trains_and_samples(wheel: Path, tmp_path: Path) -> None:
    """In an empty environment, by the versions of constraints.txt and no package more."""
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in ("PYTHONPATH", "VIRTUAL_ENV", "LORAKIT_DEBUG")
    }

    def run(*command: str) -> str:
        result = subprocess.run(
            command, cwd=empty, env=environment, capture_output=True, text=True, check=False
        )
        assert result.returncode == 0, f"{command}: {result.stdout}{result.stderr}"
        return result.stdout

    empty, bin_ = tmp_path / "empty", tmp_path / "venv/bin"
    empty.mkdir()
    venv.create(tmp_path / "venv", with_pip=True)
    pip = [str(bin_ / "python"), "-m", "pip", "--disable-pip-version-check"]
    install = [*pip, "install", "--quiet", "-c", str(REPOSITORY / "constraints.txt")]
    # as the Makefile does: what is built from source may look for torch
    run(*install, "torch", "setuptools", "wheel")
    run(*install, str(wheel))
    installed = {entry["name"].lower() for entry in json.loads(run(*pip, "list", "--format=json"))}
    # wandb brings these two, and `lorakit serve` names them because it imports them itself
    extras = {distribution_of(name) for name in PACKAGES} - {"pydantic", "protobuf"}
    assert not extras & installed and {"torch", "wandb", "lorakit"} <= installed
    settings = ["trainer.max_steps=3", "data.batch_size=4", "data.val_rows=2", "lora.rank=4"]
    said = run(str(bin_ / "lorakit"), "train", "run=one", *settings)
    assert "finished 3 steps" in said and "pip install 'lorakit[plots]'" in said
    assert run(str(bin_ / "lorakit"), "sample", "one", "--max-tokens", "4", "--", "English: pig")
    assert (empty / "runs/one/adapter/adapter_model.safetensors").is_file()

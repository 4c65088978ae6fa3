"""`lorakit doctor`, and a run on a machine whose GPU torch cannot use."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from small import SMALL

from lorakit.cli import doctor
from lorakit.training import gpus

Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def unusable_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A machine with NVIDIA's driver, as far as its program says, and a torch that sees no GPU."""
    program = tmp_path / "bin" / "nvidia-smi"
    program.parent.mkdir()
    program.write_text(
        '#!/bin/sh\ncase "$1" in --list-gpus) echo "GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-1)";;'
        " *) echo 570.86.15;; esac\n"
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for cached in (gpus.find_gpus, gpus.find_gpu_problem):
        cached.cache_clear()
    yield
    for cached in (gpus.find_gpus, gpus.find_gpu_problem):
        cached.cache_clear()


def test_the_doctor_reports_each_thing_that_a_run_would_use(
    workplace: Path, lorakit: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(workplace / "none"))
    code, out, err = lorakit("doctor", "--json")
    assert code == 0, err
    found = {entry["name"]: entry for entry in json.loads(out)}
    expected = {
        "lorakit",
        "packages",
        "extras",
        "torch",
        "precision",
        "deepspeed",
        "compiler",
        "w&b",
        "hub",
        "memory",
        "runs",
        "hub cache",
    }
    assert expected <= found.keys()
    assert torch.__version__ in found["torch"]["said"] and "GB free" in found["runs"]["said"]
    assert found["deepspeed"]["state"] == "ok" and found["w&b"]["remedy"] == "wandb login"
    assert (
        "HF_HUB_OFFLINE=1 is set" in found["hub"]["said"] and "model.path" in found["hub"]["remedy"]
    )
    code, out, _ = lorakit("doctor")
    assert all(entry["remedy"] for entry in found.values() if entry["state"] != "ok")
    assert (
        code == 0
        and "nothing keeps a run from working; notes on restrictions: " in out
        and "→ wandb login" in out
    )


def test_a_gpu_that_torch_cannot_use_is_bad_and_stops_a_run(
    workplace: Path, lorakit: Call, unusable_gpu: None
) -> None:
    code, out, _ = lorakit("doctor")
    assert code == 1 and "570.86.15" in out and "1 to fix" in out
    (line,) = [line for line in out.splitlines() if "bad" in line]
    assert "1 GPU is here (NVIDIA H100 80GB HBM3)" in line
    if torch.version.cuda is None:
        assert (
            f"torch {torch.__version__} is a build without CUDA" in line
            and "--index-url https://download.pytorch.org" in out
        )
    code, _, err = lorakit("train", "trainer.max_steps=1")
    assert code == 2 and "1 GPU is here" in err and "trainer.accelerator=cpu" in err
    assert not (workplace / "runs").exists()


def test_a_run_on_the_processor_goes_on_where_that_is_asked_for(
    workplace: Path, lorakit: Call, unusable_gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, _, err = lorakit("train", "trainer.accelerator=cpu", "trainer.max_steps=1", *SMALL)
    assert code == 0, err
    gpus.find_gpus.cache_clear()
    gpus.find_gpu_problem.cache_clear()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # hidden on purpose
    assert gpus.find_gpu_problem() is None


def test_each_restriction_comes_with_its_remedy(
    workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A GPU that others use, little memory, a full disk; no DeepSpeed, no compiler, no token;
    W&B switched off, SLURM down.
    """
    import huggingface_hub
    import psutil
    from huggingface_hub import constants

    facts = SimpleNamespace(name="NVIDIA H100", major=9, minor=0)
    for name, found in (
        ("is_available", lambda: True),
        ("device_count", lambda: 2),
        ("get_device_properties", lambda index: facts),
        ("mem_get_info", lambda index: ((70, 5)[index] * 10**9, 80 * 10**9)),
    ):
        monkeypatch.setattr(torch.cuda, name, found)
    failed = subprocess.CompletedProcess([], 1, "", "nothing here\n")
    monkeypatch.setattr(doctor.subprocess, "run", lambda *given, **options: failed)
    monkeypatch.setattr(
        doctor.shutil, "which", lambda name: "/usr/bin/sinfo" if name == "sinfo" else None
    )
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: SimpleNamespace(free=3 * 10**9))
    monkeypatch.setattr(
        psutil, "virtual_memory", lambda: SimpleNamespace(available=10**9, total=8 * 10**9)
    )
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    monkeypatch.setattr("lorakit.hub.find_hub_problem", lambda: None)
    monkeypatch.setenv("WANDB_API_KEY", "k")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setattr(doctor, "_formats", lambda: iter(()))  # asks a GPU that is not there
    found = {entry.name: entry for entry in doctor.examine(workplace)}
    assert (
        found["gpu 0"].state == "ok"
        and "NVIDIA H100, capability 9.0, 70.0 of 80.0 GB free" in found["gpu 0"].said
    )
    remedies = {
        "gpu 1": "nvidia-smi",
        "deepspeed": "pip install 'deepspeed" if sys.platform == "linux" else "strategy=ddp",
        "compiler": "install g++",
        "slurm": "node of the cluster",
        "w&b": "unset WANDB_MODE",
        "hub": "hf auth login",
        "memory": "close other programs",
        "runs": "set paths.runs to another disk",
        "hub cache": "set HF_HOME to another disk",
    }
    for name, remedy in remedies.items():
        assert found[name].state == "note" and remedy in found[name].remedy, found[name]
    assert (
        "gated models cannot be read" in found["hub"].said
        and str(constants.HF_HUB_CACHE) in found["hub"].said
    )
    assert all(entry.remedy for entry in found.values() if entry.state != "ok")


def test_what_cannot_be_written_is_bad(workplace: Path, lorakit: Call) -> None:
    (workplace / "file").write_text("x")
    code, out, _ = lorakit("doctor", "--runs", "file/runs")
    assert code == 1 and "file/runs cannot be written" in out and "set paths.runs" in out


def test_a_gpu_of_amd_is_found_in_the_kernels_list(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unusable_gpu: None
) -> None:
    for node, simds, memory in (
        (0, 0, 0),
        (1, 304, 206_000_000_000),
        (2, 8, 0),
    ):  # a processor, a GPU, one inside of a processor
        (tmp_path / str(node)).mkdir()
        (tmp_path / str(node) / "properties").write_text(
            f"cpu_cores_count 8\nsimd_count {simds}\nlocal_mem_size {memory}\n"
        )
    monkeypatch.setattr(gpus, "_AMD_NODES", tmp_path)
    monkeypatch.setattr(gpus, "_ask_nvidia", lambda *_: ())
    assert gpus.find_gpus() == ("AMD GPU, node 1",)
    if torch.version.hip is None and torch.version.cuda is None:
        problem = gpus.find_gpu_problem()
        assert problem and "without ROCm" in problem.said

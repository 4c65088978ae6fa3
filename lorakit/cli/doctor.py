"""``lorakit doctor``: what of this machine a run would use, and what to do about the rest."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from lorakit.cli.guard import run_command
from lorakit.extras import PACKAGES, distribution_of, is_installed, packages_of

GOOD, NOTE, BAD = "ok", "note", "bad"
_LOW_DISK_GB = 20  # a checkpoint of a large adapter and a merged small model
_LOW_MEMORY_GB = 4
_PACKAGES = ("lightning", "transformers", "peft", "hydra-core")


@dataclasses.dataclass(frozen=True)
class Finding:
    """One line of the report."""

    name: str
    state: str  # GOOD; NOTE is a restriction; BAD is what keeps a run from working as it should
    said: str
    remedy: str = ""


def main(arguments: list[str]) -> None:
    """Print the report; exit code 1 where something is bad."""
    parser = argparse.ArgumentParser(
        prog="lorakit doctor", description="What a run would find on this machine, with remedies."
    )
    parser.add_argument(
        "--runs", default="runs", help="folder of the runs, whose disk is looked at (default: runs)"
    )
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")
    options = parser.parse_args(arguments)
    findings = list(examine(Path(options.runs).expanduser()))
    print(
        json.dumps([dataclasses.asdict(found) for found in findings], indent=2)
        if options.json
        else as_text(findings)
    )
    if any(found.state == BAD for found in findings):
        raise SystemExit(1)


def examine(runs: Path) -> Iterator[Finding]:
    """Yield the findings; what cannot be found out is one of them."""
    checks: list[tuple[str, Callable[[], Iterator[Finding]]]] = [
        ("python", _python),
        ("extras", _extras),
        ("torch", _torch),
        ("number formats", _formats),
        ("deepspeed", _deepspeed),
        ("compiler", _compiler),
        ("slurm", _slurm),
        ("w&b", _wandb),
        ("hub", _hub),
        ("memory", _memory),
        ("disk", lambda: _disk(runs)),
    ]
    for name, check in checks:
        try:
            yield from check()
        except Exception as error:  # a doctor that falls ill says of what
            yield Finding(name, BAD, f"could not be looked at: {type(error).__name__}: {error}")


def as_text(findings: list[Finding]) -> str:
    """The report: a line for each finding, and under it what to do."""
    width = max(len(found.name) for found in findings)
    lines = []
    for found in findings:
        lines.append(f"{found.state:4}  {found.name:{width}}  {found.said}")
        lines += [f"{'':4}  {'':{width}}  → {found.remedy}"] if found.remedy else []
    bad = sum(found.state == BAD for found in findings)
    notes = sum(found.state == NOTE for found in findings)
    fine = (
        f"nothing keeps a run from working; notes on restrictions: {notes}"
        if notes
        else "nothing to fix"
    )
    return "\n".join([*lines, "", f"{bad} to fix" if bad else fine])


def _python() -> Iterator[Finding]:
    from lorakit import __version__

    packages = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in _PACKAGES)
    yield Finding(
        "lorakit",
        GOOD,
        f"{__version__} on Python {platform.python_version()}, {platform.system()}"
        f" {platform.machine()}",
    )
    yield Finding("packages", GOOD, packages)


def _extras() -> Iterator[Finding]:
    names = dict.fromkeys(package.extra for package in PACKAGES.values())
    missing = {
        name: ", ".join(map(distribution_of, lacking))
        for name in names
        if (lacking := [one for one in packages_of(name) if not is_installed(one)])
    }
    if missing:
        said = ", ".join(f"{name} ({lacking})" for name, lacking in missing.items())
        remedy = f"pip install 'lorakit[{','.join(missing)}]'"
        yield Finding("extras", NOTE, f"not installed: {said}", remedy)
    else:
        yield Finding("extras", GOOD, f"installed: {', '.join(names)}")


def _torch() -> Iterator[Finding]:
    import torch

    from lorakit.training.gpus import find_driver, find_gpu_problem

    build = (
        f"CUDA {torch.version.cuda}"
        if torch.version.cuda
        else f"ROCm {torch.version.hip}"
        if torch.version.hip
        else "CPU"
    )
    yield Finding(
        "torch", GOOD, f"{torch.__version__}, built for {build}, {torch.get_num_threads()} threads"
    )
    driver = find_driver()
    if driver:
        yield Finding("driver", GOOD, f"NVIDIA {driver}")
    if problem := find_gpu_problem():
        yield Finding(
            "devices",
            BAD,
            problem.said,
            f"{problem.remedy}; until then trainer.accelerator=cpu trains without it",
        )
    elif torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            facts, (free, total) = (
                torch.cuda.get_device_properties(index),
                torch.cuda.mem_get_info(index),
            )
            capability = f"{facts.major}.{facts.minor}"
            said = (
                f"{facts.name}, capability {capability}, {free / 1e9:.1f} of {total / 1e9:.1f} GB"
                " free"
            )
            is_taken = free < 0.5 * total
            yield Finding(
                f"gpu {index}",
                NOTE if is_taken else GOOD,
                said,
                "other programs use it (nvidia-smi)" if is_taken else "",
            )
    elif torch.backends.mps.is_available():
        yield Finding("devices", GOOD, "Apple GPU (mps)")
    else:
        remedy = (
            "`lorakit plan model.path=… plan.gpus=[1]` says what a run takes on one; README, what a"
            " processor trains in a night"
        )
        yield Finding("devices", NOTE, "no GPU: runs use the processor", remedy)


def _formats() -> Iterator[Finding]:
    from lorakit.training.precision import resolve_accelerator, resolve_precision

    try:
        accelerator = resolve_accelerator("auto")
    except Exception:  # said above
        accelerator = "cpu"
    precision = resolve_precision("auto", accelerator)
    why = {
        "bf16-mixed": f"bf16 is native on this {accelerator}",
        "16-mixed": f"this {accelerator} has no bf16: fp16 with loss scaling",
        "32-true": f"this {accelerator} has no bf16",
    }[precision]
    is_best = precision == "bf16-mixed"
    remedy = (
        ""
        if is_best
        else "nothing to fix: it is slower, or takes more memory, than bf16 on a newer device"
    )
    yield Finding(
        "precision",
        GOOD if is_best else NOTE,
        f"trainer.precision=auto is {precision}: {why}",
        remedy,
    )


def _deepspeed() -> Iterator[Finding]:
    try:  # in a process of its own: it talks, and what it builds on may crash
        said = subprocess.run(
            [sys.executable, "-c", "import deepspeed"],
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        problem = (
            (said.stderr.strip().splitlines() or ["it crashes"])[-1] if said.returncode else None
        )
    except subprocess.TimeoutExpired:
        problem = "not within two minutes"
    if problem is None:
        version = importlib.metadata.version("deepspeed")
        yield Finding("deepspeed", GOOD, f"{version}: strategy=zero1, zero2, zero3")
        return
    remedy = (
        "pip install 'deepspeed>=0.19'"
        if sys.platform == "linux"
        else "it is made for Linux; strategy=ddp joins processes here"
    )
    yield Finding(
        "deepspeed",
        NOTE,
        f"cannot be imported ({problem}), so only strategy=single and ddp work",
        remedy,
    )


def _compiler() -> Iterator[Finding]:
    found = shutil.which(os.environ.get("CXX", "g++")) or shutil.which("clang++")
    yield (
        Finding("compiler", GOOD, f"{found}: trainer.compile=true works")
        if found
        else Finding(
            "compiler",
            NOTE,
            "no C++ compiler, so trainer.compile=true does not work",
            "install g++",
        )
    )


def _slurm() -> Iterator[Finding]:
    """SLURM's partitions, where there are some: a job gets their nodes, not this machine."""
    if not shutil.which("sinfo"):
        return
    command = ["sinfo", "--noheader", "--format", "%P %D x %c cores %G"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except subprocess.TimeoutExpired:
        said = subprocess.CompletedProcess(command, 1, "", "no answer in 20 s")
    if said.returncode:
        problem = (said.stderr.strip().splitlines() or ["no answer"])[-1]
        yield Finding(
            "slurm",
            NOTE,
            f"is installed, and sinfo fails: {problem}",
            "run lorakit launch slurm on a node of the cluster",
        )
    else:
        lines = "; ".join(
            " ".join(line.split()).replace(" (null)", "") for line in said.stdout.splitlines()
        )
        yield Finding(
            "slurm",
            GOOD,
            f"{lines}: `lorakit launch slurm … train …` submits; what is above is this machine"
            " alone",
        )


def _wandb() -> Iterator[Finding]:
    from lorakit.callbacks.wandb_run import has_key, resolve_mode

    mode, version = resolve_mode("auto"), importlib.metadata.version("wandb")
    if mode == "online":
        yield Finding("w&b", GOOD, f"wandb {version}, an API key is there: logger=wandb is online")
    else:
        why = "no API key" if not has_key() else f"WANDB_MODE={mode}"
        remedy = "wandb login" if not has_key() else "unset WANDB_MODE"
        yield Finding("w&b", NOTE, f"wandb {version}, {why}: logger=wandb is {mode}", remedy)


def _hub() -> Iterator[Finding]:
    from huggingface_hub import constants, get_token

    from lorakit.hub import find_hub_problem

    where = f"cache {constants.HF_HUB_CACHE}"
    if problem := find_hub_problem():
        yield Finding(
            "hub",
            NOTE,
            f"{problem}; {where}",
            "models and data by name must be in the cache; model.path and data.path take folders"
            " and files",
        )
    else:
        said = "with a token" if get_token() else "without a token: gated models cannot be read"
        yield Finding(
            "hub",
            GOOD if get_token() else NOTE,
            f"{constants.ENDPOINT} {said}; {where}",
            "" if get_token() else "hf auth login",
        )


def _memory() -> Iterator[Finding]:
    import psutil

    memory = psutil.virtual_memory()
    available = memory.available / 1e9
    said = f"{available:.1f} of {memory.total / 1e9:.1f} GB available, {os.cpu_count()} processors"
    is_low = available < _LOW_MEMORY_GB
    yield Finding(
        "memory",
        NOTE if is_low else GOOD,
        said,
        "close other programs, or plan with `lorakit plan`" if is_low else "",
    )


def _disk(runs: Path) -> Iterator[Finding]:
    from huggingface_hub import constants

    from lorakit.runs.files import find_write_problem

    for name, folder in (("runs", runs), ("hub cache", Path(constants.HF_HUB_CACHE))):
        if problem := find_write_problem(folder / "a file"):
            yield Finding(
                name,
                BAD,
                f"{folder} cannot be written: {problem}",
                f"set {'paths.runs' if name == 'runs' else 'HF_HOME'}",
            )
            continue
        there = next(
            path for path in (folder.resolve(), *folder.resolve().parents) if path.exists()
        )
        free = shutil.disk_usage(there).free / 1e9
        remedy = (
            f"free some, or set {'paths.runs' if name == 'runs' else 'HF_HOME'} to another disk"
        )
        is_low = free < _LOW_DISK_GB
        yield Finding(
            name, NOTE if is_low else GOOD, f"{there}: {free:.1f} GB free", remedy if is_low else ""
        )


if __name__ == "__main__":
    run_command(main)

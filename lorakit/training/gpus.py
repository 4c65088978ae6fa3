"""GPUs that are in the machine, whether or not torch can use them."""

from __future__ import annotations

import functools
import importlib.util
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

_NVIDIA_GPUS = Path("/proc/driver/nvidia/gpus")
_AMD_NODES = Path("/sys/class/kfd/kfd/topology/nodes")


@functools.cache
def find_gpus() -> tuple[str, ...]:
    """The GPUs that the drivers know of, as they name them, torch not asked; those that the
    environment hides are left out.
    """
    if os.environ.get("CUDA_VISIBLE_DEVICES", "0").strip() in ("", "-1"):
        return ()
    return (*_ask_nvidia("--list-gpus"), *_find_amd())


def guess_device(accelerator: str, devices: int | str = "auto") -> str:
    """What a run will most likely compute on, in words; torch is not imported for it.

    ``resolve_accelerator`` has the last word, once torch is there.

    Args:
        devices: how many GPUs the run is to take; what is no number is all of them.
    """
    if accelerator == "cpu":
        return "the CPU"
    if (is_cpu_build := _is_cpu_build()) or not (names := _names_of_gpus()):
        return "the CPU" if is_cpu_build and accelerator == "auto" else "this machine"
    names = names[: int(devices)] if str(devices).isdigit() else names
    kinds = ", ".join(dict.fromkeys(names))
    return f"a GPU ({kinds})" if len(names) == 1 else f"{len(names)} GPUs ({kinds})"


def _names_of_gpus() -> list[str]:
    """Names of the GPUs that this process may use, from the drivers; nvidia-smi takes longer."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES", "all").strip()
    if chosen in ("", "-1"):
        return []
    texts = [path.read_text(errors="replace") for path in _NVIDIA_GPUS.glob("*/information")]
    names = [found[1] for text in texts if (found := re.search(r"^Model:\s*(.+)$", text, re.M))]
    return (names if chosen == "all" else names[: len(chosen.split(","))]) + list(_find_amd())


def _is_cpu_build() -> bool:
    """Whether the torch that is installed knows no GPU of NVIDIA or AMD."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return False
    text = (Path(spec.origin).parent / "version.py").read_text(encoding="utf-8")
    return all(re.search(rf"^{kind}\b.*= None$", text, re.M) for kind in ("cuda", "hip"))


def find_driver() -> str | None:
    """The version of NVIDIA's driver, or None where there is none."""
    return next(iter(_ask_nvidia("--query-gpu=driver_version", "--format=csv,noheader")), None)


class GpuProblem(NamedTuple):
    """Why torch cannot use a GPU that is there, and what to do."""

    said: str
    remedy: str


@functools.cache
def find_gpu_problem() -> GpuProblem | None:
    """What keeps torch from using a GPU that is there, or None where it can, or there is none."""
    import torch

    if torch.cuda.is_available() or not (gpus := find_gpus()):
        return None
    has_amd = bool(_find_amd())
    name = re.sub(r"^GPU \d+: | \(UUID.*", "", gpus[0])
    here = (
        f"{len(gpus)} GPU{'s are' if len(gpus) > 1 else ' is'} here ({name}), but torch"
        f" {torch.__version__}"
    )
    if torch.version.cuda is None and torch.version.hip is None:
        version, wheels = torch.__version__.partition("+")[0], "rocm7.1" if has_amd else "cu130"
        return GpuProblem(
            f"{here} is a build without {'ROCm' if has_amd else 'CUDA'}",
            f"pip install --force-reinstall torch=={version} --index-url"
            f" https://download.pytorch.org/whl/{wheels}",
        )
    try:
        torch.cuda.init()
        reason = "it finds none"
    except Exception as error:  # whatever the driver says
        reason = str(error).splitlines()[0]
    return GpuProblem(
        f"{here} cannot use it: {reason}",
        "update its driver, or install a build of torch for an older CUDA",
    )


def _ask_nvidia(*arguments: str) -> tuple[str, ...]:
    program = shutil.which("nvidia-smi")
    if program is None:
        return ()
    try:
        said = subprocess.run(
            [program, *arguments], capture_output=True, text=True, timeout=20, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return ()
    if said.returncode == 0:
        return tuple(line.strip() for line in said.stdout.splitlines() if line.strip())
    return ()


def _find_amd() -> tuple[str, ...]:
    """AMD's GPUs by the kernel's list, in which processors stand too, without SIMD units."""
    names = ("HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES")
    if any(os.environ.get(name, "0").strip() in ("", "-1") for name in names):
        return ()
    found = []
    for file in sorted(_AMD_NODES.glob("*/properties")):
        try:
            lines = file.read_text().splitlines()
        except OSError:
            continue
        facts = dict(line.split(maxsplit=1) for line in lines if " " in line)
        # A GPU inside of a processor has no memory of its own, and few of them are any that ROCm
        # knows.
        if int(facts.get("simd_count", "0")) > 0 and int(facts.get("local_mem_size", "0")) > 0:
            found.append(f"AMD GPU, node {file.parent.name}")
    return tuple(found)

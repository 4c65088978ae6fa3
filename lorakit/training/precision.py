"""Which number formats a run computes in."""

from __future__ import annotations

import logging

import torch

from lorakit.errors import ConfigError
from lorakit.training.gpus import find_gpu_problem

log = logging.getLogger("lorakit")
_BASE_DTYPES = {"bf16-mixed": "bfloat16", "16-mixed": "float16", "32-true": "float32"}


def resolve_precision(precision: str, accelerator: str) -> str:
    """Return Lightning's name of ``precision``; ``auto`` is bf16 where it is native, else fp16 on
    GPUs, else fp32.

    Under the mixed precisions the products run in 16 bit; adapters, gradients and the optimiser
    stay float32.
    """
    if precision != "auto":
        if precision not in _BASE_DTYPES:
            raise ConfigError(
                f"trainer.precision={precision} is unknown; choose auto, {', '.join(_BASE_DTYPES)} "
                "(the -true variants would put the adapter itself into 16 bit)"
            )
        if precision == "16-mixed" and accelerator == "cpu":
            raise ConfigError(
                "trainer.precision=16-mixed needs a GPU; on the CPU choose bf16-mixed or 32-true"
            )
        return precision
    if accelerator == "cuda":
        is_native = torch.cuda.is_bf16_supported(including_emulation=False)
        return "bf16-mixed" if is_native else "16-mixed"
    if accelerator == "cpu" and torch.cpu._is_avx512_bf16_supported():
        return "bf16-mixed"
    return "32-true"


def why_precision(precision: str, accelerator: str) -> str:
    """Why ``resolve_precision`` takes ``precision`` by itself."""
    return {
        "bf16-mixed": f"this {accelerator} computes bf16 natively; adapters stay float32",
        "16-mixed": "this GPU has no bf16 of its own; adapters stay float32",
    }.get(precision, f"this {accelerator} has no 16-bit format that it computes natively")


def resolve_accelerator(accelerator: str) -> str:
    """Return ``cuda``, ``mps`` or ``cpu``; ``auto`` takes the best that is there, MPS where it
    computes what the CPU does.

    Raises:
        ConfigError: there is no such device, or, under ``auto``, a GPU that torch cannot use: a CPU
            would take its place silently.
    """
    if accelerator == "auto":
        if problem := find_gpu_problem():
            raise ConfigError(
                f"{problem.said}: {problem.remedy}. To continue without it, set"
                " trainer.accelerator=cpu (in a program, accelerator='cpu')"
            )
        if torch.cuda.is_available():
            return "cuda"
        return "mps" if torch.backends.mps.is_available() and _is_right("mps") else "cpu"
    if accelerator in ("cuda", "gpu"):
        if not torch.cuda.is_available():
            raise ConfigError(
                f"trainer.accelerator={accelerator}, but this torch ({torch.__version__}) sees"
                " no GPU"
            )
        return "cuda"
    if accelerator not in ("cpu", "mps"):
        raise ConfigError(
            f"trainer.accelerator={accelerator} is unknown; choose auto, cpu, cuda or mps"
        )
    return accelerator


def _is_right(device: str) -> bool:
    """Whether ``device`` passes the parity check; where it does not, say so."""
    from lorakit.training.parity import find_parity_problem

    if problem := find_parity_problem(device):
        log.warning(
            "trainer.accelerator=auto takes the CPU: %s. trainer.accelerator=%s insists",
            problem,
            device,
        )
    return problem is None


def base_dtype(dtype: str, precision: str) -> str:
    """Return the dtype of the frozen base: ``auto`` follows the precision."""
    return _BASE_DTYPES[precision] if dtype == "auto" else dtype

"""Learning rates and schedules."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR

from lorakit.errors import ConfigError
from lorakit.lora.spec import LoRASpec

# tinker-cookbook, hyperparam_utils.get_lr: full fine-tuning's 5e-5, ten times that for LoRA, times
# (2000 / hidden)^exponent.
_BASE_LR, _LORA_FACTOR, _REFERENCE_HIDDEN = 5e-5, 10.0, 2000.0
_EXPONENTS = {"llama": 0.781, "qwen": 0.0775}
# QLoRA (arXiv 2305.14314), table 9: 2e-4 for 7B and 13B, 1e-4 for 33B and 65B, which are wider than
# 13B's 5,120.
_QLORA_HIDDEN = 5120


def lr_source(model_config: Any) -> str:
    """Where ``auto_lr`` takes its number from."""
    model_type = model_config.get_text_config().model_type
    if any(name in model_type for name in _EXPONENTS):
        return "tinker-cookbook, hyperparam_utils.get_lr"
    return f"no rule is published for {model_type}; QLoRA's, arXiv 2305.14314, table 9"


def auto_lr(model_config: Any, spec: LoRASpec) -> float:
    """Return the learning rate that tinker-cookbook publishes for LoRA on this family and width, of
    other families QLoRA's.

    Raises:
        ConfigError: the rule says nothing about rsLoRA, or a scale other than alpha 32.
    """
    if spec.rslora or spec.alpha != 32:
        raise ConfigError(
            f"optim.lr=auto knows plain LoRA with alpha 32 only, not alpha {spec.alpha:g}"
            f"{' with rsLoRA' if spec.rslora else ''}; set optim.lr to a number"
        )
    text = model_config.get_text_config()
    family = next((name for name in _EXPONENTS if name in text.model_type), None)
    if family is None:
        return 2e-4 if text.hidden_size <= _QLORA_HIDDEN else 1e-4
    return _BASE_LR * _LORA_FACTOR * (_REFERENCE_HIDDEN / text.hidden_size) ** _EXPONENTS[family]


def constant(
    optimizer: torch.optim.Optimizer, *, total_steps: int, warmup_steps: float = 0
) -> LambdaLR:
    """The learning rate rises over ``warmup_steps`` and stays."""
    warmup = resolve_warmup(warmup_steps, total_steps)
    return LambdaLR(optimizer, lambda step: _warm(step, warmup))


def linear(
    optimizer: torch.optim.Optimizer,
    *,
    total_steps: int,
    warmup_steps: float = 0,
    final_ratio: float = 0.0,
) -> LambdaLR:
    """Rises over ``warmup_steps``, then falls on a line to ``final_ratio`` of its peak."""
    warmup = resolve_warmup(warmup_steps, total_steps)

    def factor(step: int) -> float:
        fall = 1 - (1 - final_ratio) * _progress(step, warmup, total_steps)
        return _warm(step, warmup) * fall

    return LambdaLR(optimizer, factor)


def cosine(
    optimizer: torch.optim.Optimizer,
    *,
    total_steps: int,
    warmup_steps: float = 0,
    final_ratio: float = 0.0,
) -> LambdaLR:
    """Rises over ``warmup_steps``, then falls on half a cosine to ``final_ratio`` of its peak."""
    warmup = resolve_warmup(warmup_steps, total_steps)

    def factor(step: int) -> float:
        fall = 0.5 * (1 + math.cos(math.pi * _progress(step, warmup, total_steps)))
        return _warm(step, warmup) * (final_ratio + (1 - final_ratio) * fall)

    return LambdaLR(optimizer, factor)


def resolve_warmup(warmup_steps: float, total_steps: int) -> int:
    """Return ``warmup_steps`` as steps; a number below 1 is a share of ``total_steps``."""
    if warmup_steps < 0:
        raise ConfigError(f"schedule.warmup_steps={warmup_steps} must not be negative")
    return round(warmup_steps * total_steps) if warmup_steps < 1 else int(warmup_steps)


def _warm(step: int, warmup: int) -> float:
    return min(1.0, (step + 1) / warmup) if warmup else 1.0


def _progress(step: int, warmup: int, total_steps: int) -> float:
    return min(1.0, max(0, step - warmup) / max(1, total_steps - warmup))

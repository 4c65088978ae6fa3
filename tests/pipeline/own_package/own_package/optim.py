"""An optimiser and a schedule: torch's interfaces."""

from __future__ import annotations

from collections.abc import Iterable

import torch


class Sign(torch.optim.Optimizer):
    """Steps of ``lr`` in the direction of each gradient's sign."""

    def __init__(self, params: Iterable[torch.nn.Parameter], lr: float = 1e-3) -> None:
        super().__init__(params, {"lr": lr, "is_sign_only": True})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        if closure is not None:
            with torch.enable_grad():
                closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.sub_(group["lr"] * parameter.grad.sign())


def halving(
    optimizer: torch.optim.Optimizer, *, total_steps: int
) -> torch.optim.lr_scheduler.LRScheduler:
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)

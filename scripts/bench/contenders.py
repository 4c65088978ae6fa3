"""What is compared: each builder makes its model once and returns a function that does one step's
work and returns a number.

All contenders of a row get the same weights, dtype, tokens and trainable parameters, made from the
same seed.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import peft
import torch
from torch import nn

Run = Callable[[], float]
SEED = 0


def expert_layer(
    *,
    who: str,
    tokens: int,
    dtype: str = "float32",
    experts: int = 128,
    hidden: int = 1024,
    width: int = 512,
    top_k: int = 8,
    rank: int = 16,
) -> Run:
    """One layer of experts, forward and backward, with gradients to tokens, router weights and
    adapter.

    ``who``: frozen (transformers, no adapter), peft (target_parameters), lorakit, lorakit_shared
    (shared_outer).
    """
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    config = Qwen3MoeConfig(
        hidden_size=hidden,
        moe_intermediate_size=width,
        num_experts=experts,
        num_experts_per_tok=top_k,
    )
    config._experts_implementation = "grouped_mm"
    torch.manual_seed(SEED)
    model: Any = _Holder(Qwen3MoeExperts(config))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.02)
    model = model.to(getattr(torch, dtype)).requires_grad_(False)
    x = torch.randn(tokens, hidden).to(getattr(torch, dtype)).requires_grad_()
    chosen = torch.rand(tokens, experts).topk(top_k).indices
    weights = torch.rand(tokens, top_k).softmax(-1).to(getattr(torch, dtype)).requires_grad_()
    gradient = torch.randn(tokens, hidden).to(getattr(torch, dtype))
    if who == "peft":
        names = ["experts.gate_up_proj", "experts.down_proj"]
        model = peft.get_peft_model(
            model, peft.LoraConfig(r=rank, target_modules=[], target_parameters=names)
        )
    elif who.startswith("lorakit"):
        from lorakit.lora.experts import ExpertLoraConfig

        layout = "shared_outer" if who.endswith("shared") else "per_expert"
        names = ["experts.gate_up_proj", "experts.down_proj"]
        settings = ExpertLoraConfig(
            r=rank, target_modules=["experts"], expert_parameters=names, expert_layout=layout
        )
        settings.register(model)
        model = peft.get_peft_model(model, settings)

    def run() -> float:
        output = model(x, chosen, weights)
        output.backward(gradient)
        for tensor in (x, weights, *model.parameters()):
            tensor.grad = None
        return float(output.detach().float().square().mean())

    return run


class _Holder(nn.Module):
    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        self.experts = experts

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        return self.experts(*inputs)


def head(
    *,
    who: str,
    tokens: int = 2048,
    vocab: int = 151_936,
    hidden: int = 1024,
    dtype: str = "float32",
    share: float = 1.0,
) -> Run:
    """Loss and gradient of the hidden states under a frozen unembedding. ``share`` of the tokens is
    trained.

    ``who``: full (all logits in float32, as transformers' own loss), trl (TRL's chunked loss),
    lorakit.
    """
    torch.manual_seed(SEED)
    weight = (torch.randn(vocab, hidden) * 0.02).to(getattr(torch, dtype))
    states = torch.randn(tokens, hidden).to(getattr(torch, dtype)).requires_grad_()
    targets = torch.randint(vocab, (tokens,))
    trained = torch.arange(tokens) < round(share * tokens)
    labels = torch.where(trained, targets, -100)

    def full() -> torch.Tensor:
        logits = (states @ weight.mT).float()
        return nn.functional.cross_entropy(logits, labels, ignore_index=-100, reduction="sum")

    def ours() -> torch.Tensor:
        from lorakit.loss.head import Head, head_logprobs

        return -head_logprobs(states[trained], Head(weight), targets[trained, None]).sum()

    def tiles() -> torch.Tensor:
        from trl.kernels import ChunkedLogProbFunction

        logprobs = ChunkedLogProbFunction.apply(
            states[trained], weight, None, targets[trained], 1.0, 4096, None, 1.0, ()
        )
        return -logprobs[0].sum()

    if who == "trl":
        importlib.import_module("trl.kernels")  # told now where it is not installed
    loss_of = {"full": full, "trl": tiles, "lorakit": ours}[who]

    def run() -> float:
        loss = loss_of()
        loss.backward()
        states.grad = None
        return float(loss.detach()) / int(trained.sum())

    return run


def whole_step(
    *,
    who: str,
    model: str,
    share: float = 1.0,
    dtype: str = "float32",
    rows: int = 4,
    length: int = 512,
    rank: int = 16,
    **options: int,
) -> Run:
    """A training step on ``rows`` x ``length`` tokens: forward, loss, backward, AdamW, of an
    adapter on all matrices.

    ``model``: moe (91 M parameters) or dense. ``who``: trl (TRL's SFTTrainer with PEFT), lorakit,
    frozen (the base alone), mask (lorakit with transformers' mask over all pairs of positions).
    ``options``: ``document``, the length of what rows are packed from.
    """
    import steps

    data = steps.make_rows(rows, length, share)
    return steps.BUILDERS[who](
        steps.make_model(model, getattr(torch, dtype)), data, rank, **options
    )


BUILDERS: dict[str, Callable[..., Run]] = {
    "expert_layer": expert_layer,
    "head": head,
    "whole_step": whole_step,
}

"""Figures of a model on rows that were not trained: loss, perplexity, exact answers, pairs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from lorakit.data.datamodule import LoRADataModule
from lorakit.errors import ConfigError
from lorakit.loss import Loss
from lorakit.loss.logprobs import target_logprobs
from lorakit.sampling.score import Answer, answer_all, perplexity, score_loss
from lorakit.training.step import compute_loss
from lorakit.types import SamplingParams


def score_rows(
    model: Any,
    tokenizer: Any,
    datamodule: LoRADataModule,
    *,
    max_tokens: int | None,
    whose: str = "the adapter",
    say: Callable[[str], Any] = lambda text: None,
) -> tuple[dict[str, float], list[Answer]]:
    """Return loss, perplexity and exact match of ``model`` on the evaluation rows, and its
    answers.

    Args:
        max_tokens: of each answer; None asks for none, and the loss alone is measured.
        whose: whose figures these are, for ``say``.
        say: prints what is measured next.

    Raises:
        ConfigError: no row is left.
    """
    examples, indices = datamodule.val_examples, datamodule.val_indices
    datums = [datum for index in indices for datum in examples.datums(int(index))]
    if not datums:
        raise ConfigError("no row to evaluate on is left; see data.on_long and data.on_error")
    subject = f"{len(datums):,} examples, {whose}"
    say(f"loss of {subject}")
    loss_sum, weight = score_loss(
        model, datums, pad_token_id=datamodule.pad_token_id, images=datamodule.images
    )
    figures = {"loss": loss_sum / weight, "perplexity": perplexity(loss_sum / weight)}
    if max_tokens is None:
        return figures, []
    say(f"answers to {subject}, of at most {max_tokens} tokens (--no-samples: the loss alone)")
    stop = datamodule.spec.rendering.stop
    params = SamplingParams(max_tokens=max_tokens, temperature=0.0, stop=stop)
    answers = answer_all(model, tokenizer, datums, params, images=datamodule.images)
    exact_match = sum(answer.is_exact for answer in answers) / len(answers)
    return figures | {"exact_match": exact_match}, answers


@torch.no_grad()
def score_pairs(model: Any, datamodule: LoRADataModule, loss: Loss) -> dict[str, float]:
    """Return the mean of ``loss``, one of pairs, and of its metrics, over the evaluation rows."""
    sums: dict[str, float] = {"loss": 0.0}
    num_pairs = 0
    model.eval()
    for batch in datamodule.val_dataloader():
        output = compute_loss(model, batch.to(model.device), loss)
        num_pairs += batch.num_pairs
        for name, value in {"loss": output.loss_sum, **output.metrics}.items():
            sums[name] = sums.get(name, 0.0) + float(value)
    return {"pairs": num_pairs, **{name: value / num_pairs for name, value in sums.items()}}


@torch.no_grad()
def mean_loss(model: Any, batches: Any, device: torch.device) -> float:
    """-sum(weight * logprob) / sum(|weight|) over ``batches``, on ``device``, dropout off."""
    loss_sum, weight, was_training = 0.0, 0.0, model.training
    model.eval()
    for batch in batches:
        batch = batch.to(device)
        loss_sum -= float((batch.weights * target_logprobs(model, batch)).sum())
        weight += batch.weight
    model.train(was_training)
    return loss_sum / weight

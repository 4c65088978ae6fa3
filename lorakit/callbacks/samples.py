"""Samples of fixed prompts at every evaluation, in the run folder and as a table in W&B."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L

from lorakit.data.read.rows import are_chats
from lorakit.data.render.tokenizer import Encoder
from lorakit.runs.folder import History
from lorakit.sampling.generate import generate
from lorakit.types import ModelInput, SamplingParams


class Samples(L.Callback):
    """Generates from fixed prompts at every evaluation into ``samples.jsonl``, and into a table
    where W&B logs.

    Args:
        folder: the run folder.
        prompts: texts, each a user's message where the run trains on chats; None takes the first
            ``num_prompts`` evaluation rows, up to where their training begins.
        max_tokens, temperature: of the samples; temperature 0 is greedy.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        prompts: Sequence[str] | None = None,
        num_prompts: int = 4,
        max_tokens: int = 64,
        temperature: float = 0.0,
        stop: str | Sequence[str] | None = None,
        seed: int = 0,
    ) -> None:
        self.history = History(Path(folder), "samples.jsonl")
        self.prompts, self.num_prompts = prompts, num_prompts
        self.params = SamplingParams(
            max_tokens=max_tokens, temperature=temperature, stop=stop, seed=seed
        )
        self._rows: list[list[Any]] = []

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Remove what is after the step from which a run is resumed."""
        if trainer.is_global_zero:
            self.history.cut_behind(trainer.global_step)

    def on_validation_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        tokenizer = pl_module.tokenizer
        prompts = self._prompts(trainer, tokenizer)
        if not prompts:
            return
        images = getattr(getattr(trainer, "datamodule", None), "images", None)
        # by all processes: ZeRO-3 needs them
        samples = generate(pl_module.model, tokenizer, prompts, self.params, images)
        if not trainer.is_global_zero:
            return
        texts = [
            tokenizer.decode(prompt.to_ints() if images is None else images.tokens(prompt))
            for prompt in prompts
        ]
        rows = [
            [trainer.global_step, text, sample.text]
            for text, sample in zip(texts, samples, strict=True)
        ]
        for step, prompt, text in rows:
            self.history.append({"step": step, "prompt": prompt, "sample": text})
        self._rows += rows
        for logger in trainer.loggers:
            if hasattr(logger, "log_table"):
                logger.log_table(
                    "samples",
                    columns=["step", "prompt", "sample"],
                    data=self._rows,
                    step=trainer.global_step,
                )

    def _prompts(self, trainer: L.Trainer, tokenizer: Any) -> list[ModelInput]:
        datamodule: Any = getattr(trainer, "datamodule", None)
        if self.prompts is not None:
            encoder = Encoder(tokenizer)
            is_chat = hasattr(datamodule, "source") and are_chats(datamodule.source.formats)
            if is_chat and tokenizer.chat_template:
                chats = [[{"role": "user", "content": text}] for text in self.prompts]
                said = [encoder.encode_chat(chat) for chat in chats]
            else:
                said = [encoder.encode_prompt(text) for text in self.prompts]
            return [ModelInput.from_ints(tokens) for tokens in said]
        if not hasattr(datamodule, "val_prompts"):
            return []
        return datamodule.val_prompts(self.num_prompts)

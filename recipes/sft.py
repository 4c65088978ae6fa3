"""Supervised fine-tuning as a program: ``python recipes/sft.py [ROWS.jsonl] [MODEL] [STEPS]``.

Without arguments it teaches the bundled tiny model pig latin in 40 steps and prints what it
answers.
"""

from __future__ import annotations

import functools
import sys

import lightning as L
import torch

from lorakit import LoRADataModule, LoRAModule, LoRASpec
from lorakit.lora.inject import inject
from lorakit.model.load import load_model, load_tokenizer
from lorakit.sampling.generate import generate
from lorakit.training.optim import cosine
from lorakit.types import SamplingParams


def main(rows: str = "pig_latin/train", model_path: str = "tiny", steps: str = "40") -> None:
    num_steps = int(steps)
    tokenizer = load_tokenizer(model_path)
    data = LoRADataModule(path=rows, stop="\n\n", max_tokens=512, batch_size=64, epochs=None)
    data.set_tokenizer(tokenizer)
    module = LoRAModule(
        lambda: inject(load_model(model_path), LoRASpec(rank=32), base_name=model_path),
        optimizer=functools.partial(torch.optim.AdamW, lr=5e-3, weight_decay=0.0),
        schedule=functools.partial(cosine, warmup_steps=0.05),
        total_steps=num_steps,
        tokenizer=tokenizer,
    )
    trainer = L.Trainer(
        max_steps=num_steps,
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    trainer.fit(module, datamodule=data)
    prompt = tokenizer.encode("English: hello world\nPig Latin:")
    (sample,) = generate(
        module.model,
        tokenizer,
        [prompt],
        SamplingParams(max_tokens=32, temperature=0.0, stop="\n\n"),
    )
    print(sample.text)
    module.model.save_pretrained("adapter")


if __name__ == "__main__":
    main(*sys.argv[1:])

"""Families that people fine-tune: from a folder on disk through training to plain PEFT and to a
merged model.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from model_folders import FAMILIES, difference, logits, write_base
from tiny_models import (
    gradients,
    make_batches,
    make_datums,
    make_trainer,
    randomise,
    relative_l2,
    sgd,
)
from transformers import AutoModelForCausalLM

from lorakit.data.batch.collate import collate
from lorakit.lora.inject import inject
from lorakit.lora.spec import LoRASpec
from lorakit.loss.cross_entropy import cross_entropy
from lorakit.model.load import load_model, load_tokenizer
from lorakit.training.module import LoRAModule
from lorakit.training.step import compute_loss
from lorakit.weights.adapter import save_adapter
from lorakit.weights.merge import merge_adapter

DATUMS = make_datums(4, vocab=288)


@pytest.mark.parametrize("family", FAMILIES)
def test_it_trains_saves_reloads_in_plain_peft_and_merges_to_equal_logits(
    family: str, tmp_path: Path
) -> None:
    base = write_base(tmp_path / "base", family)
    spec = LoRASpec(rank=4, alpha=8)
    model = inject(load_model(base, dtype="float32"), spec, base_name=base)
    assert any(
        FAMILIES[family][2] in name for name, _ in model.named_parameters() if "lora_A" in name
    )
    # B is 0
    assert difference(logits(model), logits(AutoModelForCausalLM.from_pretrained(base))) < 1e-6

    module = LoRAModule(lambda: model, optimizer=sgd(0.05), clip_norm=1.0)
    trainer = make_trainer(tmp_path)
    trainer.fit(module, FiveSteps())
    assert trainer.global_step == 5 and module.num_bad_steps == 0
    assert difference(logits(model), logits(AutoModelForCausalLM.from_pretrained(base))) > 1e-4

    randomise(model, std=0.1)  # far from the base, so that nothing lost passes unseen
    adapted = logits(model)
    (tmp_path / "adapter").mkdir()
    save_adapter(model, tmp_path / "adapter")
    plain = peft.PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base), tmp_path / "adapter"
    )
    assert difference(logits(plain), adapted) < 1e-5
    merge_adapter(
        base,
        lambda dtype: load_model(base, dtype=dtype),
        tmp_path / "adapter",
        tmp_path / "merged",
        dtype=torch.float32,
        tokenizer=load_tokenizer(base),
        can_compare=True,
    )
    assert (
        difference(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")), adapted)
        < 1e-4
    )


class FiveSteps:
    """The same rows five times, without a length, as lorakit's stream is one."""

    def __iter__(self) -> Any:
        for _ in range(5):
            yield from make_batches(DATUMS, 4, 1)


@pytest.mark.parametrize("family", FAMILIES)
def test_its_gradient_is_that_of_all_logits(family: str, tmp_path: Path) -> None:
    """The loss head knows soft-capping, multipliers, biases and tied matrices, or lets the model
    make all logits itself.
    """
    base = write_base(tmp_path / "base", family)
    model = randomise(
        inject(load_model(base, dtype="float32"), LoRASpec(rank=4, alpha=8), base_name=base)
    )
    batch = collate([[datum] for datum in DATUMS], pad_token_id=0)
    compute_loss(model.eval(), batch, cross_entropy).loss_sum.backward()
    ours = gradients(model)
    model.zero_grad()
    whole = model(input_ids=batch.input_ids, use_cache=False).logits.log_softmax(-1)
    picked = whole.gather(-1, batch.targets[..., None])[..., 0]
    (-(batch.weights * picked).sum()).backward()
    assert relative_l2(ours, gradients(model)) < 2e-5

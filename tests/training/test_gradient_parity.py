"""However the window is cut into micro-batches, the gradient is that of plain transformers and
PEFT.
"""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from tiny_models import (
    Loader,
    gradients,
    make_batches,
    make_datums,
    make_model,
    make_trainer,
    randomise,
    relative_l2,
    sgd,
    trainable,
)

from lorakit.data.batch.collate import collate
from lorakit.lora.inject import inject
from lorakit.lora.spec import LoRASpec
from lorakit.loss.cross_entropy import cross_entropy
from lorakit.model.layers import enable_checkpointing
from lorakit.training.module import LoRAModule
from lorakit.training.step import compute_loss
from lorakit.types import Datum

# so large that the parameter before the step is lost in the rounding of the step itself
LR = 2.0**14
SPEC = LoRASpec(rank=4, alpha=8, unembedding=False)
DATUMS = make_datums(8)


def trained_gradient(
    folder: Any, family: str, rows_each: int, accumulate: int, checkpointing: bool = False
) -> dict[str, torch.Tensor]:
    """One SGD step of a real Trainer over all rows; the gradient is read back from the change of
    the parameters.
    """
    model = randomise(inject(make_model(family), SPEC))
    if checkpointing:
        enable_checkpointing(model)
    before = trainable(model)
    module = LoRAModule(lambda: model, optimizer=sgd(LR), clip_norm=0.0)
    trainer = make_trainer(folder, accumulate_grad_batches=accumulate)
    trainer.fit(module, Loader(make_batches(DATUMS, rows_each, accumulate)))
    assert trainer.global_step == 1
    return {name: (before[name] - after) / LR for name, after in trainable(model).items()}


def plain_model(family: str) -> Any:
    """The same adapter by PEFT alone."""
    modules = ["q_proj", "k_proj", "v_proj", "o_proj"] + (
        [] if family == "qwen3_moe" else ["gate_proj", "up_proj", "down_proj"]
    )
    parameters = (
        ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"] if family == "qwen3_moe" else None
    )
    config = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=4,
        lora_alpha=8,
        target_modules=modules,
        target_parameters=parameters,
    )
    return randomise(peft.get_peft_model(make_model(family), config))


def row_loss(model: Any, datum: Datum) -> torch.Tensor:
    """-sum(weight * logprob) of one row without padding, from all the logits, position by
    position.
    """
    tokens = [*datum.model_input.to_ints(), int(datum.targets[-1])]
    logprobs = model(input_ids=torch.tensor([tokens])).logits[0].log_softmax(dim=-1)
    terms = [float(weight) * logprobs[i, tokens[i + 1]] for i, weight in enumerate(datum.weights)]
    return -torch.stack(terms).sum()


def plain_gradient(family: str, groups: list[list[Datum]]) -> dict[str, torch.Tensor]:
    """Mean over ``groups`` of sum / sum(|weight|): one group is the true normalisation, several
    are the well-known mistake.
    """
    model = plain_model(family)
    losses = [
        sum(row_loss(model, d) for d in group) / float(sum(abs(d.weights).sum() for d in group))
        for group in groups
    ]
    (sum(losses) / len(losses)).backward()
    return gradients(model)


@pytest.mark.parametrize("family", ["qwen3_moe", "qwen3", "llama"])
def test_1x8_2x4_and_8x1_give_the_gradient_of_plain_transformers_and_peft(
    family: str, tmp_path: Any
) -> None:
    whole = trained_gradient(tmp_path, family, rows_each=8, accumulate=1)
    theirs = plain_gradient(family, [DATUMS])
    assert relative_l2(whole, theirs) < 1e-6
    for rows_each, accumulate in ((4, 2), (2, 4), (1, 8)):
        cut = trained_gradient(tmp_path, family, rows_each, accumulate)
        assert relative_l2(cut, whole) < 1e-6
        assert relative_l2(cut, theirs) < 1e-6


@pytest.mark.parametrize("family", ["qwen3_moe", "llama"])
def test_a_mean_of_micro_batch_means_is_a_different_gradient(family: str) -> None:
    theirs = plain_gradient(family, [DATUMS])
    assert relative_l2(plain_gradient(family, [[datum] for datum in DATUMS]), theirs) > 1e-2
    assert relative_l2(plain_gradient(family, [DATUMS[:4], DATUMS[4:]]), theirs) > 1e-2


def test_a_short_window_at_the_end_of_the_data_has_its_own_denominator(tmp_path: Any) -> None:
    model = randomise(inject(make_model("llama"), SPEC))
    before = trainable(model)
    module = LoRAModule(lambda: model, optimizer=sgd(LR), clip_norm=0.0)
    make_trainer(tmp_path, accumulate_grad_batches=4).fit(
        module, Loader(make_batches(DATUMS[:3], 1, 4))
    )
    ours = {name: (before[name] - after) / LR for name, after in trainable(model).items()}
    assert relative_l2(ours, plain_gradient("llama", [DATUMS[:3]])) < 1e-6


@pytest.mark.parametrize("family", ["qwen3_moe", "llama"])
def test_activation_checkpointing_gives_the_same_gradient(family: str, tmp_path: Any) -> None:
    plain = trained_gradient(tmp_path, family, rows_each=4, accumulate=2)
    again = trained_gradient(tmp_path, family, rows_each=4, accumulate=2, checkpointing=True)
    assert relative_l2(again, plain) < 1e-6


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", ["qwen3_moe", "llama"])
def test_nothing_below_the_first_adapter_makes_a_graph(family: str, checkpointing: bool) -> None:
    base = make_model(family)
    model = inject(base, LoRASpec(rank=4, targets=["*.layers.1.*"])).train()
    if checkpointing:
        enable_checkpointing(model)
    seen: dict[str, bool] = {}
    for name in ("embed_tokens", "layers.0", "layers.1"):
        base.model.get_submodule(name).register_forward_hook(
            lambda module, args, output, name=name: seen.__setitem__(name, output.requires_grad)
        )
    compute_loss(model, collate([DATUMS[:1]], pad_token_id=0), cross_entropy).loss_sum.backward()
    assert seen == {"embed_tokens": False, "layers.0": False, "layers.1": True}
    assert all(
        gradient.abs().sum() > 0 for name, gradient in gradients(model).items() if "lora_B" in name
    )

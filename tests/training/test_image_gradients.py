"""However images are spread over micro-batches, the gradient is that of plain transformers and
PEFT, towers included.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from PIL import Image
from tiny_models import (
    Loader,
    gradients,
    make_batches,
    make_trainer,
    randomise,
    relative_l2,
    sgd,
    trainable,
)
from vision import draw_image, make_encoder, make_reference, make_tokenizer, make_vl_model

from lorakit.data.batch.collate import collate
from lorakit.data.batch.split import split_batch
from lorakit.data.datamodule import LoRADataModule
from lorakit.lora.inject import inject
from lorakit.lora.spec import LoRASpec
from lorakit.loss.cross_entropy import cross_entropy
from lorakit.model.layers import enable_checkpointing
from lorakit.training.module import LoRAModule
from lorakit.training.step import compute_loss
from lorakit.types import Datum

# so large that the parameter before the step is lost in the rounding of the step itself
LR = 2.0**14
# rows 0, 1, 4 are text
SIZES = {
    2: [(48, 32)],
    3: [(24, 24), (40, 40)],
    5: [(64, 48)],
    6: [(32, 16), (16, 16)],
    7: [(24, 40)],
}
ANSWERS = [
    "yes",
    "a longer answer than the others",
    "no",
    "seven",
    "q",
    "one, two, three",
    "left",
    "it is the first of both",
]


def messages(folder: Path, number: int) -> list[dict[str, Any]]:
    asked: list[dict[str, Any]] = []
    for place, size in enumerate(SIZES.get(number, [])):
        path = folder / f"{number}-{place}.png"
        draw_image(10 * number + place, size).save(path)
        asked.append({"type": "image", "image": str(path)})
    asked.append({"type": "text", "text": f"question {number}?"})
    return [
        {"role": "user", "content": asked if SIZES.get(number) else asked[0]["text"]},
        {"role": "assistant", "content": ANSWERS[number]},
    ]


def make_datums(folder: Path) -> list[Datum]:
    path = folder / "rows.jsonl"
    path.write_text(
        "".join(json.dumps({"messages": messages(folder, number)}) + "\n" for number in range(8))
    )
    data = LoRADataModule(path=str(path))
    data.set_tokenizer(make_tokenizer(), make_encoder())
    return [data.train_examples.datums(index)[0] for index in range(8)]


def trained_gradient(
    folder: Path,
    rows_each: int,
    accumulate: int,
    *,
    packs: bool = False,
    checkpointing: bool = False,
) -> dict[str, torch.Tensor]:
    """One SGD step of a real Trainer over all rows; the gradient is read back from the change of
    the parameters.
    """
    model = randomise(inject(make_vl_model(), LoRASpec(rank=4, alpha=8, vision=True, merger=True)))
    if checkpointing:
        enable_checkpointing(model)
    before = trainable(model)
    module = LoRAModule(lambda: model, optimizer=sgd(LR), clip_norm=0.0)
    trainer = make_trainer(folder, accumulate_grad_batches=accumulate)
    trainer.fit(
        module,
        Loader(
            make_batches(
                make_datums(folder), rows_each, accumulate, images=make_encoder(), packs=packs
            )
        ),
    )
    assert trainer.global_step == 1
    return {name: (before[name] - after) / LR for name, after in trainable(model).items()}


@functools.cache
def plain_model() -> Any:
    modules = [
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "qkv",
        "attn.proj",
        "linear_fc1",
        "linear_fc2",
    ]
    parameters = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    config = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=4,
        lora_alpha=8,
        target_modules=modules,
        target_parameters=parameters,
    )
    return randomise(peft.get_peft_model(make_vl_model(), config))


def plain_gradient(folder: Path, groups: list[list[int]]) -> dict[str, torch.Tensor]:
    """Mean over ``groups`` of rows of sum / count: one group is the true normalisation, several
    are the well-known mistake.
    """
    model, reference = plain_model(), make_reference()
    model.zero_grad()
    total: Any = 0.0
    for group in groups:
        losses, count = [], 0
        for number in group:
            said = messages(folder, number)
            images = [
                Image.open(part["image"])
                for part in said[0]["content"]
                if isinstance(part, dict) and "image" in part
            ]
            prompt = reference.apply_chat_template(
                said[:1], tokenize=False, add_generation_prompt=True
            )
            inputs = reference(
                text=[f"{prompt}{ANSWERS[number]}<|im_end|>"],
                images=images or None,
                return_tensors="pt",
            )
            num_trained = len(
                make_tokenizer()(f"{ANSWERS[number]}<|im_end|>", add_special_tokens=False)[
                    "input_ids"
                ]
            )
            logprobs = model(**inputs).logits[0, -num_trained - 1 : -1].log_softmax(-1)
            losses.append(-logprobs.gather(1, inputs["input_ids"][0, -num_trained:, None]).sum())
            count += num_trained
        total = total + torch.stack(losses).sum() / count / len(groups)
    total.backward()
    return gradients(model)


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    return plain_gradient(tmp_path_factory.mktemp("rows"), [list(range(8))])


@pytest.mark.parametrize(("rows_each", "accumulate"), [(8, 1), (4, 2), (2, 4), (1, 8)])
def test_1x8_2x4_and_8x1_give_the_gradient_of_plain_transformers_and_peft(
    rows_each: int, accumulate: int, theirs: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    assert relative_l2(trained_gradient(tmp_path, rows_each, accumulate), theirs) < 2e-6


@pytest.mark.parametrize("checkpointing", [False, True])
def test_packed_rows_give_it_too(
    checkpointing: bool, theirs: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    ours = trained_gradient(tmp_path, 4, 2, packs=True, checkpointing=checkpointing)
    assert relative_l2(ours, theirs) < 2e-6


def test_a_mean_of_micro_batch_means_is_another_gradient(
    theirs: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    assert any(".visual.blocks." in name for name in theirs) and any(
        ".deepstack_merger_list." in name for name in theirs
    )
    assert relative_l2(plain_gradient(tmp_path, [[number] for number in range(8)]), theirs) > 1e-2


PARTS = (
    "visual.blocks.0",
    "visual.blocks.1",
    "visual.blocks.2",
    "visual.deepstack_merger_list.0",
    "visual.deepstack_merger_list.1",
    "visual.merger",
    "language_model.layers.0",
    "language_model.layers.2",
)
LANGUAGE, MERGERS = (
    {"language_model.layers.0", "language_model.layers.2"},
    {"visual.merger", "visual.deepstack_merger_list.1"},
)
GRAPHS: list[tuple[dict[str, Any], set[str]]] = [
    ({}, LANGUAGE),
    ({"targets": ["*.language_model.layers.2.*"]}, {"language_model.layers.2"}),
    (
        {"attention": False, "experts": False, "merger": True},
        LANGUAGE | MERGERS | {"visual.deepstack_merger_list.0"},
    ),
    ({"targets": ["*.visual.blocks.2.*"]}, LANGUAGE | MERGERS | {"visual.blocks.2"}),
]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(("settings", "expected"), GRAPHS)
def test_frozen_parts_below_the_first_adapter_make_no_graph(
    settings: dict[str, Any], expected: set[str], checkpointing: bool, tmp_path: Path
) -> None:
    base = make_vl_model()
    model = inject(base, LoRASpec(rank=4, **settings)).train()
    if checkpointing:
        enable_checkpointing(model)
    seen: dict[str, bool] = {}
    for name in PARTS:
        base.model.get_submodule(name).register_forward_hook(
            lambda module, args, output, name=name: seen.__setitem__(name, output.requires_grad)
        )
    batch = collate(
        [[datum] for datum in make_datums(tmp_path)[:4]], pad_token_id=0, images=make_encoder()
    )
    compute_loss(model, batch, cross_entropy).loss_sum.backward()
    assert {name for name, has_graph in seen.items() if has_graph} == expected and set(seen) == set(
        PARTS
    )
    assert all(
        gradient.abs().sum() > 0 for name, gradient in gradients(model).items() if "lora_B" in name
    )


@pytest.mark.parametrize("packs", [False, True])
def test_a_batch_in_parts_has_the_images_of_its_rows(packs: bool, tmp_path: Path) -> None:
    model, datums = (
        randomise(inject(make_vl_model(), LoRASpec(rank=4, alpha=8, vision=True))),
        make_datums(tmp_path),
    )
    whole = collate([datums] if packs else [[datum] for datum in datums], 0, make_encoder())
    parts = split_batch(whole, 1)
    assert len(parts) == 8 and [sum(part.num_images) for part in parts] == [
        len(SIZES.get(number, [])) for number in range(8)
    ]
    found = []
    for batches in ([whole], parts):
        model.zero_grad()
        losses = [compute_loss(model, batch, cross_entropy).loss_sum for batch in batches]
        torch.stack(losses).sum().backward()
        found.append((float(sum(losses)), gradients(model)))
    assert (
        found[1][0] == pytest.approx(found[0][0], rel=1e-5)
        and relative_l2(found[1][1], found[0][1]) < 1e-5
    )

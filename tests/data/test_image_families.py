"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL: positions, logits alone and packed, and adapters on the
tower, as for the tiny model.
"""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
from transformers import AutoConfig
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from vision import draw_image, logits_of, make_tokenizer, png

from lorakit.data.batch.collate import collate, idle_batch
from lorakit.data.images import ImageEncoder
from lorakit.lora.inject import inject
from lorakit.lora.spec import LoRASpec
from lorakit.loss.cross_entropy import cross_entropy
from lorakit.model.attention import attend_by_document
from lorakit.model.load import model_class
from lorakit.training.step import compute_loss
from lorakit.types import Datum, EncodedTextChunk, ImageChunk, ModelInput

TEXT: dict[str, Any] = {
    "vocab_size": 288,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
PATCHES = {"patch_size": 4, "temporal_patch_size": 2, "spatial_merge_size": 2}
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen2_vl": {
        "text_config": {**TEXT, "rope_parameters": ROPE},
        "vision_config": {
            **PATCHES,
            "depth": 3,
            "embed_dim": 32,
            "hidden_size": 64,
            "num_heads": 2,
            "mlp_ratio": 2,
        },
    },
    "qwen2_5_vl": {
        "text_config": {**TEXT, "rope_parameters": ROPE},
        "vision_config": {
            **PATCHES,
            "depth": 3,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 2,
            "out_hidden_size": 64,
            "window_size": 16,
            "fullatt_block_indexes": [1],
        },
    },
    "qwen3_vl": {
        "text_config": {
            **TEXT,
            "head_dim": 16,
            "rope_parameters": {**ROPE, "mrope_interleaved": True},
        },
        "vision_config": {
            **PATCHES,
            "depth": 3,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 2,
            "out_hidden_size": 64,
            "num_position_embeddings": 64,
            "deepstack_visual_indexes": [1],
        },
    },
}


@functools.cache
def make(family: str) -> tuple[Any, ImageEncoder]:
    named = {
        "image": "image_pad",
        "video": "video_pad",
        "vision_start": "vision_start",
        "vision_end": "vision_end",
    }
    ids = {
        f"{name}_token_id": make_tokenizer().convert_tokens_to_ids(f"<|{token}|>")
        for name, token in named.items()
    }
    config = AutoConfig.for_model(family, **FAMILIES[family], **ids, tie_word_embeddings=False)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = model_class(config).from_config(config)
        for parameter in model.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.15)
    processor = Qwen2VLImageProcessorPil(
        **{**PATCHES, "merge_size": 2}, size={"shortest_edge": 64, "longest_edge": 4096}
    )
    return model.requires_grad_(False).eval(), ImageEncoder(processor, config)


def make_datums(encoder: ImageEncoder) -> list[Datum]:
    tokens, found = make_tokenizer(), []
    start, end = (
        EncodedTextChunk((tokens.convert_tokens_to_ids(f"<|vision_{side}|>"),))
        for side in ("start", "end")
    )
    for number, sizes in enumerate([[(48, 32)], [(24, 40), (56, 16)], [], [(32, 32)]]):
        chunks: list[Any] = [EncodedTextChunk(tuple(range(40 + number, 46 + number)))]
        for place, size in enumerate(sizes):
            chunk = ImageChunk(png(draw_image(7 * number + place, size)), "png")
            chunks += [start, ImageChunk(chunk.data, "png", encoder.count_tokens(chunk)), end]
        model_input = ModelInput((*chunks, EncodedTextChunk(tuple(range(60, 66)))))
        targets = list(range(70, 70 + model_input.length))
        found.append(
            Datum(
                model_input,
                {"target_tokens": [t % 200 for t in targets], "weights": [1.0] * len(targets)},
            )
        )
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_alone_padded_and_packed_have_the_logits_of_transformers(family: str) -> None:
    model, encoder = make(family)
    datums = make_datums(encoder)
    padded = logits_of(model, encoder, [[datum] for datum in datums])
    packed = logits_of(model, encoder, [datums])
    for datum, in_padding, in_pack in zip(datums, padded, packed, strict=True):
        tokens = torch.tensor([encoder.tokens(datum.model_input)])
        inputs: dict[str, Any] = {"mm_token_type_ids": (tokens == encoder.token_id).int()}
        if datum.model_input.images:
            encoded = encoder.encode(datum.model_input.images)
            inputs["pixel_values"] = torch.cat([torch.tensor(one.patches_PD) for one in encoded])
            inputs["image_grid_thw"] = torch.tensor([one.grid for one in encoded])
        with torch.no_grad():
            theirs = model(input_ids=tokens, **inputs).logits[0]
        assert torch.allclose(in_padding, theirs, atol=1e-5) and torch.allclose(
            in_pack, theirs, atol=1e-5
        )


@pytest.mark.parametrize("family", FAMILIES)
def test_towers_take_adapters_and_run_for_rows_of_text(family: str) -> None:
    model, encoder = make(family)
    adapted = inject(copy.deepcopy(model), LoRASpec(rank=2, vision=True, merger=True)).train()
    names = {
        name
        for name, parameter in adapted.named_parameters()
        if parameter.requires_grad and "visual" in name
    }
    assert any(".blocks.2." in name for name in names) and any(".merger." in name for name in names)
    datums = make_datums(encoder)
    text = compute_loss(adapted, collate([[datums[2]]], 0, encoder), cross_entropy).loss_sum
    text.backward()
    tower = [parameter for name, parameter in adapted.named_parameters() if name in names]
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in tower)
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([encoder.tokens(datums[2].model_input)])).logits[0]
    by_hand = -logits.log_softmax(-1).gather(1, torch.tensor(datums[2].targets)[:, None]).sum()
    assert text.item() == pytest.approx(by_hand.item(), rel=1e-5)
    compute_loss(
        adapted, collate([[datum] for datum in datums], 0, encoder), cross_entropy
    ).loss_sum.backward()
    assert all(
        parameter.grad.any()
        for name, parameter in adapted.named_parameters()
        if name in names and "lora_B" in name
    )


@pytest.mark.parametrize("by_document", [False, True])
def test_a_process_without_a_row_runs_the_tower_too(by_document: bool) -> None:
    model = copy.deepcopy(make("qwen3_vl")[0])
    if by_document:
        assert attend_by_document(model) is None
    adapted = inject(model, LoRASpec(rank=2, vision=True)).train()
    loss = compute_loss(adapted, idle_batch(0), cross_entropy).loss_sum
    loss.backward()
    assert loss.item() == 0 and all(
        p.grad is not None for p in adapted.parameters() if p.requires_grad
    )

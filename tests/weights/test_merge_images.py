"""A vision-language model in the hub's layout, trained, merged, and read by plain transformers
and plain PEFT.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from tiny_models import randomise
from transformers import AutoModelForImageTextToText
from vision import draw_image, make_encoder, make_reference, make_tokenizer, save_vl_model

from lorakit.errors import ConfigError
from lorakit.lora.inject import inject
from lorakit.lora.spec import LoRASpec
from lorakit.model.load import (
    check_experts_as_on_the_hub,
    load_config,
    load_image_processor,
    load_model,
)
from lorakit.weights.adapter import save_adapter
from lorakit.weights.hub_layout import copy_processor
from lorakit.weights.merge import merge_adapter


def shapes(folder: str | Path) -> dict[str, list[int]]:
    return {
        name: list(tensor.shape)
        for name, tensor in load_file(Path(folder) / "model.safetensors").items()
    }


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    text = "a<|vision_start|><|image_pad|><|vision_end|>How many?"
    inputs = make_reference()(text=[text], images=[draw_image(1, (48, 32))], return_tensors="pt")
    return model(**inputs, use_cache=False).logits


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_vl_model(tmp_path_factory.mktemp("base"))


def test_from_the_hubs_layout_through_training_and_merging_back_to_it(
    base: str, tmp_path: Path
) -> None:
    assert shapes(base)["model.language_model.layers.0.mlp.experts.gate_up_proj"] == [12, 128, 192]
    spec = LoRASpec(rank=4, vision=True, merger=True, unembedding=True)
    model = randomise(inject(load_model(base), spec, base_name=base))
    expected = logits(model)
    assert not torch.allclose(expected, logits(load_model(base)), atol=1e-2)
    (tmp_path / "adapter").mkdir()
    save_adapter(model, tmp_path / "adapter")

    plain = peft.PeftModel.from_pretrained(
        AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float32), tmp_path / "adapter"
    )
    assert torch.allclose(logits(plain.eval()), expected, atol=2e-4)

    report = merge_adapter(
        base,
        lambda dtype: load_model(base, dtype=dtype),
        tmp_path / "adapter",
        tmp_path / "merged",
        dtype=torch.float32,
        tokenizer=make_tokenizer(),
        can_compare=True,
    )
    assert {
        name.split(".")[1]
        for name in (tensor.name for tensor in report.tensors)
        if "visual" in name
    }
    assert shapes(tmp_path / "merged") == shapes(base)
    merged = AutoModelForImageTextToText.from_pretrained(
        tmp_path / "merged", dtype=torch.float32
    ).eval()
    assert torch.allclose(logits(merged), expected, atol=2e-4)
    processor = load_image_processor(str(tmp_path / "merged"))
    assert json.loads(processor.to_json_string()) == json.loads(
        make_encoder().processor.to_json_string()
    )


def test_experts_that_zero_3_would_turn_round_are_refused(base: str, tmp_path: Path) -> None:
    config = load_config(base)
    check_experts_as_on_the_hub(base, config, Path(base))
    load_model(base).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"gate_up_proj as \(12, 192, 128\).*strategy=zero2"):
        check_experts_as_on_the_hub("mine", config, tmp_path)


@pytest.mark.parametrize("name", ["preprocessor_config.json", "processor_config.json"])
def test_a_merged_model_scales_images_as_the_run_did(base: str, tmp_path: Path, name: str) -> None:
    source = tmp_path / "base"
    source.mkdir()
    settings = json.loads((Path(base) / "preprocessor_config.json").read_text())
    nested = (
        {"image_processor": settings, "processor_class": "Qwen3VLProcessor"}
        if name == "processor_config.json"
        else settings
    )
    (source / name).write_text(json.dumps(nested))
    (tmp_path / "as_it_is").mkdir()
    copy_processor(str(source), tmp_path / "as_it_is")
    assert json.loads((tmp_path / "as_it_is" / name).read_text()) == nested
    (tmp_path / "bounded").mkdir()
    copy_processor(str(source), tmp_path / "bounded", pixel_bounds=(None, 4096))
    found = json.loads((tmp_path / "bounded" / name).read_text())
    assert found.get("image_processor", found)["size"] == {**settings["size"], "longest_edge": 4096}

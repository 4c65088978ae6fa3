"""vLLM's layout for each family of experts: what its readers find by name, and that the function
is the trained one.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from model_folders import difference, logits, write_base
from safetensors.torch import load_file
from tiny_models import randomise
from transformers import AutoModelForCausalLM

from lorakit.errors import AdapterError
from lorakit.lora.inject import inject
from lorakit.lora.spec import LoRASpec
from lorakit.model.load import load_model, load_skeleton
from lorakit.weights.adapter import AdapterFiles, save_adapter
from lorakit.weights.export import largest_rank, write_vllm
from lorakit.weights.reload import check_layout

OF_EACH = ["gate_proj", "up_proj", "down_proj"]
# family, what stands behind a layer's name for the experts, and the matrices of each; or the stacks
# that vLLM needs whole
EACH = [
    ("qwen 3 moe", "mlp.experts", OF_EACH),
    ("olmoe", "mlp.experts", OF_EACH),
    ("deepseek v3", "mlp.experts", OF_EACH),
    ("mixtral", "block_sparse_moe.experts", ["w1", "w3", "w2"]),
]
STACKED = ["gpt-oss", "qwen 3.5 moe"]


def exported(
    folder: Path, family: str, layout: str, **spec: Any
) -> tuple[str, torch.Tensor, dict[str, torch.Tensor]]:
    """The base, the logits of a random adapter on it, and the tensors of the folder ``vllm``
    that was written of it.
    """
    base = write_base(folder / "base", family)
    model = inject(
        load_model(base, dtype="float32"),
        LoRASpec(rank=4, alpha=8, expert_layout=layout, **spec),
        base_name=base,
    )
    adapted = logits(randomise(model, std=0.1))
    for name in ("adapter", "vllm"):
        (folder / name).mkdir()
    save_adapter(model, folder / "adapter")
    write_vllm(
        AdapterFiles.open(folder / "adapter"),
        load_skeleton(base),
        folder / "vllm",
        dtype=torch.float32,
    )
    assert check_layout(folder / "vllm", load_skeleton(base)) > 0
    return base, adapted, load_file(folder / "vllm/adapter_model.safetensors")


@pytest.mark.parametrize("layout", ["per_expert", "shared_outer"])
@pytest.mark.parametrize(("family", "parent", "names"), EACH, ids=[family for family, *_ in EACH])
def test_each_matrix_of_each_expert_has_its_pair(
    family: str, parent: str, names: list[str], layout: str, tmp_path: Path
) -> None:
    base, adapted, tensors = exported(tmp_path, family, layout)
    found = {
        match[1]
        for name in tensors
        if (match := re.search(r"layers\.1\.(.*experts\..*)\.lora_A\.weight", name))
    }
    assert found - {name for name in found if "shared_experts" in name} == {
        f"{parent}.{expert}.{name}" for expert in range(4) for name in names
    }
    plain = peft.PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base), tmp_path / "vllm"
    )
    assert difference(logits(plain), adapted) < 1e-5
    assert largest_rank(AdapterFiles.open(tmp_path / "vllm").config) == 4


@pytest.mark.parametrize("layout", ["per_expert", "shared_outer"])
@pytest.mark.parametrize("family", STACKED)
def test_families_that_vllm_holds_stacked_are_as_peft_writes_them(
    family: str, layout: str, tmp_path: Path
) -> None:
    base, adapted, tensors = exported(tmp_path, family, layout)
    assert not any(re.search(r"experts\.\d", name) for name in tensors)
    assert {
        name.split("mlp.experts.")[1] for name in tensors if "layers.1.mlp.experts." in name
    } == {
        *("base_layer.lora_A.weight", "base_layer.lora_B.weight", "lora_A.weight", "lora_B.weight")
    }
    plain = peft.PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base), tmp_path / "vllm"
    )
    assert difference(logits(plain), adapted) < 1e-5


def test_an_adapter_on_some_matrices_of_the_experts_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(
        AdapterError,
        match="vLLM needs an adapter on each matrix of the experts, and down_proj has none",
    ):
        exported(tmp_path, "qwen 3 moe", "per_expert", targets=["q_proj", "gate_up_proj"])

"""Merged and adapter form are the same model; each matrix is W + s B A, rounded once; nothing is
written otherwise.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from tiny_models import make_model, randomise
from transformers import AutoModelForCausalLM

from lorakit.errors import AdapterError, CheckpointError
from lorakit.lora.inject import inject
from lorakit.lora.spec import LoRASpec
from lorakit.model.load import load_tokenizer
from lorakit.weights import merge
from lorakit.weights.adapter import TENSOR_FILE, AdapterFiles, save_adapter
from lorakit.weights.merge import MergeReport, merge_adapter

FORMS = [
    ("qwen3_moe", {}),
    ("llama", {}),
    ("qwen3", {"unembedding": True}),
    ("llama", {"dora": True}),
    ("qwen3", {"rslora": True}),
]


FAMILIES = ("qwen3_moe", "qwen3", "llama")
GPT2_LEAVES = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")


def _adapter(
    folder: Path, family: str, adapter_dtype: torch.dtype | None = None, **spec: Any
) -> Path:
    model = randomise(inject(make_model(family), LoRASpec(rank=4, alpha=6, **spec)), std=0.1)
    folder.mkdir(exist_ok=True)
    save_adapter(model, folder, dtype=adapter_dtype)
    return folder


def _merge(
    tmp_path: Path,
    family: str,
    dtype: torch.dtype = torch.float32,
    *,
    base: Any = None,
    **options: Any,
) -> tuple[Path, MergeReport]:
    """Merge ``tmp_path/adapter`` into ``base``, as a stored model that is loaded in the dtype
    asked for.
    """

    def load(name: str) -> Any:
        if base is None or family not in FAMILIES:
            return (
                make_model(family, name)
                if base is None
                else copy.deepcopy(base).to(getattr(torch, name))
            )
        # ``to`` would round rotary tables as well, which no file has
        model = make_model(family, name)
        model.load_state_dict(base.state_dict())
        return model

    out = tmp_path / f"merged-{len(list(tmp_path.iterdir()))}"
    settings = {"dtype": dtype, "tokenizer": load_tokenizer("tiny"), "can_compare": True, **options}
    report = merge_adapter("base", load, tmp_path / "adapter", out, **settings)
    return out, report


@pytest.mark.parametrize(("family", "spec"), FORMS)
def test_the_merged_folder_has_the_adapter_forms_logits(
    tmp_path: Path, family: str, spec: dict[str, Any]
) -> None:
    adapted = merge.attach(make_model(family), _adapter(tmp_path / "adapter", family, **spec))
    out, report = _merge(tmp_path, family)
    tokens = torch.randint(0, 64, (2, 20), generator=torch.Generator().manual_seed(1))
    expected = adapted(tokens).logits
    merged = AutoModelForCausalLM.from_pretrained(out)
    assert (merged(tokens).logits - expected).abs().max() <= 1e-4 * expected.abs().max()
    assert (make_model(family)(tokens).logits - expected).abs().max() > 0.1  # the control
    assert (
        report.float32_difference is not None
        and report.float32_difference < 1e-4 * report.largest_logit
    )
    assert len(report.tensors) == len(AdapterFiles.open(tmp_path / "adapter").tensors()) // (
        3 if spec.get("dora") else 2
    )


def test_each_matrix_is_w_plus_scaled_ba_in_pefts_interleaving(tmp_path: Path) -> None:
    factors = AdapterFiles.open(_adapter(tmp_path / "adapter", "qwen3_moe")).tensors()
    out, _ = _merge(tmp_path, "qwen3_moe")
    base, merged = make_model(), AutoModelForCausalLM.from_pretrained(out)
    name = "base_model.model.model.layers.1.self_attn.q_proj.lora_{}.weight"
    product = 1.5 * factors[name.format("B")].double() @ factors[name.format("A")].double()
    before, after = (
        model.model.layers[1].self_attn.q_proj.weight.double() for model in (base, merged)
    )
    assert (after - before - product).abs().max() < 1e-6
    experts = [model.model.layers[0].mlp.experts for model in (base, merged)]
    for kind in ("gate_up_proj", "down_proj"):
        before, after = (getattr(module, kind).double() for module in experts)
        names = [
            key
            for key in factors
            if "layers.0.mlp.experts" in key
            and "lora_A" in key
            and factors[key].shape[1] == before.shape[2]
        ]
        (a_name,) = names
        a, b = factors[a_name].double(), factors[a_name.replace("lora_A", "lora_B")].double()
        for expert in range(4):  # rows (expert, rank) of A; columns (rank, expert) of B
            product = 1.5 * b[:, expert::4] @ a[4 * expert : 4 * expert + 4]
            assert (after[expert] - before[expert] - product).abs().max() < 1e-6


def test_bf16_output_is_rounded_once_with_or_without_the_comparison(tmp_path: Path) -> None:
    _adapter(tmp_path / "adapter", "qwen3_moe")
    rounded, _ = _merge(tmp_path, "qwen3_moe", torch.bfloat16)
    full, _ = _merge(tmp_path, "qwen3_moe", torch.float32)
    expected = {
        name: p.to(torch.bfloat16)
        for name, p in AutoModelForCausalLM.from_pretrained(full).named_parameters()
    }
    found = dict(
        AutoModelForCausalLM.from_pretrained(rounded, dtype=torch.bfloat16).named_parameters()
    )
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    unseen, report = _merge(tmp_path, "qwen3_moe", torch.float32, can_compare=False)
    assert report.float32_difference is None and "do not fit" in report.check
    assert (unseen / "model.safetensors").read_bytes() == (full / "model.safetensors").read_bytes()


def test_an_adapted_unembedding_is_untied_and_the_embedding_stays(tmp_path: Path) -> None:
    _adapter(tmp_path / "adapter", "qwen3", unembedding=True)
    out, report = _merge(tmp_path, "qwen3")
    merged, base = AutoModelForCausalLM.from_pretrained(out), make_model("qwen3")
    assert report.untied and not merged.config.tie_word_embeddings
    assert torch.equal(merged.get_input_embeddings().weight, base.get_input_embeddings().weight)
    assert not torch.equal(
        merged.get_output_embeddings().weight, base.get_output_embeddings().weight
    )


def test_a_merge_that_is_not_exact_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _adapter(tmp_path / "adapter", "llama")
    right = merge._linear_delta
    monkeypatch.setattr(merge, "_linear_delta", lambda layer, adapter: 0.9 * right(layer, adapter))
    with pytest.raises(AdapterError, match="nothing was written"):
        _merge(tmp_path, "llama")
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_what_does_not_fit_or_is_in_the_way_is_refused(tmp_path: Path) -> None:
    _adapter(tmp_path / "adapter", "llama")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").touch()
    with pytest.raises(CheckpointError, match="not empty"):
        merge_adapter(
            "base",
            lambda name: make_model("llama", name),
            tmp_path / "adapter",
            tmp_path / "full",
            dtype=torch.float32,
            tokenizer=load_tokenizer("tiny"),
            can_compare=True,
        )
    file = tmp_path / "adapter" / TENSOR_FILE
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(AdapterError, match="torn"):
        _merge(tmp_path, "llama")


def test_the_report_names_every_tensor_and_says_what_changed(tmp_path: Path) -> None:
    _adapter(tmp_path / "adapter", "qwen3_moe", unembedding=True)
    out, report = _merge(tmp_path, "qwen3_moe")
    before, after = (
        make_model().state_dict(),
        AutoModelForCausalLM.from_pretrained(out).state_dict(),
    )
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert before.keys() == after.keys()
    assert {tensor.name: tensor.shape for tensor in report.tensors} == {
        name: tuple(before[name].shape) for name in changed
    }
    assert len(report.tensors) == 2 * (4 + 2) + 1
    assert not any("gate.weight" in name or "norm" in name or "embed" in name for name in changed)
    for tensor in report.tensors:
        change = (after[tensor.name] - before[tensor.name]).norm() / before[tensor.name].norm()
        assert tensor.relative_change == pytest.approx(float(change), rel=1e-4)
    saved = json.loads((out / "merge_report.json").read_text())
    assert [tensor["name"] for tensor in saved["tensors"]] == [
        tensor.name for tensor in report.tensors
    ]
    assert (saved["base"], saved["dtype"]) == ("base", "float32")


def test_a_difference_over_the_tolerance_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _adapter(tmp_path / "adapter", "llama")
    monkeypatch.setattr(merge, "TOLERANCE", -1.0)
    with pytest.raises(AdapterError, match="nothing was written"):
        _merge(tmp_path, "llama")
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


@pytest.mark.parametrize("can_compare", [True, False])
def test_a_base_in_bf16_becomes_w_plus_scaled_ba_rounded_once(
    tmp_path: Path, can_compare: bool
) -> None:
    folder = tmp_path / "adapter"
    _adapter(folder, "qwen3", unembedding=True, adapter_dtype=torch.bfloat16)  # as a run exports it
    base, factors = make_model("qwen3", "bfloat16"), AdapterFiles.open(folder).tensors()
    out, report = _merge(tmp_path, "qwen3", torch.bfloat16, base=base, can_compare=can_compare)
    assert (report.float32_difference is not None) is can_compare
    merged = load_file(out / "model.safetensors")
    assert merged.keys() == base.state_dict().keys()
    for name, weight in base.state_dict().items():
        key = f"base_model.model.{name.removesuffix('.weight')}.lora_"
        if f"{key}A.weight" in factors:
            a, b = (factors[f"{key}{letter}.weight"].float() for letter in "AB")
            weight = (weight.float() + 1.5 * (b @ a)).to(torch.bfloat16)
        assert merged[name].dtype == torch.bfloat16
        assert torch.equal(merged[name], weight), name


@pytest.mark.parametrize("family", ["qwen3_moe", "qwen3", "llama"])
def test_a_base_in_bf16_gives_the_same_files_with_and_without_the_comparison(
    tmp_path: Path, family: str
) -> None:
    _adapter(tmp_path / "adapter", family, unembedding=True, adapter_dtype=torch.bfloat16)
    files = []
    for can_compare in (True, False):
        out, _ = _merge(
            tmp_path,
            family,
            torch.bfloat16,
            base=make_model(family, "bfloat16"),
            can_compare=can_compare,
        )
        files.append(
            {
                path.name: path.read_bytes()
                for path in out.iterdir()
                if path.name != "merge_report.json"
            }
        )
    assert "model.safetensors" in files[0]
    assert files[0] == files[1]


@pytest.mark.parametrize("can_compare", [True, False])
def test_gpt2s_transposed_matrices_merge_right(tmp_path: Path, can_compare: bool) -> None:
    config = transformers.GPT2Config(
        vocab_size=64,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=64,
        bos_token_id=1,
        eos_token_id=2,
    )
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(config).requires_grad_(False).eval()
    for parameter in base.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    adapted = randomise(inject(copy.deepcopy(base), LoRASpec(rank=4, alpha=6)), std=0.1).eval()
    (tmp_path / "adapter").mkdir()
    save_adapter(adapted, tmp_path / "adapter")
    expected_names = {f"transformer.h.{i}.{leaf}.weight" for i in (0, 1) for leaf in GPT2_LEAVES}
    out, report = _merge(tmp_path, "gpt2", base=base, can_compare=can_compare)
    assert {tensor.name for tensor in report.tensors} == expected_names
    merged, tokens = AutoModelForCausalLM.from_pretrained(out), torch.arange(20)[None]
    expected = adapted(tokens).logits
    assert (merged(tokens).logits - expected).abs().max() <= 1e-4 * expected.abs().max()
    factors = AdapterFiles.open(tmp_path / "adapter").tensors()
    for leaf in ("c_attn", "c_proj"):  # c_proj is square: no shape would tell
        a, b = (
            factors[f"base_model.model.transformer.h.0.attn.{leaf}.lora_{letter}.weight"].double()
            for letter in "AB"
        )
        before, after = (
            getattr(model.transformer.h[0].attn, leaf).weight.double() for model in (base, merged)
        )
        assert (after - before - 1.5 * (b @ a).T).abs().max() < 1e-6


def test_an_empty_folder_is_written_to_and_a_file_is_not(tmp_path: Path) -> None:
    _adapter(tmp_path / "adapter", "llama")
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    options = {"dtype": torch.float32, "tokenizer": load_tokenizer("tiny"), "can_compare": False}
    with pytest.raises(CheckpointError, match="choose another --out"):
        merge_adapter(
            "base",
            lambda name: make_model("llama", name),
            tmp_path / "adapter",
            tmp_path / "file",
            **options,
        )
    merge_adapter(
        "base",
        lambda name: make_model("llama", name),
        tmp_path / "adapter",
        tmp_path / "empty",
        **options,
    )
    assert (tmp_path / "empty/config.json").is_file() and (tmp_path / "file").read_bytes() == b""

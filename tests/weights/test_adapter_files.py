"""What is saved is what plain PEFT loads, and what plain PEFT saves can be started from, or is
refused by name.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import make_model, plain_peft_config, randomise, trainable

from lorakit.errors import AdapterError
from lorakit.lora.inject import inject
from lorakit.lora.spec import LoRASpec
from lorakit.weights.adapter import AdapterFiles, save_adapter, start_from

INPUT_IDS = torch.tensor([[3, 8, 44, 16, 23, 42, 50, 6, 19]])
SPEC = LoRASpec(rank=4, alpha=8)
FAMILIES = ["qwen3_moe", "qwen3", "llama", "qwen3_vl_moe", "qwen3_5_moe"]
TENSORS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=INPUT_IDS, use_cache=False).logits


def plain_peft(family: str, folder: Path, **changes: Any) -> Any:
    """An adapter made, randomised and saved by PEFT alone; the base is called some/base."""
    model = randomise(
        peft.get_peft_model(make_model(family), plain_peft_config(family, **changes)), seed=4
    )
    model.peft_config["default"].base_model_name_or_path = "some/base"
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("change", [{}, {"unembedding": True}, {"rslora": True}])
def test_peft_loads_what_was_saved_with_equal_logits(
    family: str, change: dict, tmp_path: Path
) -> None:
    model = randomise(inject(make_model(family), replace(SPEC, **change)))
    save_adapter(model, tmp_path)
    loaded = peft.PeftModel.from_pretrained(make_model(family), tmp_path)
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-5, atol=1e-5)
    assert (logits(loaded) - logits(make_model(family))).abs().max() > 0.01


def test_peft_loads_dora_too(tmp_path: Path) -> None:
    model = randomise(inject(make_model("llama"), replace(SPEC, dora=True)))
    save_adapter(model, tmp_path)
    assert torch.equal(
        logits(peft.PeftModel.from_pretrained(make_model("llama"), tmp_path)), logits(model)
    )


def test_an_export_in_bf16_is_half_the_size_and_near(tmp_path: Path) -> None:
    model = randomise(inject(make_model(), SPEC))
    (tmp_path / "full").mkdir()
    (tmp_path / "half").mkdir()
    save_adapter(model, tmp_path / "full")
    num_bytes = save_adapter(model, tmp_path / "half", dtype=torch.bfloat16)
    full, half = load_file(tmp_path / "full" / TENSORS), load_file(tmp_path / "half" / TENSORS)
    assert (
        num_bytes
        == (tmp_path / "half" / TENSORS).stat().st_size
        == AdapterFiles.open(tmp_path / "half").num_bytes
    )
    assert sum(t.nbytes for t in half.values()) * 2 == sum(t.nbytes for t in full.values())
    assert {tensor.dtype for tensor in full.values()} == {torch.float32}
    assert all(torch.equal(half[name], tensor.bfloat16()) for name, tensor in full.items())
    assert {tensor.dtype for tensor in trainable(model).values()} == {torch.float32}


def test_saving_twice_gives_identical_bytes(tmp_path: Path) -> None:
    contents = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        save_adapter(randomise(inject(make_model(), SPEC, base_name="some/base")), tmp_path / name)
        contents.append(
            [(path.name, path.read_bytes()) for path in sorted((tmp_path / name).iterdir())]
        )
    assert contents[0] == contents[1]
    assert [name for name, _ in contents[0]] == [CONFIG, TENSORS]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_run_starts_from_an_adapter_of_plain_peft(family: str, tmp_path: Path) -> None:
    theirs = plain_peft(family, tmp_path)
    model = inject(make_model(family), SPEC)
    start_from(model, replace(SPEC, init_from=str(tmp_path)), base="some/base")
    torch.testing.assert_close(logits(model), logits(theirs), rtol=1e-5, atol=1e-5)
    assert all(
        parameter.requires_grad == ("lora_" in name) for name, parameter in model.named_parameters()
    )


def edit_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | changes))


def edit_tensors(folder: Path, change: Any) -> None:
    tensors = load_file(folder / TENSORS)
    change(tensors, sorted(tensors)[0])
    save_file(tensors, folder / TENSORS, metadata={"format": "pt"})


FAULTS: dict[str, tuple[Any, str]] = {
    "another base": (
        lambda f: edit_config(f, base_model_name_or_path="other/one"),
        "trained on base 'other/one'",
    ),
    "another rank": (lambda f: edit_config(f, r=8), r"rank 8, this run lora\.rank=4"),
    "another alpha": (lambda f: edit_config(f, lora_alpha=16), r"alpha 16, this run lora\.alpha=8"),
    "rslora": (lambda f: edit_config(f, use_rslora=True), "use_rslora=True, this run False"),
    "dora": (lambda f: edit_config(f, use_dora=True), "use_dora=True, this run False"),
    "a rank pattern": (lambda f: edit_config(f, rank_pattern={"q_proj": 8}), "rank_pattern"),
    "another method": (lambda f: edit_config(f, peft_type="IA3"), "peft_type is 'IA3'"),
    "a tensor missing": (
        lambda f: edit_tensors(f, lambda t, name: t.pop(name)),
        r"only in the plan: .*layers\.0",
    ),
    "a tensor too many": (
        lambda f: edit_tensors(f, lambda t, name: t.update(extra=torch.ones(2))),
        "only in .*: extra",
    ),
    "a wrong shape": (
        lambda f: edit_tensors(f, lambda t, name: t.update({name: torch.ones(1, 32)})),
        r"lora_A\.weight: \(1, 32\) in .*, \(4, \d+\) in the plan",
    ),
    "a torn file": (
        lambda f: (f / TENSORS).write_bytes((f / TENSORS).read_bytes()[:-40]),
        "torn or not a safetensors file",
    ),
    "an empty file": (lambda f: (f / TENSORS).write_bytes(b""), "torn or not a safetensors file"),
    "a torn config": (lambda f: (f / CONFIG).write_text('{"r": '), "cannot be read"),
    "no tensors": (lambda f: (f / TENSORS).unlink(), f"no {TENSORS}"),
    "no config": (lambda f: (f / CONFIG).unlink(), f"no {CONFIG}"),
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: Any) -> Path:
    """A folder that plain PEFT saved; copy it before you spoil it."""
    folder = tmp_path_factory.mktemp("plain")
    plain_peft("llama", folder)
    return folder


@pytest.fixture(scope="module")
def model() -> Any:
    """A model that every refusal leaves as it is."""
    return inject(make_model("llama"), SPEC)


@pytest.mark.parametrize("fault", FAULTS)
def test_an_adapter_that_does_not_fit_is_refused_by_name_and_changes_nothing(
    fault: str, plain: Path, model: Any, tmp_path: Path
) -> None:
    shutil.copytree(plain, tmp_path, dirs_exist_ok=True)
    spoil, message = FAULTS[fault]
    spoil(tmp_path)
    before = trainable(model)
    with pytest.raises(AdapterError, match=message):
        start_from(model, replace(SPEC, init_from=str(tmp_path)), base="some/base")
    assert all(torch.equal(tensor, before[name]) for name, tensor in trainable(model).items())


def test_all_differences_of_the_config_come_in_one_report(tmp_path: Path) -> None:
    plain_peft("llama", tmp_path, r=8, lora_alpha=4)
    with pytest.raises(AdapterError) as caught:
        start_from(
            inject(make_model("llama"), SPEC),
            replace(SPEC, init_from=str(tmp_path)),
            base="an/other",
        )
    assert all(word in str(caught.value) for word in ("base", "rank 8", "alpha 4"))


def test_other_targets_are_refused_both_ways(tmp_path: Path) -> None:
    plain_peft("llama", tmp_path, target_modules=["q_proj", "lm_head"])
    with pytest.raises(AdapterError) as caught:
        start_from(
            inject(make_model("llama"), SPEC),
            replace(SPEC, init_from=str(tmp_path)),
            base="some/base",
        )
    assert "only in the plan" in str(caught.value)
    assert "lm_head" in str(caught.value)


def test_any_base_accepts_another_name(tmp_path: Path) -> None:
    theirs = plain_peft("llama", tmp_path)
    model = inject(make_model("llama"), SPEC)
    start_from(model, replace(SPEC, init_from=str(tmp_path), any_base=True), base="an/other")
    torch.testing.assert_close(logits(model), logits(theirs), rtol=1e-5, atol=1e-5)

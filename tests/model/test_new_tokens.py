"""New tokens: only their rows are trained, with plain PEFT's gradients; adapter and merged model
carry them.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from model_folders import FAMILIES, difference, write_base
from tiny_models import gradients, randomise, relative_l2, trainable
from transformers import AutoModelForCausalLM, AutoTokenizer

from lorakit.data.batch.collate import collate
from lorakit.data.datum import make_datum
from lorakit.errors import AdapterError, ConfigError
from lorakit.lora.inject import inject
from lorakit.lora.plan import plan_lora
from lorakit.lora.spec import LoRASpec
from lorakit.lora.state import adapters_off
from lorakit.loss.cross_entropy import cross_entropy
from lorakit.loss.logprobs import _CHECKED
from lorakit.model.load import load_model, load_skeleton, load_tokenizer, pieces_of
from lorakit.model.tokens import add_tokens
from lorakit.training.step import compute_loss
from lorakit.weights.adapter import open_init, save_adapter
from lorakit.weights.merge import attach, merge_adapter
from lorakit.weights.reload import reload_in_peft

SOME = (
    "llama",
    "gemma, tied",
    "phi 2, biases",
    "granite, multipliers",
    "gpt-2, Conv1D",
    "qwen 3 moe",
)
# the bases have 12 rows to spare
FEW, MANY = ["<note>", "</note>"], [f"<{number}>" for number in range(20)]
PROBE = torch.tensor([[5, 6, 276, 9, 277, 7, 30, 276, 8], [277, 40, 276, 9, 277, 7, 30, 276, 8]])


def start(folder: Path, family: str, tokens: list[str], **spec: Any) -> tuple[str, Any, LoRASpec]:
    """A base as a folder, its model with rows for ``tokens`` and random adapters, and what was
    asked.
    """
    base = write_base(folder / "base", family)
    model = load_model(base, add_tokens=tokens)
    if family.startswith("phi"):
        torch.nn.init.normal_(model.get_output_embeddings().bias)
    spec = LoRASpec(rank=4, alpha=8, token_ids=tuple(pieces_of(base, tokens)), **spec)
    return base, randomise(inject(model, spec, base_name=base), std=0.1), spec


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=PROBE, use_cache=False).logits


@pytest.mark.parametrize("tokens", [FEW, MANY], ids=["spare rows", "more rows"])
# PEFT forgets the bias of such a head
@pytest.mark.parametrize("family", [name for name in SOME if name != "phi 2, biases"])
def test_plain_peft_and_the_merged_model_have_the_same_logits(
    family: str, tokens: list[str], tmp_path: Path
) -> None:
    base, model, spec = start(tmp_path, family, tokens)
    expected = logits(model)
    (tmp_path / "adapter").mkdir()
    save_adapter(model, tmp_path / "adapter")
    assert (
        difference(
            logits(attach(load_model(base, add_tokens=tokens), tmp_path / "adapter")), expected
        )
        < 1e-6
    )
    plain = AutoModelForCausalLM.from_pretrained(base)
    if tokens is MANY:
        plain.resize_token_embeddings(max(spec.token_ids) + 1, mean_resizing=False)
    assert (
        difference(logits(peft.PeftModel.from_pretrained(plain, tmp_path / "adapter")), expected)
        < 1e-5
    )
    merge_adapter(
        base,
        lambda dtype: load_model(base, dtype=dtype, add_tokens=tokens),
        tmp_path / "adapter",
        tmp_path / "merged",
        dtype=torch.float32,
        tokenizer=load_tokenizer(base, add_tokens=tokens),
        can_compare=True,
    )
    assert (
        difference(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")), expected)
        < 1e-4
    )
    assert (
        AutoTokenizer.from_pretrained(tmp_path / "merged")("a" + tokens[1])["input_ids"][-1]
        == spec.token_ids[1]
    )


def test_what_plain_peft_forgets_is_found_where_an_adapter_is_exported(tmp_path: Path) -> None:
    """PEFT's wrapper of an unembedding leaves out its bias: such an adapter is merged, or read
    by lorakit.
    """
    base, model, _ = start(tmp_path, "phi 2, biases", FEW)
    base_model = load_model(base, add_tokens=FEW)
    torch.nn.init.ones_(base_model.get_output_embeddings().bias)
    (tmp_path / "adapter").mkdir()
    save_adapter(model, tmp_path / "adapter")
    with pytest.raises(AdapterError, match="what plain PEFT makes of the export differs by"):
        reload_in_peft(base_model, tmp_path / "adapter", tmp_path / "adapter", dtype=torch.float32)


@pytest.mark.parametrize("family", SOME)
def test_gradients_are_those_of_all_logits_and_of_no_other_row(family: str, tmp_path: Path) -> None:
    """The reference writes the trained rows into whole matrices, by hand, and takes all logits."""
    _, model, spec = start(tmp_path, family, FEW)
    datums = [
        make_datum(PROBE[0].tolist(), [0, 0, 1, 1, 0.5, 1, 1, -0.25, 1]),
        make_datum(PROBE[1].tolist(), [0, 1, 1, 0, 1, 1, 0, 1, 2]),
    ]
    batch = collate([[one] for one in datums], pad_token_id=0)
    compute_loss(model.eval(), batch, cross_entropy).loss_sum.backward()
    # else the head in blocks knows of the rows
    assert _CHECKED[model.get_output_embeddings()], "all logits were held"
    ours = gradients(model)
    frozen = [
        name
        for name, parameter in model.named_parameters()
        if not parameter.requires_grad and parameter.grad is not None
    ]
    assert not frozen and sum("trainable_tokens_delta" in name for name in ours) == len(
        plan_of(model, spec).row_modules
    )

    model.zero_grad()
    for module in model.modules():
        if type(module).__name__ == "TokenRows":
            rows = module.trainable_tokens_delta["default"]
            weight = module.base_layer.weight.detach().index_copy(
                0, torch.tensor(spec.token_ids), rows
            )
            whole = copy.copy(module.base_layer)
            whole._parameters = {**module.base_layer._parameters}
            del whole._parameters["weight"]
            whole.weight = weight
            module.forward = whole.forward
    all_logits = model(input_ids=batch.input_ids, use_cache=False).logits.float()
    logprobs = all_logits.log_softmax(-1).gather(-1, batch.targets[..., None])[..., 0]
    (-(batch.weights * logprobs).sum()).backward()
    assert relative_l2(ours, gradients(model)) < 2e-5


def plan_of(model: Any, spec: LoRASpec) -> Any:
    return plan_lora(copy.deepcopy(model).unload(), spec)


@pytest.mark.parametrize("family", ["llama", "gemma, tied"])
def test_rows_begin_as_the_mean_of_their_pieces_and_nothing_else_moves(
    family: str, tmp_path: Path
) -> None:
    base = write_base(tmp_path / "base", family)
    pieces, before, after = (
        pieces_of(base, MANY),
        load_model(base),
        load_model(base, add_tokens=MANY),
    )
    assert len(pieces[276]) > 1
    for get in ("get_input_embeddings", "get_output_embeddings"):
        old, new = getattr(before, get)().weight, getattr(after, get)().weight
        assert torch.equal(old[:276], new[:276]) and len(new) == 296
        for token, parts in pieces.items():
            assert torch.allclose(new[token], old[parts].mean(dim=0), atol=1e-7)
    assert after.config.vocab_size == 296
    spec = LoRASpec(rank=4, token_ids=tuple(pieces))
    planned = plan_lora(load_skeleton(base, add_tokens=MANY), spec)
    model = inject(after, spec)
    num_matrices = 1 if "tied" in family else 2
    assert planned.num_row_params == 20 * 32 * num_matrices
    assert planned.num_params == sum(tensor.numel() for tensor in trainable(model).values())
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
        with adapters_off(model):
            assert torch.equal(logits(model), logits(load_model(base, add_tokens=MANY)))


def test_what_is_no_new_token_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as found:
        add_tokens(load_tokenizer("tiny"), ["<a>", " ", "<a>", "e", 3])
    said = str(found.value)
    assert "'<a>' is given twice" in said and "'e' is a token of this model already" in said
    assert "' ' is no text" in said and "3 is no text" in said
    with pytest.raises(ConfigError, match="does not go with rows of the unembedding"):
        LoRASpec(unembedding=True, token_ids=(3,))
    base, model, spec = start(tmp_path, "llama", FEW)
    with pytest.raises(
        ConfigError, match=r"lora\.targets: an adapter on the unembedding does not go"
    ):
        plan_lora(
            load_model(base, add_tokens=FEW),
            LoRASpec(targets=["q_proj", "lm_head"], token_ids=spec.token_ids),
        )
    (tmp_path / "adapter").mkdir()
    save_adapter(model, tmp_path / "adapter")
    other = LoRASpec(rank=4, alpha=8, init_from=str(tmp_path / "adapter"))
    with pytest.raises(
        AdapterError, match=r"trained rows of the tokens \[276, 277\], this run of none"
    ):
        open_init(other, base=base)
    assert len(FAMILIES) >= 19 and spec.token_ids == (276, 277)

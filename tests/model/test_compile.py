"""trainer.compile: the same losses and gradients, layer by layer, for rows of any length."""

from __future__ import annotations

import shutil

import pytest
from tiny_models import gradients, make_datums, make_model, randomise, relative_l2

from lorakit.data.batch.collate import collate
from lorakit.errors import ConfigError
from lorakit.lora.inject import inject
from lorakit.lora.spec import LoRASpec
from lorakit.loss.cross_entropy import cross_entropy
from lorakit.model.attention import attend_by_document
from lorakit.model.layers import compile_layers
from lorakit.model.load import load_tokenizer
from lorakit.sampling.generate import generate
from lorakit.training.step import compute_loss
from lorakit.types import SamplingParams


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_a_compiled_model_gives_the_same_losses_gradients_and_samples(family: str) -> None:
    plain, compiled = (
        randomise(inject(make_model(family), LoRASpec(rank=4)), std=0.02).train() for _ in range(2)
    )
    assert attend_by_document(compiled.get_base_model()) is None
    # Without a C++ compiler the layers are traced and differentiated all the same, and only their
    # code is not generated.
    compile_layers(compiled, backend="inductor" if shutil.which("c++") else "aot_eager")
    datums = make_datums(6)
    for rows in (
        [datums[:1], datums[1:2]],
        [datums[2:3], datums[3:4], datums[4:5]],
        [datums[4:6], datums[:1]],
    ):
        batch = collate(rows, pad_token_id=0)
        losses = []
        for model in (plain, compiled):
            model.zero_grad()
            output = compute_loss(model, batch, cross_entropy)
            output.loss_sum.backward()
            losses.append(float(output.loss_sum))
        assert losses[1] == pytest.approx(losses[0], abs=1e-4)
        assert relative_l2(gradients(compiled), gradients(plain)) < 1e-5
    tokenizer, params = load_tokenizer("tiny"), SamplingParams(max_tokens=6, temperature=0, stop=[])
    samples = [generate(model, tokenizer, [[5, 6, 7]], params) for model in (plain, compiled)]
    assert samples[0] == samples[1]


def test_a_model_without_layers_of_its_own_is_refused() -> None:
    with pytest.raises(ConfigError, match="no layers that could be compiled"):
        compile_layers(make_model("llama").lm_head)

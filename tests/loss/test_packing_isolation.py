"""Documents packed into one row neither see nor change one another, and their loss is that of a
row of their own.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import gradients, make_datums, make_model, randomise, relative_l2

from lorakit.data.batch.collate import collate
from lorakit.data.batch.packing import pack_best_fit
from lorakit.data.datum import make_datum
from lorakit.lora.inject import inject
from lorakit.lora.spec import LoRASpec
from lorakit.loss.logprobs import target_logprobs
from lorakit.model.attention import attend_by_document
from lorakit.model.load import load_model
from lorakit.types import Datum

FAMILIES = ["qwen3_moe", "qwen3", "llama", "mistral", "gemma2"]
SPEC = LoRASpec(rank=4, alpha=8)


def make(family: str, *, by_document: bool = False) -> Any:
    base = load_model("tiny") if family == "tiny" else make_model(family)
    if by_document:
        attend_by_document(base)
    return randomise(inject(base, SPEC), std=0.02)


def document_losses(model: Any, rows: list[list[Datum]]) -> dict[int, torch.Tensor]:
    """Loss sum of each Datum, by its identity."""
    batch = collate(rows, pad_token_id=0)
    terms = -target_logprobs(model, batch) * batch.weights
    datums = [datum for row in rows for datum in row]
    return {
        id(datum): terms[row, start:end].sum()
        for datum, (row, start, end) in zip(datums, batch.spans, strict=True)
    }


@pytest.mark.parametrize("by_document", [False, True])
@pytest.mark.parametrize("family", [*FAMILIES, "tiny"])
def test_packed_and_padded_rows_give_the_same_loss_per_document_and_the_same_gradient(
    family: str, by_document: bool
) -> None:
    datums = make_datums(9)
    rows = pack_best_fit(datums, 40)
    assert max(len(row) for row in rows) >= 3
    assert len(rows) >= 2
    packed_model, padded_model = make(family, by_document=by_document), make(family)
    packed = document_losses(packed_model, rows)
    padded = document_losses(padded_model, [[datum] for datum in datums])
    for datum in datums:
        scale = float(abs(datum.weights).sum())
        assert (packed[id(datum)] - padded[id(datum)]).abs().item() / scale < 1e-5
    sum(packed.values()).backward()
    sum(padded.values()).backward()
    assert relative_l2(gradients(packed_model), gradients(padded_model)) < 1e-5


def neighbour_logits(model: Any, first: list[int], restart: bool) -> torch.Tensor:
    """Logits of the second of two documents in a row, by the positions that ``collate`` gives,
    or by ones that count on.
    """
    second = [7, 9, 4, 30, 12, 9, 41, 8, 3, 15, 22]
    batch = collate(
        [[make_datum([*tokens, 5], [0.0] * len(tokens) + [1.0]) for tokens in (first, second)]],
        pad_token_id=0,
    )
    positions = batch.position_ids if restart else torch.arange(batch.input_ids.shape[1])[None]
    with torch.no_grad():
        return model(input_ids=batch.input_ids, position_ids=positions, use_cache=False).logits[
            0, len(first) :
        ]


@pytest.mark.parametrize("family", [*FAMILIES, "tiny"])
def test_a_changed_neighbour_moves_no_logit_unless_positions_count_on(family: str) -> None:
    model = make(family)
    one, other = [3, 8, 44, 16, 23, 42, 50, 6, 19], [33, 10, 11, 12, 61, 62, 4, 4, 27]
    logits = neighbour_logits(model, one, True)
    moved = (logits - neighbour_logits(model, other, True)).abs().max()
    # The trained model's logits reach 17, where float32 itself steps by 2e-6; other row counts of
    # experts move them by some of these, by how many depends on the machine's matrix products.
    assert float(moved) <= max(1e-5, 2e-6 * float(logits.abs().max()))
    control = (
        (neighbour_logits(model, one, False) - neighbour_logits(model, other, False)).abs().max()
    )
    assert float(control) > 0.1


@pytest.mark.parametrize("family", FAMILIES)
def test_a_neighbour_in_another_row_or_the_padding_behind_moves_nothing(family: str) -> None:
    model, (short, long, other) = make(family), sorted(make_datums(3), key=len)
    alone = document_losses(model, [[short]])[id(short)]
    for rows in ([[short], [long]], [[other, short], [long]], [[long, other], [short]]):
        together = document_losses(model, rows)[id(short)]
        assert (together - alone).abs().item() / float(abs(short.weights).sum()) < 1e-5


def test_documents_of_one_token_stay_apart() -> None:
    model = make("qwen3")
    ones = [make_datum([token, 9], [0.0, 1.0]) for token in (11, 12, 13)]
    packed = document_losses(model, [ones])
    for datum in ones:
        alone = document_losses(model, [[datum]])[id(datum)]
        assert (packed[id(datum)] - alone).abs().item() < 1e-5

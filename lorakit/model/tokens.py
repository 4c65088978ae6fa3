"""New tokens: into the tokenizer, and rows for them in the model's embedding and unembedding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from lorakit.errors import ConfigError, report
from lorakit.model.partition import full_shape, own_weight, whole


def add_tokens(tokenizer: Any, tokens: Sequence[str]) -> dict[int, list[int]]:
    """Add ``tokens`` to ``tokenizer`` and return, by the id of each, the tokens that its text was
    made of before.

    They are found wherever their text occurs, and are no special tokens: decoding shows them.

    Raises:
        ConfigError: one is no text, is given twice, or is a token already.
    """
    from transformers import AddedToken

    problems = [
        f"{token!r} is no text"
        for token in tokens
        if not isinstance(token, str) or not token.strip()
    ]
    problems += [
        f"{token!r} is given twice"
        for number, token in enumerate(tokens)
        if token in tokens[:number]
    ]
    vocabulary = tokenizer.get_vocab()
    problems += [
        f"{token!r} is a token of this model already" for token in tokens if token in vocabulary
    ]
    if problems:
        raise ConfigError(report("model.add_tokens:", problems))
    pieces = [tokenizer(token, add_special_tokens=False)["input_ids"] for token in tokens]
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=False) for token in tokens])
    return dict(zip(tokenizer.convert_tokens_to_ids(list(tokens)), pieces, strict=True))


@torch.no_grad()
def make_rows(model: Any, pieces: Mapping[int, Sequence[int]]) -> None:
    """Give the tokens that are the keys of ``pieces`` rows in the embedding and the unembedding of
    ``model``.

    Each begins as the mean of the rows that its text was made of before, so that the model reads
    nearly what it did, the same on every machine. Matrices grow where they have no rows to spare.
    """
    num_rows = max(pieces) + 1
    if full_shape(own_weight(model.get_input_embeddings()))[0] < num_rows:
        model.resize_token_embeddings(num_rows, mean_resizing=False)
    modules = (model.get_input_embeddings(), model.get_output_embeddings())
    found = [own_weight(module) for module in modules if module is not None]
    weights = {id(weight): weight for weight in found}
    with whole(weights.values(), changes=True):
        for weight in weights.values():
            if weight.is_meta:
                continue
            for token, parts in pieces.items():
                if parts:
                    weight[token] = weight[list(parts)].float().mean(dim=0).to(weight.dtype)

"""Whether a model can be sampled in rows: looked at once for each model."""

from __future__ import annotations

import weakref
from typing import Any

import torch

from lorakit.model.attention import cached_attention, find_difference, packed_documents
from lorakit.sampling.cache import KVCache
from lorakit.sampling.model_passes import NO_MASK

# of models that were looked at
_PROBLEMS: weakref.WeakKeyDictionary[Any, str | None] = weakref.WeakKeyDictionary()


def decoding_problem(model: Any) -> str | None:
    """Return why ``model``, which attends by document, cannot be sampled in rows, or None.

    Two prompts are computed at once, then three tokens for each, and the logits compared with those
    of whole sequences: layers that carry another state than keys and values differ. Looked at once
    for each model.
    """
    if model not in _PROBLEMS:
        try:
            _PROBLEMS[model] = _compare(model)
        except Exception as error:  # whatever a model does with one token at a time
            _PROBLEMS[model] = f"{type(error).__name__}: {error}"
    return _PROBLEMS[model]


@torch.inference_mode()
def _compare(model: Any) -> str | None:
    device, vocab_size = model.device, model.config.get_text_config().vocab_size
    drawn = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, vocab_size, (2, 23), generator=drawn).tolist()
    lengths, cache, ours = (20, 7), KVCache(), []
    cache.reserve(2, 23)
    for step in range(4):
        # of each row: the prompt, and then one token at a time
        places = [[n + step - 1] if step else list(range(n)) for n in lengths]
        ids = [[row[place] for place in own] for row, own in zip(tokens, places, strict=True)]
        spans = None
        if step:
            cache.decode([own[0] for own in places], device)
        else:  # packed
            cache.prefill([0, 1], lengths, device)
            places, ids = [places[0] + places[1]], [ids[0] + ids[1]]
            spans = [(0, 0, lengths[0]), (0, lengths[0], sum(lengths))]
        with cached_attention(cache), packed_documents(spans):
            logits = model(
                input_ids=torch.tensor(ids, device=device),
                position_ids=torch.tensor(places, device=device),
                attention_mask=None if spans else NO_MASK,
                use_cache=False,
            ).logits.float()
        ours.append(logits[:, -1] if step else logits[0, [lengths[0] - 1, sum(lengths) - 1]])
    whole = [
        model(input_ids=torch.tensor([row], device=device), use_cache=False).logits[0].float()
        for row in tokens
    ]
    theirs = [
        torch.stack([row[n - 1 + step] for row, n in zip(whole, lengths, strict=True)])
        for step in range(4)
    ]
    return find_difference(
        torch.stack(ours), torch.stack(theirs), is_exact=model.dtype == torch.float32
    )

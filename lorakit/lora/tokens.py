"""Rows of the vocabulary that are trained: PEFT holds them, this computes with them without a copy
of the whole matrix.

PEFT writes the trained rows into a copy of the embedding in each pass, (V, H), and its backward
makes a gradient of that size (`TrainableTokensLayer.get_merged_weights`). Here only the positions
that have such a token are replaced.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.trainable_tokens.layer import TrainableTokensLayer
from peft.utils.other import TrainableTokensWrapper
from torch import nn


class TokenRows(TrainableTokensLayer):
    """PEFT's layer around an embedding or an unembedding, some rows of which are trained."""

    def forward_adapters(
        self, x: torch.Tensor, active_adapters: Any, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        """PEFT's hook: the base's output, with the trained rows' instead of the frozen ones'."""
        result = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters or not active_adapters or self.merged:
            return result
        for name in active_adapters:
            rows_NH = self.trainable_tokens_delta[name]
            ids = torch.tensor(self.token_indices[name], device=x.device)
            if isinstance(self.base_layer, nn.Embedding):
                is_one, place = (x[..., None] == ids).max(dim=-1)
                scale = self._get_embed_scale()
                rows = rows_NH[place] if scale is None else rows_NH[place] * scale
                result = torch.where(is_one[..., None], rows.to(result.dtype), result)
            else:
                bias: Any = self.base_layer.bias
                bias = None if bias is None else bias[ids].to(x.dtype)
                logits = nn.functional.linear(x, rows_NH.to(x.dtype), bias)
                result = result.index_copy(-1, ids, logits.to(result.dtype))
        return result


def use_token_rows(model: Any) -> None:
    """Let every layer of ``model`` with trained rows compute as ``TokenRows``."""
    for module in model.modules():
        if type(module) is TrainableTokensLayer:
            module.__class__ = TokenRows  # PEFT makes its own, and takes no other


def token_layers(model: Any) -> list[tuple[str, TrainableTokensLayer]]:
    """The layers of ``model`` that hold trained rows of their own, by their modules' names;
    those that share them left out.
    """
    return [
        (name, module.token_adapter)
        for name, module in model.named_modules()
        if isinstance(module, TrainableTokensWrapper) and module.token_adapter.tied_adapter is None
    ]

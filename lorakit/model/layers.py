"""What is switched on layer by layer: activation checkpointing and compilation."""

from __future__ import annotations

from typing import Any

from transformers.modeling_layers import GradientCheckpointingLayer

from lorakit.errors import ConfigError


def enable_checkpointing(model: Any) -> None:
    """Activation checkpointing of a model with adapters, by whichever name this version of
    transformers has for it.

    transformers and PEFT then ask for gradients of the embeddings, which only re-entrant
    checkpointing needs, and with which every layer below the first adapter would make a graph: that
    is taken back.
    """
    base = model.get_base_model()
    enable = (
        getattr(base, "activation_checkpointing_enable", None) or base.gradient_checkpointing_enable
    )
    enable({"use_reentrant": False})
    base.disable_input_require_grads()


def compile_layers(model: Any, *, backend: str = "inductor") -> None:
    """Compile each layer of the model by itself: in seconds rather than minutes, for rows of any
    length.

    Raises:
        ConfigError: the model has no layers that transformers marks as such.
    """
    layers = [
        module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)
    ]
    if not layers:
        raise ConfigError(
            "trainer.compile=true: this model has no layers that could be compiled one by one; set"
            " it to false"
        )
    for layer in layers:
        layer.compile(dynamic=True, backend=backend)

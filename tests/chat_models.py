"""The sizes of models that `experiment=chat_sft` is for, without weights, and its config."""

from __future__ import annotations

from typing import Any

import transformers
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf
from program import REPOSITORY

from lorakit.config.schema import RunConfig
from lorakit.model.load import skeleton_of
from lorakit.planner.presets import preset_config


def shapes(name: str) -> Any:
    """The model of a name without weights: published sizes of Qwen3's configs, or one that
    lorakit brings.
    """
    if (config := preset_config(name)) is not None:
        return skeleton_of(config)
    hidden, inner, layers, heads, tied = {
        "0.6B": (1024, 3072, 28, 16, True),
        "1.7B": (2048, 6144, 28, 16, True),
        "4B": (2560, 9728, 36, 32, True),
        "8B": (4096, 12288, 36, 32, False),
        "14B": (5120, 17408, 40, 40, False),
        "32B": (5120, 25600, 64, 64, False),
        "small": (256, 512, 4, 4, True),
    }[name]
    config = transformers.Qwen3Config(
        vocab_size=151_936,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=min(8, heads),
        head_dim=128,
        tie_word_embeddings=tied,
        max_position_embeddings=40_960,
    )
    return skeleton_of(config)


def config_of(*overrides: str) -> RunConfig:
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(REPOSITORY / "conf"), version_base="1.3"):
        found = compose(
            "train", ["experiment=chat_sft", "model.path=x", "data.path=y", "run=z", *overrides]
        )
    OmegaConf.update(found, "paths.run", "z")
    plain: Any = OmegaConf.to_container(found, resolve=True)
    return RunConfig.from_dict(plain)

"""Models of the families that people fine-tune, tiny and random, as folders in the hub's layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM

from lorakit.model.load import load_tokenizer

SIZES = {
    "vocab_size": 288,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}
LLAMA = {
    **SIZES,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GEMMA = {**LLAMA, "head_dim": 8}
LINEAR = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
}
EXPERTS = {"moe_intermediate_size": 24, "num_experts_per_tok": 2}
# class of the config, its settings, and a leaf that must be among the targets
FAMILIES: dict[str, tuple[str, dict[str, Any], str]] = {
    "llama": ("LlamaConfig", {**LLAMA, "tie_word_embeddings": False}, "q_proj"),
    "llama, tied": ("LlamaConfig", {**LLAMA, "tie_word_embeddings": True}, "down_proj"),
    "gemma, tied": ("GemmaConfig", GEMMA, "q_proj"),
    "gemma 2, soft-capping": (
        "Gemma2Config",
        {**GEMMA, "query_pre_attn_scalar": 8, "sliding_window": 6},
        "up_proj",
    ),
    "gemma 3": (
        "Gemma3TextConfig",
        {**GEMMA, "query_pre_attn_scalar": 8, "sliding_window": 6},
        "q_proj",
    ),
    "mistral": ("MistralConfig", {**LLAMA, "sliding_window": 6}, "v_proj"),
    "phi 2, biases": ("PhiConfig", {**SIZES, "intermediate_size": 48, "pad_token_id": 0}, "fc1"),
    "phi 3, fused": ("Phi3Config", {**LLAMA, "pad_token_id": 0}, "qkv_proj"),
    "qwen 2, biases": ("Qwen2Config", LLAMA, "k_proj"),
    "olmo 2": ("Olmo2Config", LLAMA, "o_proj"),
    "granite, multipliers": (
        "GraniteConfig",
        {**LLAMA, "logits_scaling": 4.0, "embedding_multiplier": 3.0, "residual_multiplier": 0.5},
        "gate_proj",
    ),
    "gpt-2, Conv1D": (
        "GPT2Config",
        {"vocab_size": 288, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128},
        "c_attn",
    ),
    "gpt-neox": (
        "GPTNeoXConfig",
        {**SIZES, "intermediate_size": 48, "pad_token_id": 0},
        "query_key_value",
    ),
    "mixtral": (
        "MixtralConfig",
        {**LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2},
        "gate_up_proj",
    ),
    "gpt-oss": (
        "GptOssConfig",
        {
            **LLAMA,
            "head_dim": 8,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "sliding_window": 8,
        },
        "down_proj",
    ),
    "qwen 3 moe": (
        "Qwen3MoeConfig",
        {**LLAMA, **EXPERTS, "head_dim": 8, "num_experts": 4},
        "gate_up_proj",
    ),
    "qwen 3.5 moe": (
        "Qwen3_5MoeTextConfig",
        {**GEMMA, **EXPERTS, **LINEAR, "num_experts": 4, "shared_expert_intermediate_size": 24},
        "gate_up_proj",
    ),
    "olmoe": ("OlmoeConfig", {**LLAMA, "num_experts": 4, "num_experts_per_tok": 2}, "gate_up_proj"),
    "deepseek v3": (
        "DeepseekV3Config",
        {
            **LLAMA,
            **EXPERTS,
            "num_key_value_heads": 4,
            "n_routed_experts": 4,
            "n_group": 2,
            "topk_group": 1,
            "first_k_dense_replace": 1,
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 8,
        },
        "kv_b_proj",
    ),
}
TOKENS = torch.randint(3, 288, (2, 17), generator=torch.Generator().manual_seed(2))


def write_base(folder: Path, family: str) -> str:
    """A random model of the family as a folder, with the tokenizer of the bundled one."""
    name, settings, _ = FAMILIES[family]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(getattr(transformers, name)(**settings))
        for parameter in model.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    load_tokenizer("tiny").save_pretrained(folder)
    return str(folder)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=TOKENS, use_cache=False).logits


def difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).abs().max() / theirs.abs().max())

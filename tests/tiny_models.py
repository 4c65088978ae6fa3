"""Tiny random models, batches and adapters for the tests. Nothing here calls lorakit's model or
LoRA code.

Hidden width, expert width and twice that are all different, so that a transposed matrix cannot pass
unseen.
"""

from __future__ import annotations

import copy
import functools
import re
from collections.abc import Iterator, Sequence
from typing import Any

import lightning as L
import peft
import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode

from lorakit.data.batch.collate import collate
from lorakit.data.datum import make_datum
from lorakit.types import Batch, Cursor, Datum

# two threads on shared cores make tiny models 20 times slower, and results repeat with one
torch.set_num_threads(1)

VOCAB = 64
_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_EXPERTS = {
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 24,
    "num_experts": 4,
    "num_experts_per_tok": 2,
}
_LINEAR_ATTENTION = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
}
_CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3_moe": (
        "Qwen3MoeConfig",
        {
            "intermediate_size": 48,
            "moe_intermediate_size": 24,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "tie_word_embeddings": False,
        },
    ),
    "qwen3": ("Qwen3Config", {"intermediate_size": 48, "tie_word_embeddings": True}),
    "llama": ("LlamaConfig", {"intermediate_size": 48, "tie_word_embeddings": False}),
    "mistral": ("MistralConfig", {"intermediate_size": 48, "sliding_window": 6}),
    "gemma2": (
        "Gemma2Config",
        {"intermediate_size": 48, "sliding_window": 6, "query_pre_attn_scalar": 8},
    ),
    "qwen3_next": ("Qwen3NextConfig", {"intermediate_size": 48, **_EXPERTS, **_LINEAR_ATTENTION}),
    "qwen3_5_moe": ("Qwen3_5MoeTextConfig", {**_EXPERTS, **_LINEAR_ATTENTION}),
    "qwen3_vl_moe": (
        "Qwen3VLMoeConfig",
        {
            "text_config": {
                **_COMMON,
                **_EXPERTS,
                "intermediate_size": 48,
                "rope_scaling": {"rope_type": "default", "mrope_section": [2, 1, 1]},
            },
            "vision_config": {
                "depth": 1,
                "hidden_size": 16,
                "num_heads": 2,
                "intermediate_size": 16,
                "out_hidden_size": 32,
                "deepstack_visual_indexes": [],
                "patch_size": 4,
            },
            "tie_word_embeddings": False,
        },
    ),
}


def tiny_config(family: str, **changes: Any) -> Any:
    """The transformers config of a family's tiny model."""
    name, settings = _CONFIGS[family]
    common = {} if "text_config" in settings else _COMMON
    return getattr(transformers, name)(**{**common, **settings, **changes})


@functools.cache
def _built(family: str, dtype: str) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        auto = (
            transformers.AutoModelForImageTextToText
            if "_vl_" in family
            else transformers.AutoModelForCausalLM
        )
        model = auto.from_config(tiny_config(family))
        for parameter in model.parameters():
            if parameter.ndim > 1:  # large enough that attention and experts decide the logits
                torch.nn.init.normal_(parameter, std=0.2)
    return model.to(getattr(torch, dtype)).requires_grad_(False).eval()


def make_model(family: str = "qwen3_moe", dtype: str = "float32") -> Any:
    """A fresh copy of the family's tiny model, frozen, in evaluation mode."""
    return copy.deepcopy(_built(family, dtype))


def plain_peft_config(family: str, **changes: Any) -> peft.LoraConfig:
    """What plain PEFT is told to adapt attention, dense MLPs and experts of a family, as lorakit
    does without being told.
    """
    modules, parameters = ["q_proj", "k_proj", "v_proj", "o_proj"], None
    if family.endswith("moe"):
        parameters = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    if family == "qwen3_5_moe":
        modules += [f"in_proj_{name}" for name in ("qkv", "z", "b", "a")] + ["out_proj"]
    # which has experts that every token meets
    if not family.endswith("moe") or family == "qwen3_5_moe":
        modules += ["gate_proj", "up_proj", "down_proj"]
    settings = {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": modules,
        "target_parameters": parameters,
        **changes,
    }
    return peft.LoraConfig(task_type="CAUSAL_LM", **settings)


def as_peft_has_it(name: str, tensor: torch.Tensor) -> tuple[str, torch.Tensor]:
    """A trainable tensor's name and values as plain PEFT has them: experts' factors flat, where
    both stacks are adapted.

    Written from PEFT's source (`ParamWrapper.get_delta_weight`), not by lorakit's code.
    """
    match = re.fullmatch(r"(.*\.)lora_([AB])\.(\w+)\.(gate_up_proj|down_proj)", name)
    if match is None:
        return name, tensor
    prefix, which, adapter, matrix = match.groups()
    flat = torch.cat(list(tensor)) if which == "A" else torch.stack(list(tensor), dim=-1).flatten(1)
    return (
        f"{prefix}{'base_layer.' if matrix == 'gate_up_proj' else ''}lora_{which}.{adapter}.weight",
        flat,
    )


@torch.no_grad()
def randomise(model: Any, seed: int = 0, std: float = 0.05) -> Any:
    """Give every trainable tensor random values (B starts at zero, which hides A's gradient), and
    return the model.

    The same adapter gets the same values, whether PEFT's layers hold it or lorakit's.
    """
    generator = torch.Generator().manual_seed(seed)
    named = [
        (*as_peft_has_it(name, p), p) for name, p in model.named_parameters() if p.requires_grad
    ]
    for name, flat, parameter in sorted(named, key=lambda entry: entry[0]):
        values = torch.randn(flat.shape, generator=generator) * std
        if flat.shape != parameter.shape and "lora_A" in name:
            values = values.unflatten(0, (len(parameter), -1))
        elif flat.shape != parameter.shape:
            values = values.unflatten(1, (-1, len(parameter))).permute(2, 0, 1)
        parameter.copy_(values)
    return model


def trainable(model: Any) -> dict[str, torch.Tensor]:
    """Copies of the trainable tensors, as PEFT has them."""
    return dict(
        as_peft_has_it(name, p.detach().clone())
        for name, p in model.named_parameters()
        if p.requires_grad
    )


def gradients(model: Any) -> dict[str, torch.Tensor]:
    """Copies of the gradients, by the names and in the shapes of the tensors as PEFT has them."""
    return dict(
        as_peft_has_it(name, p.grad.clone())
        for name, p in model.named_parameters()
        if p.grad is not None
    )


def relative_l2(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    """L2 distance over all tensors together, relative to the length of ``theirs``."""
    assert ours.keys() == theirs.keys() and ours
    distance = sum(
        float((ours[name].double() - theirs[name].double()).square().sum()) for name in ours
    )
    return (
        distance / sum(float(tensor.double().square().sum()) for tensor in theirs.values())
    ) ** 0.5


def make_datums(count: int = 8, seed: int = 0, vocab: int = VOCAB) -> list[Datum]:
    """Datums of very different lengths, with prompt positions, fractional and negative weights."""
    generator = torch.Generator().manual_seed(seed)
    datums = []
    for number in range(count):
        length = 4 + (number * 5) % 19
        tokens = torch.randint(3, vocab, (length,), generator=generator).tolist()
        weights = torch.tensor([0.0, 1.0, 0.5, -0.25, 2.0])[
            torch.randint(0, 5, (length,), generator=generator)
        ]
        weights[: 1 + number % 3], weights[-1] = 0.0, 1.0
        datums.append(make_datum(tokens, weights.tolist()))
    return datums


def make_batches(
    datums: Sequence[Datum],
    rows_each: int,
    accumulate: int,
    *,
    images: Any = None,
    packs: bool = False,
) -> list[Batch]:
    """Batches of ``rows_each`` rows, or of all of them in one, whose accumulation windows know
    their weight, computed by hand.
    """
    groups = [datums[start : start + rows_each] for start in range(0, len(datums), rows_each)]
    batches = []
    for start in range(0, len(groups), accumulate):
        window = groups[start : start + accumulate]
        weight = float(sum(abs(datum.weights).sum() for group in window for datum in group))
        for number, group in enumerate(window, start=start + 1):
            batch = collate(
                [list(group)] if packs else [[datum] for datum in group],
                pad_token_id=0,
                images=images,
            )
            batches.append(
                Batch(**{**vars(batch), "window_weight": weight, "cursor": Cursor(0, 0, number)})
            )
    return batches


class FakeTokenizer:
    """Rows of tokens need no tokenizer but its special tokens."""

    pad_token_id, eos_token_id, bos_token_id, chat_template, all_special_ids = (
        0,
        2,
        None,
        None,
        (0, 1, 2),
    )

    def __len__(self) -> int:
        return 64

    def __call__(self, text: str, **options: Any) -> dict[str, list[int]]:
        return {"input_ids": [3 + ord(char) % 61 for char in text]}

    def decode(self, tokens: list[int], **options: Any) -> str:
        return " ".join(map(str, tokens))


class Loader:
    """A loader without a length, as lorakit's stream is one."""

    def __init__(self, batches: Sequence[Batch]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Batch]:
        return iter(self.batches)


def make_trainer(folder: Any, **options: Any) -> L.Trainer:
    """A silent Trainer of one epoch on the CPU."""
    defaults: dict[str, Any] = {
        "default_root_dir": folder,
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "limit_val_batches": 0,
        "use_distributed_sampler": False,
    }
    return L.Trainer(**{**defaults, **options})


def sgd(lr: float = 0.1, **options: Any) -> Any:
    """A maker of SGD, whose step shows the gradient itself."""
    return functools.partial(torch.optim.SGD, lr=lr, **options)


def adamw(lr: float = 1e-2) -> Any:
    """A maker of AdamW."""
    return functools.partial(torch.optim.AdamW, lr=lr)


class LargestTensor(TorchDispatchMode):
    """Remembers the largest tensor that any operation made, views aside."""

    def __init__(self) -> None:
        super().__init__()
        self.num_elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        known = {a.untyped_storage().data_ptr() for a in args if isinstance(a, torch.Tensor)}
        for tensor in result if isinstance(result, (list, tuple)) else [result]:
            if (
                isinstance(tensor, torch.Tensor)
                and tensor.untyped_storage().data_ptr() not in known
            ):
                self.num_elements = max(
                    self.num_elements, tensor.untyped_storage().nbytes() // tensor.element_size()
                )
        return result

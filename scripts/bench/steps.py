"""Whole training steps: lorakit's, and TRL's SFTTrainer with PEFT, on the same model, rows and
adapter.
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable
from typing import Any

import gpu
import peft
import torch
import transformers

_COMMON: dict[str, Any] = {
    "vocab_size": 32_000,
    "tie_word_embeddings": True,
    "max_position_embeddings": 2048,
}
_CONFIGS: dict[str, Callable[[], Any]] = {
    "moe": lambda: transformers.Qwen3MoeConfig(
        hidden_size=384,
        moe_intermediate_size=256,
        intermediate_size=1024,
        num_hidden_layers=8,
        num_experts=32,
        num_experts_per_tok=4,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=64,
        norm_topk_prob=True,
        **_COMMON,
    ),
    "dense": lambda: transformers.Qwen3Config(
        hidden_size=768,
        intermediate_size=2304,
        num_hidden_layers=10,
        num_attention_heads=12,
        num_key_value_heads=4,
        head_dim=64,
        **_COMMON,
    ),
}


def make_model(name: str, dtype: torch.dtype) -> Any:
    """The model with random weights, always the same."""
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(_CONFIGS[name]()).to(dtype)


def make_rows(rows: int, length: int, share: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and which of them are trained (the last ``share`` of each row), both (rows,
    length).
    """
    tokens = torch.randint(3, 32_000, (rows, length), generator=torch.Generator().manual_seed(1))
    trained = torch.arange(length).expand(rows, -1) >= length - round(share * length)
    return tokens, trained


def build_lorakit(
    model: Any,
    data: tuple[torch.Tensor, torch.Tensor],
    rank: int,
    document: int | None = None,
    *,
    by_document: bool = True,
) -> Callable[[], float]:
    """lorakit: its injection, its loss, its clipping. Rows may be packed, of documents of
    ``document`` tokens.
    """
    from lorakit.data.batch.collate import collate
    from lorakit.data.datum import make_datum
    from lorakit.lora.inject import inject
    from lorakit.lora.spec import LoRASpec
    from lorakit.model.attention import attend_by_document

    wrapped = _same_start(
        inject(
            model.requires_grad_(False), LoRASpec(rank=rank, alpha=rank, experts="auto", mlp="auto")
        )
    )
    wrapped.train()
    if by_document and (problem := attend_by_document(wrapped.get_base_model())):
        raise RuntimeError(problem)
    size = document or data[0].shape[1]
    rows = [
        [
            make_datum(t.tolist(), w.float().tolist())
            for t, w in zip(tokens.split(size), trained.split(size), strict=True)
        ]
        for tokens, trained in zip(*data, strict=True)
    ]
    batch = collate(rows, 0)
    return gpu.build_step(wrapped, batch)


def build_trl(
    model: Any, data: tuple[torch.Tensor, torch.Tensor], rank: int
) -> Callable[[], float]:
    """TRL's SFTTrainer: its collator, its ``training_step``, its optimiser."""
    import datasets
    import trl

    is_moe = hasattr(model.config, "num_experts")
    modules = ["q_proj", "k_proj", "v_proj", "o_proj"] + (
        [] if is_moe else ["gate_proj", "up_proj", "down_proj"]
    )
    parameters = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"] if is_moe else None
    config = peft.LoraConfig(
        r=rank,
        lora_alpha=rank,
        target_modules=modules,
        target_parameters=parameters,
        task_type="CAUSAL_LM",
    )
    tokens, trained = data
    rows = {"input_ids": tokens.tolist(), "labels": torch.where(trained, tokens, -100).tolist()}
    arguments = trl.SFTConfig(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=len(tokens),
        use_cpu=True,
        bf16=False,
        max_length=None,
        learning_rate=gpu.LR,
        lr_scheduler_type="constant",
        report_to="none",
        gradient_checkpointing=False,
        router_aux_loss_coef=0.0,
        dataset_kwargs={"skip_prepare_dataset": True},
        remove_unused_columns=False,
        completion_only_loss=True,
        max_grad_norm=1.0,
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(_any_tokenizer())
    trainer = trl.SFTTrainer(
        model=model,
        args=arguments,
        train_dataset=datasets.Dataset.from_dict(rows),
        peft_config=config,
        processing_class=tokenizer,
    )
    wrapped = _same_start(trainer.model)
    trainer.create_optimizer()
    batch = trainer.data_collator([{key: rows[key][i] for key in rows} for i in range(len(tokens))])
    count = (batch["labels"][:, 1:] != -100).sum()

    def run() -> float:
        loss = trainer.training_step(wrapped, dict(batch), count)
        torch.nn.utils.clip_grad_norm_([p for p in wrapped.parameters() if p.requires_grad], 1.0)
        trainer.optimizer.step()
        trainer.optimizer.zero_grad()
        return float(loss)

    return run


def build_frozen(
    model: Any, data: tuple[torch.Tensor, torch.Tensor], rank: int
) -> Callable[[], float]:
    """The base without an adapter: forward, transformers' own loss, and back to what the embeddings
    give.

    Nothing is trained, and all positions have logits, whatever share of them counts.
    """
    model.requires_grad_(False).train()
    tokens, trained = data
    embeddings = model.get_input_embeddings()(tokens).detach().requires_grad_()
    labels = torch.where(trained, tokens, -100)

    def run() -> float:
        loss = model(inputs_embeds=embeddings, labels=labels, use_cache=False).loss
        loss.backward()
        embeddings.grad = None
        return float(loss.detach())

    return run


def _any_tokenizer() -> str:
    from lorakit.model.load import BUNDLED

    return str(BUNDLED["tiny"])


def _same_start(wrapped: Any) -> Any:
    """Give A a constant pattern and leave B at zero, so that every contender starts and goes on
    alike.
    """
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_A" in name and parameter.requires_grad:
                parameter.copy_(
                    torch.linspace(-0.05, 0.05, parameter.shape[-1]).expand_as(parameter)
                )
    return wrapped


BUILDERS = {
    "lorakit": build_lorakit,
    "mask": functools.partial(build_lorakit, by_document=False),
    "trl": build_trl,
    "frozen": build_frozen,
}

"""What other trainers call lorakit's keys: for users who type these, and for the settings page."""

from __future__ import annotations

# Of axolotl, LLaMA-Factory, TRL, transformers and PEFT.
ALIASES = {
    "model.path": (
        "base_model",
        "model",
        "model_name_or_path",
        "model_name",
        "pretrained_model_name_or_path",
    ),
    "data.path": ("datasets", "dataset", "dataset_name", "train_file", "dataset_dir"),
    "data.max_tokens": (
        "sequence_len",
        "max_seq_length",
        "max_seq_len",
        "max_length",
        "cutoff_len",
        "model_max_length",
    ),
    "data.train_on": (
        "train_on_inputs",
        "roles_to_train",
        "completion_only_loss",
        "assistant_only_loss",
        "mask_history",
    ),
    "data.packing": ("sample_packing", "packing"),
    "data.val_fraction": ("val_set_size", "val_size", "test_size"),
    "data.chat_template": ("chat_template", "template", "chat_template_path"),
    "data.epochs": ("num_epochs", "num_train_epochs", "epochs"),
    "data.batch_size": ("micro_batch_size", "per_device_train_batch_size", "batch_size"),
    "data.val_batch_size": ("eval_batch_size", "per_device_eval_batch_size"),
    "trainer.accumulate_grad_batches": ("gradient_accumulation_steps",),
    "trainer.max_steps": ("max_steps", "iters"),
    "trainer.activation_checkpointing": ("gradient_checkpointing", "use_gradient_checkpointing"),
    "trainer.precision": ("bf16", "fp16", "tf32", "mixed_precision"),
    "trainer.eval_every_steps": ("eval_steps", "evals_per_epoch", "eval_strategy"),
    "trainer.compile": ("torch_compile",),
    "optim.lr": ("learning_rate", "lr"),
    "optim.weight_decay": ("weight_decay",),
    "optim.clip_norm": ("max_grad_norm", "gradient_clip_val"),
    "schedule.warmup_steps": ("warmup_steps", "warmup_ratio"),
    "schedule": ("lr_scheduler", "lr_scheduler_type"),
    "optim": ("optimizer",),
    "lora.rank": ("lora_r", "lora_rank", "r"),
    "lora.alpha": ("lora_alpha",),
    "lora.dropout": ("lora_dropout",),
    "lora.targets": (
        "lora_target_modules",
        "lora_target",
        "target_modules",
        "target_parameters",
        "lora_target_linear",
    ),
    "lora.dora": ("peft_use_dora", "use_dora"),
    "lora.rslora": ("peft_use_rslora", "use_rslora"),
    "model.attention": ("attn_implementation", "flash_attention", "flash_attn", "sdp_attention"),
    "model.dtype": ("torch_dtype", "dtype"),
    "model.add_tokens": ("tokens", "special_tokens", "added_tokens"),
    "checkpoint.every_steps": ("save_steps", "saves_per_epoch", "save_strategy"),
    "checkpoint.keep_last": ("save_total_limit",),
    "paths.runs": ("output_dir",),
    "run": ("run_name",),
    "resume": ("resume_from_checkpoint", "auto_resume_from_checkpoints"),
    "strategy": ("deepspeed", "fsdp"),
    "logger": ("report_to", "use_wandb"),
    "logger.wandb.project": ("wandb_project",),
    "logger.wandb.entity": ("wandb_entity",),
    "logger.wandb.name": ("wandb_name",),
}
_NO_QLORA = (
    "lorakit trains on bases of 16 or 32 bits; QLoRA's bases of 8 or 4 bits are not among them"
)
_QLORA = (
    "load_in_4bit",
    "load_in_8bit",
    "quantization_bit",
    "quantization",
    "bnb_4bit_quant_type",
    "qlora",
)
ABSENT = dict.fromkeys(_QLORA, _NO_QLORA)
_GROUPS = {key.partition(".")[0] for key in ALIASES} - {"logger"}
_OURS = {name: key for key, names in ALIASES.items() for name in names}


def explain_other_name(key: str) -> str | None:
    """Say what the ``key`` of another trainer is here; None where it is nobody's."""
    group, _, name = key.replace("-", "_").lower().rpartition(".")
    if name in ABSENT:
        return f": {ABSENT[name]}"
    is_ours = _OURS.get(name) == key or (group and group not in _GROUPS)
    return f"; it is {_OURS[name]} here" if name in _OURS and not is_ours else None

"""The model card of an export: its base, its data, its settings, its figures."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import yaml

from lorakit.data.read.sources import BUNDLED
from lorakit.runs.folder import History, Run

_GROUPS = ("lora", "loss", "optim", "schedule", "trainer", "seed")
_OF_DATA = (
    "train_on",
    "max_tokens",
    "on_long",
    "packing",
    "tokens_per_batch",
    "batch_size",
    "epochs",
    "stop",
    "append_eos",
)
_OF_NEW_TOKENS = (
    "It has rows for new tokens: load the tokenizer from here, and where the base has fewer rows"
    " than it, call `model.resize_token_embeddings(len(tokenizer))` on the base first."
)
_METRICS = {
    "train/loss": "training loss, last step",
    "val/loss": "loss of the rows held out",
    "retain/loss": "loss of unrelated text",
    "retain/base_loss": "the same of the base",
}


def model_card(
    run: Run,
    *,
    base: str,
    form: str,
    takes_images: bool,
    step: int | None = None,
    max_rank: int = 0,
) -> str:
    """Return the card's text, as the hub reads it.

    Args:
        base: what others call the base: its name on the hub, or of its folder; never a path of this
            machine.
        form: ``peft``, ``vllm`` or ``merged``.
        step: of the run, at which the adapter was as it is; None is its end.
        max_rank: what vLLM must be given.
    """
    from huggingface_hub import ModelCardData

    config = yaml.safe_load(run.config_text())
    is_merged = form == "merged"
    names = [str(source["path"]) for source in _sources(config)]
    on_hub = [name for name in names if _is_of_hub(name)]
    data = ModelCardData(
        base_model=base if "/" in base else None,
        base_model_relation="finetune" if is_merged else "adapter",
        library_name="transformers" if is_merged else "peft",
        pipeline_tag="image-text-to-text" if takes_images else "text-generation",
        datasets=on_hub or None,
        tags=["lora", "lorakit", *(["vllm"] if form == "vllm" else [])],
    )
    use = _use(form, base, takes_images, max_rank)
    body = "\n".join(_body(run, config, base, form, names, step, use))
    return f"---\n{data.to_yaml()}\n---\n\n{body}\n"


def _body(
    run: Run,
    config: dict[str, Any],
    base: str,
    form: str,
    names: list[str],
    step: int | None,
    use: list[str],
) -> list[str]:
    revision = config["model"].get("revision")
    what = "The merged weights of" if form == "merged" else "A LoRA adapter for"
    at = f" (revision `{revision}`)" if revision else ""
    packages = run.info.get("packages", {})
    rows = [f"| {label} | {value:.4f} |" for label, value in _metrics(run, step).items()]
    return [
        f"# {run.name}",
        "",
        f"{what} `{base}`{at}, trained with lorakit {packages.get('lorakit', '')}.",
        "",
        *use,
        "",
        *([_OF_NEW_TOKENS, ""] if config["model"].get("add_tokens") and form != "merged" else []),
        "## Data",
        "",
        (
            f"- rows: {', '.join(f'`{_as_others_see(name)}`' for name in names)}"
            f" ({', '.join(run.info.get('formats') or ['?'])})"
        ),
        (
            "- fingerprint of rows, order and of what is trained:"
            f" `{run.info.get('data_fingerprint', '?')}`"
        ),
        "",
        "## Figures",
        "",
        f"{step or run.info.get('step') or 0} optimiser steps.",
        "",
        *(["| figure | value |", "| --- | ---: |", *rows, ""] if rows else []),
        "## Settings",
        "",
        "```yaml",
        yaml.safe_dump(_settings(config, run), sort_keys=False, allow_unicode=True).rstrip(),
        "```",
        "",
        "Versions: " + ", ".join(f"{name} {version}" for name, version in packages.items()),
    ]


def _use(form: str, base: str, takes_images: bool, max_rank: int) -> list[str]:
    base = base if "/" in base else "FOLDER_OF_THE_BASE"
    if form == "merged":
        return [
            "```python",
            "from transformers import pipeline",
            "",
            'generate = pipeline(model="THIS")',
            "```",
        ]
    if form == "vllm":
        return [
            "```",
            f"vllm serve {base} --enable-lora --max-lora-rank {max_rank} --lora-modules NAME=THIS",
            "```",
        ]
    auto = "AutoModelForImageTextToText" if takes_images else "AutoModelForCausalLM"
    return [
        "```python",
        "from peft import PeftModel",
        f"from transformers import {auto}",
        "",
        f'model = PeftModel.from_pretrained({auto}.from_pretrained("{base}"), "THIS")',
        "```",
    ]


def _metrics(run: Run, step: int | None) -> dict[str, float]:
    """The last figures up to ``step``."""
    last: dict[str, Any] = {}
    for record in History(run.folder).read():
        if step is None or record.get("step", 0) <= step:
            last |= record
    return {
        label: last[name]
        for name, label in _METRICS.items()
        if isinstance(last.get(name), int | float)
    }


def _settings(config: dict[str, Any], run: Run) -> dict[str, Any]:
    """What decides the result, without settings of the machine; paths by their last part."""
    kept = copy.deepcopy({name: config[name] for name in _GROUPS if name in config})
    kept["data"] = {
        name: config["data"][name] for name in _OF_DATA if config["data"].get(name) is not None
    }
    if (added := config["model"].get("add_tokens")) is not None:
        kept["model"] = {"add_tokens": added}
    for name, value in run.info.get("resolved", {}).items():
        group, key = name.split(".", 1)
        if isinstance(kept.get(group), dict) and key in kept[group]:
            kept[group][key] = value
    if isinstance(start := kept.get("lora", {}).get("init_from"), str):
        kept["lora"]["init_from"] = _as_others_see(start)
    return kept


def _sources(config: dict[str, Any]) -> list[dict[str, Any]]:
    data = config["data"]
    sources = data.get("sources") or [data.get("path")]
    return [source if isinstance(source, dict) else {"path": source} for source in sources]


def _is_of_hub(name: str) -> bool:
    is_here = Path(name).exists() or (BUNDLED / name.split("/")[0]).exists()
    return name.count("/") == 1 and not is_here and not name.startswith(("/", ".", "~"))


def _as_others_see(path: str) -> str:
    """A path of this machine by its last part."""
    return Path(path).name if path.startswith(("/", "~", ".")) else path

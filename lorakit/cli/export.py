"""``lorakit export [RUN] format=peft|merged|vllm``: what was trained, as other programs read it,
with a model card.
"""

from __future__ import annotations

import argparse
import functools
from pathlib import Path
from typing import Any

from lorakit.cli.guard import run_command
from lorakit.cli.run_arguments import add_run_arguments, open_trained, output_path, parse
from lorakit.errors import CheckpointError, ConfigError
from lorakit.pipeline.trained import Trained
from lorakit.quoting import quote_for_shell

FORMATS = {
    "peft": "PEFT's own layout, in bf16: read again by plain PEFT",
    "merged": "base and adapter as one model for transformers and other readers of its files",
    "vllm": "the adapter as vLLM names its matrices, in bf16",
}


def main(arguments: list[str]) -> None:
    """Export as ``arguments`` say."""
    parser = argparse.ArgumentParser(
        prog="lorakit export", description="Write what a run trained as other programs read it."
    )
    add_run_arguments(parser)
    formats = "; ".join(f"{name}: {text}" for name, text in FORMATS.items())
    parser.add_argument("--format", choices=[*FORMATS], default="peft", help=formats)
    parser.add_argument(
        "--out",
        type=output_path,
        help="folder to write (default: the format's name, in the run's folder)",
    )
    parser.add_argument(
        "--push", metavar="USER/NAME", help="upload it to the hub under this name, too"
    )
    parser.add_argument(
        "--public",
        action="store_true",
        help="anybody may see it there; default: only you",
    )
    parser.add_argument(
        "--base-name",
        help="what others call the base, where you have it as a folder: its name on the hub",
    )
    parser.add_argument(
        "--dtype",
        help="of merged weights: float32, bfloat16 or float16 (default: as the base's files)",
    )
    options = parse(parser, arguments)
    if options.dtype and options.format != "merged":
        raise ConfigError("--dtype is for format=merged; adapters are written in bf16")
    if options.public and not options.push:
        raise ConfigError("--public has no effect without push=USER/NAME")
    trained = open_trained(options)
    out = options.out or trained.run.folder / options.format
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CheckpointError(f"{out} exists and is not empty; choose another --out")
    name = name_for_others(trained, options.base_name)
    if options.push:
        from lorakit.hub import open_repository

        if options.format != "merged" and name.startswith("/"):
            raise ConfigError(
                f"the base is the folder {name}, which others do not have: --base-name says what"
                " they call it"
            )
        # what it refuses, it refuses before the work
        open_repository(options.push, is_public=options.public)
    if options.format == "merged":
        from lorakit.cli.merge import merge

        as_others_see = Path(name).name if name.startswith("/") else name
        finish = functools.partial(write_card, trained, "merged", name)
        merge(trained, out, options.dtype, base_name=as_others_see, finish=finish)
    else:
        write_adapter(trained, out, options.format, name)
    if options.push:
        from lorakit.hub import upload

        print(f"uploading {out} to {options.push} …", flush=True)
        print(
            "uploaded:"
            f" {upload(out, options.push, message=f'{trained.run.name}, as {options.format}')}"
        )


def name_for_others(trained: Trained, given: str | None) -> str:
    """What the base is called: as ``given``, else its name on the hub, the bundled one's, or its
    folder.
    """
    from lorakit.model.load import base_name

    return given or base_name(trained.model.path)


def write_adapter(trained: Trained, out: Path, form: str, name: str) -> None:
    """Write the adapter to ``out`` in PEFT's or vLLM's layout, once it has been checked. Raises
    AdapterError.
    """
    import torch

    from lorakit.runs.files import whole_folder
    from lorakit.weights.adapter import AdapterFiles
    from lorakit.weights.export import largest_rank, write_peft, write_vllm

    adapter = AdapterFiles.open(trained.adapter)
    adapter.config["base_model_name_or_path"] = name
    skeleton = trained.model.load_skeleton()
    out.parent.mkdir(parents=True, exist_ok=True)
    with whole_folder(out) as aside:
        write = write_vllm if form == "vllm" else write_peft
        num_bytes = write(adapter, skeleton, aside, dtype=torch.bfloat16)
        trained.save_tokenizer(aside)
        checked = _check(trained, aside, form, skeleton)
        rank = _allowed_rank(largest_rank(AdapterFiles.open(aside).config))
        write_card(trained, form, name, aside, max_rank=rank)
    how = ", shared factors written out for each expert" if adapter.expert_matrices() else ""
    print(f"{out}: {num_bytes / 1e6:.2f} MB in bf16{how}")
    print(f"checked: {checked}")
    if form == "vllm":
        module = quote_for_shell(f"{trained.run.name}={out}")
        print(
            f"serve it with: vllm serve {name} --enable-lora --max-lora-rank {rank} --lora-modules"
            f" {module}"
        )
    else:
        print(f"load it with: peft.PeftModel.from_pretrained(base, {str(out)!r})")


def _check(trained: Trained, folder: Path, form: str, skeleton: Any) -> str:
    """Hold what was written to its layout, and to the logits of what was trained where its
    reader can run here; say which.
    """
    import psutil
    import torch

    from lorakit.weights.reload import check_layout, reload_in_peft

    num_matrices = check_layout(folder, skeleton)
    layout = f"names and shapes of {num_matrices:,} matrices"
    if form == "vllm":
        return f"{layout}, as vLLM's documentation has them; vLLM itself does not run here"
    num_bytes = 4 * sum(parameter.numel() for parameter in skeleton.parameters())
    if num_bytes > 0.8 * psutil.virtual_memory().available:
        return (
            f"{layout}; the base in float32 ({num_bytes / 1e9:.0f} GB) does not fit, so plain PEFT"
            " was not tried"
        )
    difference, largest = reload_in_peft(
        trained.load_base("float32"), trained.adapter, folder, dtype=torch.bfloat16
    )
    return (
        f"{layout}; logits of plain PEFT with it differ by {difference:.1e} (largest logit"
        f" {largest:.2f})"
    )


def write_card(trained: Trained, form: str, name: str, folder: Path, *, max_rank: int = 0) -> None:
    """Write README.md into ``folder``."""
    from lorakit.model.load import BUNDLED
    from lorakit.weights.card import model_card

    base = (
        Path(name).name
        if name.startswith("/")
        else f"lorakit's bundled {name}"
        if name in BUNDLED
        else name
    )
    images = getattr(trained.model.load_config(), "vision_config", None) is not None
    card = model_card(
        trained.run, base=base, form=form, takes_images=images, step=trained.step, max_rank=max_rank
    )
    (folder / "README.md").write_text(card, encoding="utf-8")


def _allowed_rank(rank: int) -> int:
    """The least rank that vLLM's --max-lora-rank takes and that is enough."""
    return next(
        (allowed for allowed in (8, 16, 32, 64, 128, 256, 320, 512) if allowed >= rank), rank
    )


if __name__ == "__main__":
    run_command(main)

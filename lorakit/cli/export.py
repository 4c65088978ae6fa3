"""``lorakit export [RUN] --out FOLDER``: the adapter as plain PEFT, vLLM and others read it."""

from __future__ import annotations

import argparse

from lorakit.cli.guard import run_command
from lorakit.cli.trained import add_run_arguments, open_trained, output_path
from lorakit.errors import CheckpointError


def main(arguments: list[str]) -> None:
    """Write the adapter in PEFT's layout: as it is, or with factors that experts share written out for each of them."""
    parser = argparse.ArgumentParser(prog="lorakit export", description="Write a run's adapter in PEFT's own layout, in bf16.")
    add_run_arguments(parser)
    parser.add_argument("--out", type=output_path, help="folder to write (default: `peft` in the run's folder)")
    options = parser.parse_args(arguments)
    trained = open_trained(options)
    out = options.out or trained.run.folder / "peft"
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CheckpointError(f"{out} exists and is not empty; choose another --out")

    import torch

    from lorakit.model.load import load_skeleton
    from lorakit.weights.adapter import AdapterFiles
    from lorakit.weights.export import write_peft
    from lorakit.weights.files import whole_folder

    adapter = AdapterFiles.open(trained.adapter)
    out.parent.mkdir(parents=True, exist_ok=True)
    with whole_folder(out) as aside:
        skeleton = load_skeleton(trained.base, **trained.model_options)
        num_bytes = write_peft(adapter, skeleton, aside, dtype=torch.bfloat16)
    how = ", shared factors written out for each expert" if adapter.expert_matrices() else ""
    print(f"{out}: {num_bytes / 1e6:.2f} MB in bf16{how}; load it with peft.PeftModel.from_pretrained(base, {str(out)!r})")


if __name__ == "__main__":
    run_command(main)

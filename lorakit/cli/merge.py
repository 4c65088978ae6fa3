"""``lorakit merge [RUN] --out FOLDER``: base and adapter as one model, at no cost at inference."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from pathlib import Path

from lorakit.cli.guard import run_command
from lorakit.cli.run_arguments import add_run_arguments, open_trained, output_path, parse
from lorakit.errors import ConfigError
from lorakit.pipeline.trained import Trained


def main(arguments: list[str]) -> None:
    """Merge as ``arguments`` say and print the report."""
    parser = argparse.ArgumentParser(
        prog="lorakit merge", description="Write base and adapter as one model for transformers."
    )
    add_run_arguments(parser)
    parser.add_argument(
        "--out", type=output_path, help="folder to write (default: `merged` in the run's folder)"
    )
    parser.add_argument(
        "--dtype", help="float32, bfloat16 or float16 (default: as the base's files)"
    )
    options = parse(parser, arguments)
    trained = open_trained(options)
    merge(trained, options.out or trained.run.folder / "merged", options.dtype)


def merge(
    trained: Trained,
    out: Path,
    dtype: str | None,
    *,
    base_name: str | None = None,
    finish: Callable[[Path], None] | None = None,
) -> None:
    """Write the run's base and adapter as one model to ``out`` and print the report; see
    ``merge_adapter``. Raises LorakitError.
    """
    import psutil
    import torch

    from lorakit.model.load import DTYPES, model_class
    from lorakit.weights.merge import MergeReport, can_hold_twice, merge_adapter

    base, config = trained.model, trained.model.load_config()
    stored = config.dtype or torch.float32
    if dtype and dtype not in DTYPES:
        raise ConfigError(f"--dtype {dtype} is unknown; choose one of {', '.join(DTYPES)}")
    num_params = sum(parameter.numel() for parameter in base.load_skeleton().parameters())
    report: MergeReport = merge_adapter(
        base.path,
        trained.load_base,
        trained.adapter,
        out,
        dtype=getattr(torch, dtype) if dtype else stored,
        stored=stored,
        tokenizer=trained.load_tokenizer(),
        revision=base.revision,
        pixel_bounds=trained.pixel_bounds,
        trust_remote_code=trained.trust_remote_code,
        base_name=base_name,
        finish=finish,
        can_compare=can_hold_twice(num_params, psutil.virtual_memory().available),
    )
    print_report(report, out, model_class(config).__name__)


def print_report(report: object, out: Path, class_name: str) -> None:
    """Print the merged matrices, those of all layers in one line, and the logit differences."""
    from rich.console import Console
    from rich.table import Table

    from lorakit.weights.merge import MergeReport

    assert isinstance(report, MergeReport)
    console = Console(soft_wrap=True)
    # names are whole, and a narrow terminal wraps them itself
    console.width = max(console.width, 120)
    table = Table("merged tensors", "count", "shape", "relative change", box=None)
    alike: dict[tuple[str, str], list[float]] = {}
    for tensor in report.tensors:
        kind = re.sub(r"\.\d+\.", ".*.", tensor.name), " × ".join(map(str, tensor.shape))
        alike.setdefault(kind, []).append(tensor.relative_change)
    for (name, shape), changes in alike.items():
        least, most = f"{min(changes):.1e}", f"{max(changes):.1e}"
        table.add_row(
            name, str(len(changes)), shape, most if least == most else f"{least} to {most}"
        )
    console.print(table)
    if report.untied:
        console.print(
            "the unembedding was tied to the embedding; the merged model has it as a matrix of"
            " its own"
        )
    if report.float32_difference is not None:
        console.print(
            f"largest logit difference to the adapter form: {report.float32_difference:.2e} in"
            f" float32, {report.rounded_difference:.2e} after rounding to {report.dtype}"
            f" ({report.rounded_median_difference:.2e} at the median position; largest logit"
            f" {report.largest_logit:.2f}; rounding the base alone:"
            f" {report.base_rounding_difference:.2e})"
        )
    console.print(f"checked: {report.check}")
    console.print(
        f"{len(report.tensors)} tensors merged into {out}; load it with"
        f" {class_name}.from_pretrained"
    )


if __name__ == "__main__":
    run_command(main)

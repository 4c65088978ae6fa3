"""lorakit beside PEFT, TRL and transformers on the same weights, tokens and adapters: time, memory,
ratios.

    python scripts/bench/bench.py [--quick] [--out FOLDER]

Each contender of a row lives in a process of its own, and they are driven in turn, A B A B, so that
a busy machine slows all alike. The table gives medians with the spread (largest less smallest), and
the ratio to the row's first contender. Beside each row
stand its floors: operations over the measured rate of a large matrix product, and bytes of weights
over the measured rate of a copy. A contender that is not installed is named as such. Written to the
folder: bench.json, bench.png.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import statistics
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import steps
import torch
from rich.console import Console
from rich.table import Table
from worker import Measured, Worker

LAYER = {"experts": 128, "hidden": 1024, "width": 512, "top_k": 8, "rank": 16}
WIDTH = {"float32": 4, "bfloat16": 2}  # bytes of a number
STEP_TOKENS = 4 * 512
ROW_SECONDS, MIN_ROUNDS = 60, 2  # a row that has taken so long ends after so many measured rounds
HEAD = {"tokens": 2048, "vocab": 151_936, "hidden": 1024}


@dataclass(frozen=True)
class Row:
    """What is compared; the first contender is what ratios refer to."""

    name: str
    kind: str
    settings: dict[str, Any]
    contenders: tuple[str, ...]
    operations: float  # multiplications and additions that no contender can do without
    weight_bytes: float  # of weights that are read, forward and backward


def rows(quick: bool, dtypes: tuple[str, ...]) -> Iterator[Row]:
    """The rows, with their counts of operations and bytes."""
    for dtype in dtypes:
        for tokens in (1024,) if quick else (256, 1024, 4096):
            yield layer_row(f"expert layer, {tokens} tokens, {dtype}", dtype, tokens=tokens)
        if not quick:
            yield layer_row(
                f"expert layer, 1024 tokens, 32 experts, {dtype}", dtype, tokens=1024, experts=32
            )
            yield layer_row(
                f"expert layer, 1024 tokens, rank 64, {dtype}", dtype, tokens=1024, rank=64
            )
        for share in (0.2,) if quick else (1.0, 0.2):
            operations = 2 * 2 * share * HEAD["tokens"] * HEAD["vocab"] * HEAD["hidden"]
            weight_bytes = 2 * HEAD["vocab"] * HEAD["hidden"] * WIDTH[dtype]
            settings = {**HEAD, "dtype": dtype, "share": share}
            name = f"head, {share:.0%} trained, {dtype}"
            yield Row(name, "head", settings, ("full", "trl", "lorakit"), operations, weight_bytes)
        for model in ("moe",) if quick else ("moe", "dense"):
            for share in (1.0, 0.2):
                settings = {"model": model, "share": share, "dtype": dtype}
                active, total = count_params(model, share)
                name = f"whole step, {model}, {share:.0%} trained, {dtype}"
                counts = 2 * 2 * STEP_TOKENS * active, 2 * total * WIDTH[dtype]
                yield Row(name, "whole_step", settings, ("trl", "lorakit", "frozen"), *counts)
        if not quick:
            settings = {
                "model": "dense",
                "dtype": dtype,
                "rows": 1,
                "length": STEP_TOKENS,
                "document": 128,
            }
            name = (
                f"whole step, dense, a row of {STEP_TOKENS} packed from documents of 128, {dtype}"
            )
            active, total = count_params("dense", 1.0)
            counts = 2 * 2 * STEP_TOKENS * active, 2 * total * WIDTH[dtype]
            yield Row(name, "whole_step", settings, ("mask", "lorakit"), *counts)


def layer_row(name: str, dtype: str, **changes: int) -> Row:
    """A row of one layer of experts."""
    layer = {**LAYER, **changes}
    matrices = 3 * layer["hidden"] * layer["width"]
    # forward, and back towards the input
    operations = 2 * 2 * layer["tokens"] * layer["top_k"] * matrices
    weight_bytes = 2 * layer["experts"] * matrices * WIDTH[dtype]
    contenders = ("frozen", "peft", "lorakit", "lorakit_shared")
    return Row(
        name, "expert_layer", {"dtype": dtype, **layer}, contenders, operations, weight_bytes
    )


def count_params(model: str, share: float) -> tuple[float, float]:
    """Return (parameters that a token meets in products, all parameters); of the head, what the
    ``share`` of trained tokens meets.
    """
    built = steps.make_model(model, torch.float32)
    config = built.config
    stacked = {name for name, p in built.named_parameters() if p.dim() == 3}
    active = 0.0
    for name, parameter in built.named_parameters():
        if parameter.dim() > 1 and "embed" not in name:
            used = config.num_experts_per_tok / config.num_experts if name in stacked else 1.0
            active += used * parameter.numel()
    return active + share * config.vocab_size * config.hidden_size, sum(
        p.numel() for p in built.parameters()
    )


def measure(
    row: Row, repeats: int, num_peaks: int, threads: int, console: Console
) -> dict[str, Any]:
    """Run the contenders in turn: a round to warm up, ``repeats`` for times (fewer of a slow
    row), ``num_peaks`` for memory.
    """
    workers = {
        who: Worker(row.kind, {"who": who, **row.settings}, threads) for who in row.contenders
    }
    found: dict[str, list[Measured]] = {
        who: [] for who, worker in workers.items() if worker.problem is None
    }
    for who, worker in workers.items():
        if worker.problem:
            console.print(f"{row.name}: {who} left out ({worker.problem})")
    for who in found:
        workers[who].call()
    start = time.perf_counter()
    for number in range(repeats):
        if number >= MIN_ROUNDS and time.perf_counter() - start > ROW_SECONDS:
            break
        for who in found:
            found[who].append(workers[who].call())
    peaks = {
        who: max(workers[who].call(trim=True).peak_bytes for _ in range(num_peaks)) for who in found
    }
    for worker in workers.values():
        worker.stop()
    return {
        who: {
            "seconds": statistics.median(m.seconds for m in results),
            "spread_seconds": max(m.seconds for m in results) - min(m.seconds for m in results),
            "rounds": len(results),
            "peak_bytes": peaks[who],
            "first_value": results[0].value,
        }
        for who, results in found.items()
    }


def find_differing_values(row: Row, found: dict[str, Any]) -> str | None:
    """Name the contenders whose loss differs by more than 1e-4 from the first one's, in float32.

    Whole steps have stepped once before, but for the frozen base's, which never do.
    """
    steps_alike = [who for who in found if not (row.kind == "whole_step" and who == "frozen")]
    values = {who: found[who]["first_value"] for who in steps_alike}
    first = next(iter(values.values()))
    if row.settings["dtype"] != "float32" or all(
        abs(value - first) <= 1e-4 * abs(first) for value in values.values()
    ):
        return None
    return f"{row.name}: " + ", ".join(f"{who} {value:.6g}" for who, value in values.items())


def processor_name() -> str:
    """The processor as Linux calls it."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next(
        (line.partition(": ")[2] for line in lines if line.startswith("model name")),
        platform.processor(),
    )


def version_of(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def product_rate(threads: int, size: int = 2048) -> float:
    """Operations per second of a large matrix product in float32."""
    torch.set_num_threads(threads)
    a = torch.randn(size, size)
    times = []
    for _ in range(6):
        start = time.perf_counter()
        a @ a
        times.append(time.perf_counter() - start)
    return 2 * size**3 / min(times)


def copy_rate(threads: int, num_bytes: int = 1 << 28) -> float:
    """Bytes per second that a copy reads."""
    torch.set_num_threads(threads)
    source, target = torch.ones(num_bytes // 4), torch.empty(num_bytes // 4)
    times = []
    for _ in range(6):
        start = time.perf_counter()
        target.copy_(source)
        times.append(time.perf_counter() - start)
    return num_bytes / min(times)


def show(row: Row, found: dict[str, Any], rate: float, bytes_rate: float) -> Table:
    """One row's table."""
    floor = (
        f"; floor {row.operations / rate:.3f} s of products, {row.weight_bytes / bytes_rate:.3f} s"
        " of reading weights"
    )
    table = Table(title=f"{row.name}{floor}", title_justify="left", box=None)
    for column in (
        "contender",
        "seconds",
        "spread",
        "times as fast",
        "peak MB above",
        "of its memory",
    ):
        table.add_column(column, justify="left" if column == "contender" else "right")
    first = found[next(iter(found))]
    for who, figures in found.items():
        table.add_row(
            who,
            f"{figures['seconds']:.3f}",
            f"{figures['spread_seconds']:.3f}",
            f"{first['seconds'] / figures['seconds']:.2f}",
            f"{figures['peak_bytes'] / 1e6:,.0f}",
            f"{figures['peak_bytes'] / max(first['peak_bytes'], 1):.2f}",
        )
    return table


def main() -> None:
    """Measure all rows and write ``bench.json`` and ``bench.png``."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="fewer rows and repeats")
    parser.add_argument(
        "--repeats", type=int, help="measured rounds of a row at most (default 5, quick 2)"
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", default="", help="rows whose name holds this text")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/bench"), help="folder for bench.json"
    )
    options = parser.parse_args()
    console, start = Console(soft_wrap=True), time.perf_counter()
    has_bf16 = bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    if not has_bf16:
        console.print(
            "this processor has no bf16 products: the bf16 rows are left out, since they would time"
            " an emulation"
        )
    rate, bytes_rate = product_rate(options.threads), copy_rate(options.threads)
    console.print(
        f"float32 products: {rate / 1e9:.0f} GFLOP/s, copies: {bytes_rate / 1e9:.1f} GB/s, on"
        f" {options.threads} threads"
    )
    results = []
    for row in rows(options.quick, ("float32", "bfloat16") if has_bf16 else ("float32",)):
        if options.only in row.name:
            found = measure(
                row,
                options.repeats or (2 if options.quick else 5),
                1 if options.quick else 2,
                options.threads,
                console,
            )
            console.print(show(row, found, rate, bytes_rate))
            if differing := find_differing_values(row, found):
                console.print(f"NOT THE SAME WORK: {differing}")
            results.append({"row": asdict(row), "found": found})
    about = {
        "date": datetime.date.today().isoformat(),
        "processor": processor_name(),
        "python": platform.python_version(),
        "packages": {name: version_of(name) for name in ("torch", "transformers", "peft", "trl")},
        "minutes": round((time.perf_counter() - start) / 60, 1),
    }
    options.out.mkdir(parents=True, exist_ok=True)
    text = json.dumps(
        {
            **about,
            "threads": options.threads,
            "product_rate": rate,
            "copy_rate": bytes_rate,
            "rows": results,
        },
        indent=2,
    )
    (options.out / "bench.json").write_text(text + "\n", encoding="utf-8")
    draw(results, options.out / "bench.png")
    console.print(
        f"{about['minutes']} minutes; written: {options.out / 'bench.json'},"
        f" {options.out / 'bench.png'}"
    )


def draw(results: list[dict[str, Any]], path: Path) -> None:
    """Draw time and memory of each contender beside those of its row's first."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(13, 1.5 + 0.8 * len(results)), sharey=True)
    colours = dict(
        zip(
            sorted({who for result in results for who in result["found"]}),
            plt.get_cmap("tab10").colors,
            strict=False,
        )
    )
    for axis, field, title in zip(
        axes, ("seconds", "peak_bytes"), ("time", "peak memory"), strict=True
    ):
        for number, result in enumerate(results):
            first = next(iter(result["found"].values()))
            height = 0.8 / len(result["found"])
            for place, (who, figures) in enumerate(result["found"].items()):
                ratio = figures[field] / max(first[field], 1e-9)
                bar = axis.barh(number + place * height, ratio, height, color=colours[who])
                axis.bar_label(bar, [f" {who} {ratio:.2f}"], fontsize=7)
        axis.set_yticks(
            [number + 0.3 for number in range(len(results))],
            [result["row"]["name"] for result in results],
        )
        axis.set_title(f"{title}, first contender = 1")
        axis.margins(x=0.25)
    axes[0].invert_yaxis()
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    main()

"""lorakit beside PEFT, TRL and transformers on the same weights, tokens and adapters: time, memory, ratios.

    python scripts/bench/bench.py [--quick] [--out FOLDER]

Each contender of a row lives in a process of its own, and they are driven in turn, A B A B, so that a busy machine slows all
alike. The table gives medians with the spread (largest less smallest), and the ratio to the row's first contender. The floor of a
row is its operations over the measured rate of a large matrix product. A contender that is not installed is named as such.
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

import torch
from rich.console import Console
from rich.table import Table
from worker import Measured, Worker

LAYER = {"experts": 128, "hidden": 1024, "width": 512, "top_k": 8, "rank": 16}
HEAD = {"tokens": 2048, "vocab": 151_936, "hidden": 1024}


@dataclass(frozen=True)
class Row:
    """What is compared; the first contender is what ratios refer to."""

    name: str
    kind: str
    settings: dict[str, Any]
    contenders: tuple[str, ...]
    operations: float  # multiplications and additions that no contender can do without


def rows(quick: bool, dtypes: tuple[str, ...]) -> Iterator[Row]:
    """The rows, with their count of operations."""
    layer = ("frozen", "peft", "lorakit", "lorakit_shared")
    for dtype in dtypes:
        for tokens in (1024,) if quick else (256, 1024, 4096):
            pairs = tokens * LAYER["top_k"]
            dense = 2 * 2 * pairs * 3 * LAYER["hidden"] * LAYER["width"]  # forward, and back towards the input
            yield Row(
                f"expert layer, {tokens} tokens, {dtype}",
                "expert_layer",
                {"tokens": tokens, "dtype": dtype, **LAYER},
                layer,
                dense,
            )
        for share in (1.0, 0.2):
            operations = 2 * 2 * share * HEAD["tokens"] * HEAD["vocab"] * HEAD["hidden"]
            settings = {**HEAD, "dtype": dtype, "share": share}
            yield Row(f"head, {share:.0%} trained, {dtype}", "head", settings, ("full", "lorakit"), operations)
        for model in ("moe", "dense"):
            for share in (1.0, 0.2):
                settings = {"model": model, "share": share, "dtype": dtype}
                yield Row(f"whole step, {model}, {share:.0%} trained, {dtype}", "whole_step", settings, ("trl", "lorakit"), 0.0)


def measure(row: Row, repeats: int, threads: int, console: Console) -> dict[str, Any]:
    """Run the contenders of ``row`` in turn; the first round warms up and is left out."""
    workers = {who: Worker(row.kind, {"who": who, **row.settings}, threads) for who in row.contenders}
    found: dict[str, list[Measured]] = {who: [] for who, worker in workers.items() if worker.problem is None}
    for who, worker in workers.items():
        if worker.problem:
            console.print(f"{row.name}: {who} left out ({worker.problem})")
    for number in range(repeats + 1):
        for who in found:
            result = workers[who].call()
            if number:
                found[who].append(result)
    for worker in workers.values():
        worker.stop()
    return {
        who: {
            "seconds": statistics.median(m.seconds for m in results),
            "spread_seconds": max(m.seconds for m in results) - min(m.seconds for m in results),
            "peak_bytes": max(m.peak_bytes for m in results),
            "first_value": results[0].value,
        }
        for who, results in found.items()
    }


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


def show(row: Row, found: dict[str, Any], rate: float) -> Table:
    """One row's table."""
    floor = f"; floor {row.operations / rate:.2f} s" if row.operations else ""
    table = Table(title=f"{row.name}{floor}", title_justify="left", box=None)
    for column in ("contender", "seconds", "spread", "times as fast", "peak MB above", "of its memory"):
        table.add_column(column, justify="left" if column == "contender" else "right")
    first = found[next(iter(found))]
    for who, figures in found.items():
        table.add_row(
            who, f"{figures['seconds']:.3f}", f"{figures['spread_seconds']:.3f}", f"{first['seconds'] / figures['seconds']:.2f}",
            f"{figures['peak_bytes'] / 1e6:,.0f}", f"{figures['peak_bytes'] / max(first['peak_bytes'], 1):.2f}",
        )  # fmt: skip
    return table


def main() -> None:
    """Measure all rows and write ``bench.json``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer rows and repeats")
    parser.add_argument("--repeats", type=int, help="measured rounds of each row (default 5, quick 3)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", default="", help="rows whose name holds this text")
    parser.add_argument("--out", type=Path, default=Path("runs/bench"), help="folder for bench.json")
    options = parser.parse_args()
    console = Console(soft_wrap=True)
    has_bf16 = bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    if not has_bf16:
        console.print("this processor has no bf16 products: the bf16 rows are left out, since they would time an emulation")
    rate = product_rate(options.threads)
    console.print(f"float32 products: {rate / 1e9:.0f} GFLOP/s on {options.threads} threads")
    results = []
    for row in rows(options.quick, ("float32", "bfloat16") if has_bf16 else ("float32",)):
        if options.only in row.name:
            found = measure(row, options.repeats or (3 if options.quick else 5), options.threads, console)
            console.print(show(row, found, rate))
            results.append({"row": asdict(row), "found": found})
    packages = {name: metadata.version(name) for name in ("torch", "transformers", "peft")}
    about = {"date": datetime.date.today().isoformat(), "python": platform.python_version(), "packages": packages}
    options.out.mkdir(parents=True, exist_ok=True)
    text = json.dumps({**about, "threads": options.threads, "product_rate": rate, "rows": results}, indent=2)
    (options.out / "bench.json").write_text(text + "\n", encoding="utf-8")
    console.print(f"written: {options.out / 'bench.json'}")


if __name__ == "__main__":
    main()

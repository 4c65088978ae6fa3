"""Several processes beside as many runs of one on the same cores at the same time; and how long
rows can be when they are shared.

    python scripts/bench/several.py [--ranks 1 2 4] [--strategies ddp zero1 zero2 zero3] [--out
    FILE] python scripts/bench/several.py --sequence [--budget-mb 2500]

Weak scaling: each process has so many rows, whatever their number, and one thread. N joined
processes are compared with N that know nothing of one another and run at the same time, so that
both have the same cores, caches and memory bus. What a process sends is what the system counts as
written by it between two steps; time to the first step is what the run reports.

Longest rows: the largest number of positions, in steps of 256, whose run stays within the budget of
resident memory in each process (libraries, 0.4 GB of base and all), where one, two or four
processes share each row.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import steps
import torch
import transformers
from rich.console import Console
from rich.table import Table

from lorakit.model.load import BUNDLED

STEPS, ROWS, LENGTH = 9, 4, 256
SKIPPED = 3  # steps that warm up
# what is freed goes back at once
EXACT_MEMORY = {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"}
SETTINGS = (
    *(
        f"data.batch_size={ROWS}",
        "data.max_tokens=257",
        "data.epochs=null",
        f"trainer.max_steps={STEPS}",
        "trainer.threads=1",
    ),
    *(
        "trainer.accelerator=cpu",
        "trainer.precision=32-true",
        "callbacks.samples=null",
        "logger=none",
        "checkpoint.every_steps=0",
    ),
    *(
        "lora.rank=16",
        "lora.alpha=16",
        "data.check_token_rows=50",
        "optim.lr=1e-4",
        "data.shuffle=false",
    ),
)


def start(folder: Path, name: str, *arguments: str, **variables: str) -> subprocess.Popen[bytes]:
    """Start a run of the real program, with ``variables`` in its environment."""
    given = {text.partition("=")[0] for text in arguments}
    settings = [text for text in SETTINGS if text.partition("=")[0] not in given]
    command = [
        sys.executable,
        "-m",
        "lorakit",
        "train",
        *settings,
        f"run={name}",
        "model.path=model",
        "data.path=rows.jsonl",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **variables}
    log = (folder / f"{name}.log").open("wb")
    return subprocess.Popen(
        [*command, *arguments], cwd=folder, env=environment, stdout=log, stderr=subprocess.STDOUT
    )


def prepare(folder: Path, model_name: str, length: int, count: int) -> int:
    """Write a model with random weights, and rows of tokens; returns the bytes of the base in
    float32.
    """
    model = steps.make_model(model_name, torch.float32)
    model.save_pretrained(folder / "model")
    transformers.AutoTokenizer.from_pretrained(BUNDLED["tiny"]).save_pretrained(folder / "model")
    write_rows(folder, length, count)
    return sum(parameter.numel() for parameter in model.parameters()) * 4


def write_rows(folder: Path, length: int, count: int) -> None:
    generator = random.Random(0)
    with (folder / "rows.jsonl").open("w") as file:
        for _ in range(count):
            tokens = [generator.randrange(3, 270) for _ in range(length + 1)]
            file.write(json.dumps({"tokens": tokens, "weights": [0.0] + [1.0] * length}) + "\n")


def history_of(folder: Path, name: str) -> list[dict[str, Any]]:
    path = folder / "runs" / name / "history.jsonl"
    return (
        [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]
        if path.exists()
        else []
    )


def measure_sent(folder: Path, name: str, process: subprocess.Popen[bytes]) -> float | None:
    """Bytes that the first worker of ``process`` writes per step, while it runs."""
    looks: list[tuple[int, int]] = []
    worker: psutil.Process | None = None
    while process.poll() is None:
        done = len(history_of(folder, name))
        if done and worker is None:
            workers = [
                p
                for p in psutil.Process(process.pid).children(recursive=True)
                if p.environ().get("RANK") == "0"
            ]
            worker = max(workers, key=lambda p: p.memory_info().rss, default=None)
        if worker is not None and done >= SKIPPED and (not looks or looks[-1][0] != done):
            try:
                looks.append((done, worker.io_counters().write_chars))
            except psutil.Error:
                break
        time.sleep(0.02)
    looks = [look for look in looks if look[0] < STEPS]  # the last step is followed by a checkpoint
    if len(looks) < 2:
        return None
    return (looks[-1][1] - looks[0][1]) / (looks[-1][0] - looks[0][0])


def speed_of(folder: Path, name: str) -> float:
    """Tokens per second over the steps behind the warm-up."""
    records = history_of(folder, name)
    return statistics.median(record["speed/tokens_per_second"] for record in records[SKIPPED:])


def scale(
    folder: Path, ranks: list[int], strategies: list[str], rounds: int
) -> list[dict[str, Any]]:
    """Measure joined and separate runs in turn."""
    found = []
    for world in ranks:
        for strategy in strategies if world > 1 else ["single"]:
            ratios, together, alone, sent, first = [], [], [], [], []
            for number in range(rounds):
                names = [f"alone-{world}-{strategy}-{number}-{rank}" for rank in range(world)]
                for process in [start(folder, name) for name in names]:
                    assert process.wait() == 0, [
                        (folder / f"{name}.log").read_text()[-1000:] for name in names
                    ]
                separate = sum(speed_of(folder, name) for name in names)
                name = f"joined-{world}-{strategy}-{number}"
                joined = start(folder, name, f"trainer.devices={world}", f"strategy={strategy}")
                sent.append(measure_sent(folder, name, joined))
                assert joined.wait() == 0, (folder / f"{name}.log").read_text()
                ratios.append(speed_of(folder, name) / separate)
                together.append(speed_of(folder, name))
                alone.append(separate)
                first.append(
                    json.loads((folder / "runs" / name / "run.json").read_text())[
                        "first_step_seconds"
                    ]
                )
                shutil.rmtree(folder / "runs")
            counted = [value for value in sent if value is not None]
            found.append(
                {
                    "processes": world,
                    "strategy": strategy,
                    "efficiency": ratios,
                    "joined_tokens_per_second": together,
                    "separate_tokens_per_second": alone,
                    "first_step_seconds": first,
                    "sent_bytes_per_step": statistics.median(counted) if counted else None,
                }
            )
            print(json.dumps(found[-1]), flush=True)
    return found


def show_scaling(found: list[dict[str, Any]], base_bytes: int) -> None:
    table = Table(
        title=(
            f"weak scaling: {ROWS} rows of {LENGTH} tokens in each process, base"
            f" {base_bytes / 1e6:.0f} MB, one thread each"
        )
    )
    for head in (
        "processes",
        "strategy",
        "tokens/s",
        "separate runs",
        "efficiency (spread)",
        "sent per step and process",
        "first step",
    ):
        table.add_column(head, justify="right")
    for row in found:
        spread = max(row["efficiency"]) - min(row["efficiency"])
        sent = (
            ""
            if row["sent_bytes_per_step"] is None
            else f"{row['sent_bytes_per_step'] / 1e6:.1f} MB"
        )
        table.add_row(
            str(row["processes"]),
            row["strategy"],
            f"{statistics.median(row['joined_tokens_per_second']):,.0f}",
            f"{statistics.median(row['separate_tokens_per_second']):,.0f}",
            f"{statistics.median(row['efficiency']):.2f} ({spread:.2f})",
            sent,
            f"{statistics.median(row['first_step_seconds']):.1f} s",
        )
    Console(width=140).print(table)


def peak_of(folder: Path, length: int, parts: int) -> tuple[float, float]:
    """Return (most resident MiB of a process, seconds of the run) for one step on a row of
    ``length`` positions.
    """
    write_rows(folder, length, 4)
    sizes = (
        f"data.max_tokens={length + 1}",
        "data.batch_size=1",
        "trainer.max_steps=1",
        "plan.enforce=false",
    )
    shared = (
        ("strategy=ddp", f"strategy.sequence_parallel={parts}")
        if parts > 1
        else ("strategy=single",)
    )
    process = start(folder, "long", *sizes, *shared, f"trainer.devices={parts}", **EXACT_MEMORY)
    begun, peaks = time.monotonic(), {0: 0.0}
    while process.poll() is None:
        with contextlib.suppress(psutil.Error, OSError):  # one that ends meanwhile
            for one in [
                psutil.Process(process.pid),
                *psutil.Process(process.pid).children(recursive=True),
            ]:
                status = Path(f"/proc/{one.pid}/status").read_text()
                if "VmHWM:" in status:  # not where it has ended
                    peaks[one.pid] = int(status.partition("VmHWM:")[2].split()[0]) / 1024
        time.sleep(0.05)
    assert process.returncode == 0, (folder / "long.log").read_text()[-2000:]
    shutil.rmtree(folder / "runs")
    return max(peaks.values()), time.monotonic() - begun


def find_longest(folder: Path, budget_mb: float) -> list[dict[str, Any]]:
    """The longest row that fits into ``budget_mb`` when it is shared by 1, 2 and 4 processes."""
    found, low = [], 2
    for parts in (1, 2, 4):
        peaks: dict[int, float] = {}

        def fits(blocks: int, parts: int = parts, peaks: dict[int, float] = peaks) -> bool:
            peaks[blocks * 256], seconds = peak_of(folder, blocks * 256, parts)
            print(
                f"{parts} processes, {blocks * 256} positions: {peaks[blocks * 256]:.0f} MiB,"
                f" {seconds:.0f} s",
                flush=True,
            )
            return peaks[blocks * 256] <= budget_mb

        high = 2 * low
        while fits(high):
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if fits(middle) else (low, middle)
        found.append(
            {
                "processes": parts,
                "positions": low * 256,
                "megabytes": peaks.get(low * 256),
                "tried": peaks,
            }
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--strategies", nargs="+", default=["ddp", "zero1", "zero2", "zero3"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="JSON file of all figures")
    parser.add_argument("--sequence", action="store_true", help="measure the longest row instead")
    parser.add_argument(
        "--budget-mb", type=float, default=2500, help="resident memory of a process, in MiB"
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if options.sequence:
            prepare(folder, "dense", 256, 4)
            found = find_longest(folder, options.budget_mb)
            for row in found:
                print(f"{row['processes']} processes: {row['positions']} positions")
        else:
            base_bytes = prepare(folder, "moe", LENGTH, 200)
            found = scale(folder, options.ranks, options.strategies, options.rounds)
            show_scaling(found, base_bytes)
    if options.out:
        options.out.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()

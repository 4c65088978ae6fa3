"""How long a run takes until its first line and its first step: ``python scripts/bench/start.py
[--model FOLDER …] [--beside NAME=CHECKOUT …] [--rounds 5]``.

Each round starts every contender's program in a process of its own, in turn: the bundled model, and
each ``--model``, a folder in the hub's layout with a chat template, under experiment=chat_sft with
one micro-batch in a step. ``--beside`` names another checkout of lorakit, which runs in the same
environment. Run it on an idle machine.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

HERE = Path(__file__).resolve().parents[2]
FIGURES = ("help", "first line", "first step")  # seconds from the start of the process
SETTINGS = (
    "run=it",
    "trainer.max_steps=1",
    "callbacks.samples=null",
    "logger=none",
    "trainer.accelerator=cpu",
)

ONE = ("trainer.accumulate_grad_batches=1",)


def measure(checkout: Path, model: str, rows: str) -> dict[str, float]:
    """Seconds of each of ``FIGURES``, of one start of each program."""
    environment = {**os.environ, "PYTHONPATH": str(checkout), "HF_HUB_OFFLINE": "1"}
    program = [sys.executable, "-m", "lorakit"]
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        subprocess.run(
            [*program, "--help"], cwd=folder, env=environment, check=True, capture_output=True
        )
        found = {"help": time.perf_counter() - began}
        preset = () if model == "tiny" else ("experiment=chat_sft", *ONE)
        named = (f"model.path={model}", f"data.path={rows}")
        command = [*program, "train", *preset, *named, *SETTINGS]
        began = time.perf_counter()
        with subprocess.Popen(
            command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        ) as process:
            assert process.stdout is not None
            process.stdout.readline()
            found["first line"] = time.perf_counter() - began
            _, errors = process.communicate()
        if process.returncode:
            raise SystemExit(errors.decode())
        info = json.loads((Path(folder) / "runs/it/run.json").read_text())
        found["first step"] = info["first_step_seconds"]
    return found


def write_chats(path: Path, count: int = 2000) -> None:
    """Rows of chat for a model that is not the bundled one, of some 300 tokens."""
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            messages = [
                {"role": "user", "content": f"Count from {number} to {number + 60}."},
                {"role": "assistant", "content": " ".join(map(str, range(number, number + 61)))},
            ]
            file.write(json.dumps({"messages": messages}) + "\n")


def main() -> None:
    """Print a table of medians, spreads and ratios to the first contender, round by round."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", action="append", default=[], help="a folder")
    parser.add_argument("--beside", action="append", default=[], help="NAME=CHECKOUT")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    named = (text.partition("=") for text in options.beside)
    checkouts = {**{name: Path(folder) for name, _, folder in named}, "this": HERE}
    table = Table(title="seconds from the start of the process", title_justify="left")
    for column in ("model", "figure", "contender", "median", "smallest to largest", "ratio"):
        table.add_column(column)
    with tempfile.TemporaryDirectory() as folder:
        chats = Path(folder) / "chats.jsonl"
        write_chats(chats)
        for model in ("tiny", *options.model):
            rows = "pig_latin/train" if model == "tiny" else str(chats)
            found = {name: list[dict[str, float]]() for name in checkouts}
            for number in range(options.rounds + 1):
                for name, checkout in checkouts.items():
                    figures = measure(checkout, model, rows)
                    if number:  # one round before does not count
                        found[name].append(figures)
            for figure in FIGURES:
                first = [one[figure] for one in next(iter(found.values()))]
                for name, rounds in found.items():
                    seconds = [one[figure] for one in rounds]
                    ratios = [one / other for one, other in zip(seconds, first, strict=True)]
                    table.add_row(
                        Path(model).name,
                        figure,
                        name,
                        f"{statistics.median(seconds):.2f}",
                        f"{min(seconds):.2f} to {max(seconds):.2f}",
                        f"{statistics.median(ratios):.2f}",
                    )
    Console().print(table)


if __name__ == "__main__":
    main()

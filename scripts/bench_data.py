"""How fast a large JSONL is checked, how soon its first batch is there, and what memory that takes.

``python scripts/bench_data.py [--megabytes 1000]`` writes the file into a temporary folder and
prints figures as JSON.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

from lorakit.data.datamodule import LoRADataModule
from lorakit.model.load import load_tokenizer

SENTENCE = (
    "the quick brown fox jumps over a lazy dog while rain falls on the roof of an old house by"
    " the sea"
)
WORDS = SENTENCE.split()


def private_megabytes() -> float:
    """Private memory of this process, which mapped files are not part of (Linux)."""
    lines = Path("/proc/self/smaps_rollup").read_text(encoding="utf-8").splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_")) / 1e3


def write_rows(path: Path, megabytes: int, words_per_row: int) -> int:
    """Fill ``path`` with prompt/completion rows and return how many."""
    num_rows = 0
    with path.open("w", encoding="utf-8") as file:
        while file.tell() < megabytes * 1_000_000:
            for _ in range(1_000):
                start = num_rows % len(WORDS)
                text = " ".join((WORDS[start:] + WORDS) * (words_per_row // len(WORDS) + 1))[
                    : words_per_row * 5
                ]
                file.write(json.dumps({"prompt": f"Row {num_rows}: ", "completion": text}) + "\n")
                num_rows += 1
    return num_rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--megabytes", type=int, default=1_000)
    parser.add_argument("--words", type=int, default=100, help="words per row")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        num_rows = write_rows(path, options.megabytes, options.words)
        tokenizer = load_tokenizer("tiny")
        before = private_megabytes()
        started = time.perf_counter()
        datamodule = LoRADataModule(path=str(path), packing=True, batch_size=1, max_tokens=1024)
        datamodule.check_rows()
        checked = time.perf_counter() - started
        datamodule.set_tokenizer(tokenizer)
        datamodule.check_tokens()
        next(iter(datamodule.train_dataloader()))
        figures = {
            "megabytes": path.stat().st_size / 1e6,
            "rows": num_rows,
            "check_seconds": round(checked, 2),
            "check_megabytes_per_second": round(path.stat().st_size / 1e6 / checked, 1),
            "first_batch_seconds": round(time.perf_counter() - started, 2),
            "private_megabytes_grown": round(private_megabytes() - before, 1),
        }
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()

"""A large file costs little memory of its own, and its last row is read as quickly as its first."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest

from lorakit.data.read.sources import open_source

MEGABYTE = 1 << 20


def private_bytes() -> int:
    """Memory that belongs to this process alone; pages of a mapped file do not."""
    rollup = Path("/proc/self/smaps_rollup").read_text()
    fields = dict(line.split(":", 1) for line in rollup.splitlines()[1:])
    return sum(int(fields[name].split()[0]) * 1024 for name in ("Private_Clean", "Private_Dirty"))


@pytest.mark.slow
def test_a_file_of_100_megabytes_takes_less_than_that_in_private_memory(tmp_path: Path) -> None:
    row = '{"prompt": "%07d", "completion": "' + "x" * 460 + '"}\n'
    path, num_rows = tmp_path / "large.jsonl", 200_000
    with path.open("w") as file:
        file.writelines(row % number for number in range(num_rows))
    assert path.stat().st_size > 95 * MEGABYTE
    open_source("pig_latin/heldout")  # what is imported on the way is not the file's
    gc.collect()
    before = private_bytes()
    source = open_source(str(path))
    grown = private_bytes() - before
    assert len(source) == num_rows
    assert [source.row(i).prompt for i in (0, num_rows - 1)] == ["0000000", f"{num_rows - 1:07d}"]
    assert grown < 100 * MEGABYTE, f"{grown / MEGABYTE:.0f} MB"

"""The benchmark itself: contenders in processes of their own, the same work, a picture."""

from __future__ import annotations

from pathlib import Path

import bench
import pytest
from rich.console import Console


@pytest.mark.slow
def test_contenders_of_a_small_row_do_the_same_work(tmp_path: Path) -> None:
    row = bench.layer_row(
        "a small layer", "float32", tokens=16, experts=4, hidden=32, width=24, top_k=2, rank=4
    )
    found = bench.measure(row, repeats=2, num_peaks=1, threads=1, console=Console())
    assert list(found) == ["frozen", "peft", "lorakit", "lorakit_shared"]
    assert all(figures["rounds"] == 2 and figures["seconds"] > 0 for figures in found.values())
    assert bench.find_differing_values(row, found) is None
    bench.draw([{"row": {"name": row.name}, "found": found}], tmp_path / "bench.png")
    assert (tmp_path / "bench.png").stat().st_size > 10_000
    found["lorakit"]["first_value"] *= 1.001
    assert "lorakit" in str(bench.find_differing_values(row, found))

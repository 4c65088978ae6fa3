"""The GPU benchmark as far as a machine without one can tell: its counts by hand, and the whole
program on small shapes.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import gpu
import pytest
import transformers


def test_operations_per_token_of_the_real_model_by_hand() -> None:
    config = transformers.Qwen3MoeConfig(**gpu.REAL)
    model = gpu.make_model(config, "meta", gpu.torch.bfloat16)
    attention = 2 * 2048 * 4096 + 2 * 2048 * 512
    met = 48 * (attention + 8 * 3 * 2048 * 768 + 128 * 2048) + 151_936 * 2048
    pairs = 48 * 4 * 4096 * 1025 / 2
    of_model, of_hardware = gpu.operations_per_token(model, config, 1024, checkpointing=False)
    assert of_model == of_hardware == pytest.approx(4 * met + 3 * pairs)
    # 4 x 3.04 billion active weights without the embedding, and attention
    assert of_model == pytest.approx(13.3e9, rel=0.03)
    _, again = gpu.operations_per_token(model, config, 1024, checkpointing=True)
    assert again == pytest.approx(6 * met + 4 * pairs)


@pytest.mark.slow
def test_the_program_runs_on_small_shapes(tmp_path: Path, monkeypatch: Any) -> None:
    arguments = [
        "--device",
        "cpu",
        "--layers",
        "2",
        "--small",
        "--tokens",
        "64",
        "--steps",
        "1",
        "--out",
        str(tmp_path),
    ]
    monkeypatch.setattr(sys, "argv", ["gpu.py", *arguments])
    gpu.main()
    found = json.loads((tmp_path / "bench_gpu.json").read_text())
    assert [
        (record["who"], record["rank"], record["checkpointing"]) for record in found["records"]
    ] == [
        (who, rank, checkpointing)
        for who, rank in (
            ("shared_outer", 32),
            ("per_expert", 32),
            ("shared_outer", 8),
            ("peft", 32),
        )
        for checkpointing in (True, False)
    ]
    assert all(record["tokens_per_second"] > 0 for record in found["records"])


def test_without_a_gpu_it_says_so_and_writes_nothing(
    tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    monkeypatch.setattr(gpu.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--out", str(tmp_path / "out")])
    gpu.main()
    assert "nothing is measured" in capsys.readouterr().out and not (tmp_path / "out").exists()

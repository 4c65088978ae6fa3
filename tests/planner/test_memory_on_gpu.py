"""The planned memory of a step against what a GPU's allocator gives out for it: nothing in the
plan was fitted to these.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytestmark = [pytest.mark.slow, pytest.mark.gpu]
MEASURE = Path(__file__).parent / "measure.py"
LLAMA = {
    "model_type": "llama",
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 16,
    "vocab_size": 32000,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 16384,
}
QWEN3 = {
    "model_type": "qwen3",
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_hidden_layers": 28,
    "vocab_size": 151936,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "tie_word_embeddings": True,
}
EXPERTS = {
    "model_type": "qwen3_moe",
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_hidden_layers": 6,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "vocab_size": 151936,
    "num_experts": 128,
    "num_experts_per_tok": 8,
}
GEMMA2 = {
    "model_type": "gemma2",
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 8,
    "head_dim": 256,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 256000,
}
MISTRAL = {
    "model_type": "mistral",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 6,
    "head_dim": 128,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 32000,
    "sliding_window": 1024,
}
WHOLE = {**EXPERTS, "num_hidden_layers": 48}  # Qwen3-30B-A3B: 61 GB
# model, rows, positions, documents of a row, checkpointing, rank, layout
CASES: dict[str, tuple[dict[str, Any], int, int, int, bool, int, str]] = {
    "llama": (LLAMA, 4, 2048, 1, False, 16, "per_expert"),
    "llama, checkpointed": (LLAMA, 16, 2048, 1, True, 16, "per_expert"),
    "llama, one long row": (LLAMA, 1, 16000, 1, True, 64, "per_expert"),
    "qwen3": (QWEN3, 2, 4096, 1, False, 16, "per_expert"),
    "qwen3, packed": (QWEN3, 1, 8192, 8, False, 16, "per_expert"),
    "experts, per_expert": (EXPERTS, 1, 4096, 1, False, 8, "per_expert"),
    "experts, shared_outer": (EXPERTS, 1, 4096, 4, False, 8, "shared_outer"),
    "experts, checkpointed": (EXPERTS, 2, 5000, 1, True, 16, "shared_outer"),
    "gemma2": (GEMMA2, 2, 1024, 1, False, 16, "per_expert"),
    "mistral, with a window": (MISTRAL, 1, 4000, 1, False, 16, "per_expert"),
    "llama, float32": (LLAMA, 2, 1024, 1, False, 16, "per_expert"),
    "Qwen3-30B-A3B": (WHOLE, 1, 4096, 4, True, 8, "shared_outer"),
}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """All cases in one process, one after the other."""
    assert torch.cuda.is_available(), 'this test needs a GPU; pytest -m "not gpu" leaves it out'
    cases = []
    for name, (model, rows, positions, documents, checkpointing, rank, layout) in CASES.items():
        dtype, precision = (
            ("float32", "32-true") if "float32" in name else ("bfloat16", "bf16-mixed")
        )
        shape = {
            "num_rows": rows,
            "num_positions": positions,
            "dtype": dtype,
            "precision": precision,
            "checkpointing": checkpointing,
        }
        lora = {"rank": rank, "expert_layout": layout}
        cases.append(
            {"model": model, "lora": lora, "shape": shape, "documents": documents, "device": "cuda"}
        )
    folder = tmp_path_factory.mktemp("cases")
    (folder / "cases.json").write_text(json.dumps(cases))
    environment = {**os.environ, "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
    command = [sys.executable, str(MEASURE), str(folder / "cases.json")]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=500, check=False
    )
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(lines) == len(CASES), done.stderr[-3000:]
    return dict(zip(CASES, lines, strict=True))


@pytest.mark.parametrize("name", CASES)
def test_the_plan_is_within_a_tenth_of_what_a_step_takes(
    name: str, found: dict[str, dict[str, Any]]
) -> None:
    case = found[name]
    assert "error" not in case, case
    print(
        f"{name}: planned {case['planned'] / 1e6:.0f} MB, measured {case['measured'] / 1e6:.0f} MB,"
        f" reserved {case['reserved'] / 1e6:.0f} MB"
    )
    assert case["trainable_planned"] == case["trainable"]
    # a buffer may be of another number format
    assert case["weights_planned"] == pytest.approx(case["weights"], abs=8)
    assert case["planned"] == pytest.approx(case["measured"], rel=0.1)

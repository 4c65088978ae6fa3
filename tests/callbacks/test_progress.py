"""A run whose output is a file says now and then how far it is, and what is left."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from tiny_models import Loader, make_batches, make_datums, make_model, make_trainer, sgd

from lorakit.callbacks import progress
from lorakit.callbacks.progress import StepProgress
from lorakit.lora.inject import inject
from lorakit.lora.spec import LoRASpec
from lorakit.training.module import LoRAModule


def fit(folder: Path, **options: Any) -> None:
    module = LoRAModule(lambda: inject(make_model("qwen3"), LoRASpec(rank=2)), optimizer=sgd(0.1))
    trainer = make_trainer(folder, callbacks=[StepProgress(3)], enable_progress_bar=True, **options)
    trainer.fit(module, Loader(make_batches(make_datums(6), 2, 1)))


def test_a_line_now_and_then(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.0)
    fit(tmp_path)
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("step ")]
    assert [line.split()[1] for line in lines] == ["1/3", "2/3", "3/3"]
    assert all(re.search(r"loss \d+\.\d{4} .* \d:\d\d:\d\d left", line) for line in lines), lines


def test_a_short_run_says_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    fit(tmp_path)
    assert "step " not in capfd.readouterr().err

"""What the strategy is asked before rows are shared."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from lorakit.callbacks import sequence_parallel
from lorakit.data.datamodule import LoRADataModule


@pytest.mark.parametrize(
    ("datamodule", "max_tokens"),
    [(LoRADataModule(path="rows.jsonl", max_tokens=96), 96), (object(), None), (None, None)],
    ids=("ours", "another", "none"),
)
def test_the_length_of_rows_is_what_the_data_module_says(
    monkeypatch: pytest.MonkeyPatch, datamodule: Any, max_tokens: int | None
) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(sequence_parallel, "share_rows", lambda *given: asked.append(given))
    monkeypatch.setattr(sequence_parallel, "base_of", lambda model: model)
    trainer: Any = SimpleNamespace(
        strategy=SimpleNamespace(sequence_parallel=2), datamodule=datamodule
    )
    callback = sequence_parallel.SequenceParallel()
    callback.on_fit_start(trainer, SimpleNamespace(model="model"))
    assert asked == [("model", 2, max_tokens)]
    trainer.strategy.sequence_parallel = 1
    callback.on_fit_start(trainer, SimpleNamespace(model="model"))
    assert len(asked) == 1

"""The program on the page "Use it as a library" is the demo: the same losses, step by step."""

from __future__ import annotations

import csv
import os
import re
import sys
from pathlib import Path

import preloaded
import pytest

from lorakit.runs.folder import History

PAGE = Path(__file__).parents[1] / "docs" / "library.md"


@pytest.mark.parametrize("steps", [6, pytest.param(100, marks=pytest.mark.slow)])
def test_the_program_of_the_page_has_the_losses_of_the_demo(
    steps: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hydra.core.global_hydra import GlobalHydra

    from lorakit.cli.train import main

    (program,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert len([line for line in program.splitlines() if line.strip()]) <= 30
    (tmp_path / "program.py").write_text(program.replace("=100", f"={steps}"), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    path = [str(PAGE.parents[1]), *sys.path]
    # one thread in both, or products are cut another way and round otherwise
    environment = {**os.environ, "PYTHONPATH": ":".join(path), "OMP_NUM_THREADS": "1"}
    preloaded.run(["program.py"], check=True, env=environment)
    with (tmp_path / "log" / "metrics.csv").open() as file:
        ours = [float(row["train/loss"]) for row in csv.DictReader(file) if row["train/loss"]]
    GlobalHydra.instance().clear()
    monkeypatch.setattr(sys, "argv", ["lorakit"])
    main(
        [
            "run=demo",
            f"trainer.max_steps={steps}",
            "trainer.eval_every_steps=1000",
            "data.val_rows=4",
            "trainer.precision=32-true",
            "trainer.threads=1",
            "callbacks.samples=null",
        ]
    )
    demo = [
        record["train/loss"]
        for record in History(tmp_path / "runs/demo").read()
        if "train/loss" in record
    ]
    assert len(ours) == len(demo) == steps
    assert ours == pytest.approx(demo, rel=1e-5)
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()

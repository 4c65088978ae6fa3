"""What each process of a strategy takes: ``memory_worker.py PLAN.json`` trains for some steps and
writes ``rank_N.json``.

Bytes by phase (load, first step, steps), the largest seen: ``anonymous`` is this process's own,
``files`` what it has of files mapped into memory, which all processes of a machine share. A thread
looks every 10 ms.
"""

from __future__ import annotations

import ctypes
import functools
import gc
import json
import sys
import threading
import time
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from tiny_models import FakeTokenizer

from lorakit.data.datamodule import LoRADataModule
from lorakit.lora.inject import inject
from lorakit.lora.spec import LoRASpec
from lorakit.model.load import load_model
from lorakit.strategy.ddp import AdapterDDP
from lorakit.strategy.deepspeed import ZeroStrategy
from lorakit.strategy.world import current_world
from lorakit.training.module import LoRAModule

torch.set_num_threads(1)


def resident() -> dict[str, int]:
    found = {}
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(("RssAnon", "RssFile", "RssShmem")):
            name, size = line.split(":")
            found[name] = int(size.split()[0]) * 1024
    return {"anonymous": found["RssAnon"] + found["RssShmem"], "files": found["RssFile"]}


def give_back() -> None:
    """Give back to the system what nobody uses, which else stays resident."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


class Watch(threading.Thread):
    """The largest of each figure, by phase."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.phase, self.peaks = "load", dict[str, dict[str, int]]()
        self.start()

    def run(self) -> None:
        while True:
            peaks = self.peaks.setdefault(self.phase, {})
            for name, size in resident().items():
                peaks[name] = max(peaks.get(name, 0), size)
            time.sleep(0.01)


class Phases(Callback):
    def __init__(self, watch: Watch) -> None:
        self.watch, self.settled = watch, dict[str, int]()

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.watch.phase = "first step"

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        if trainer.global_step == 1:  # what loading and the strategy's start took is given back
            give_back()
            self.watch.phase = "steps"
        self.settled = resident()


def fit(plan: dict[str, Any], model: str, folder: Path, phases: Phases) -> None:
    name = plan["strategy"]
    strategy: Any = (
        "auto"
        if name == "single"
        else AdapterDDP()
        if name == "ddp"
        else ZeroStrategy(
            stage=int(name[4]),
            bucket_elements=plan["bucket_elements"],
            live_elements=plan["live_elements"],
        )
    )
    datamodule = LoRADataModule(
        path=plan["rows"],
        batch_size=plan["rows_each"],
        epochs=None,
        max_tokens=plan["positions"] + 1,
    )
    datamodule.set_tokenizer(FakeTokenizer())
    module = LoRAModule(
        lambda: inject(load_model(model), LoRASpec(rank=8)),
        optimizer=functools.partial(torch.optim.AdamW, lr=1e-3),
    )
    trainer = L.Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        devices=current_world().local_size,
        strategy=strategy,
        max_steps=3,
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        limit_val_batches=0,
        callbacks=[phases],
    )
    trainer.fit(module, datamodule=datamodule)


def main() -> None:
    plan = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    folder = Path(sys.argv[1]).parent
    # What code takes, and threads and connections, is there before: a small model has been trained.
    fit(plan, plan["small_model"], folder, Phases(Watch()))
    give_back()
    before, watch = resident(), Watch()
    phases = Phases(watch)
    fit(plan, plan["model"], folder, phases)
    found = {"before": before, "peaks": watch.peaks, "settled": phases.settled}
    (folder / f"rank_{current_world().rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()

"""lorakit: LoRA fine-tuning of language models on Lightning, PEFT and Hydra.

Importing this package loads no torch: the names below resolve at first use.
"""

from __future__ import annotations

import importlib
import os
from typing import Any

__version__ = "0.2.0"

# OpenMP (GNU's, torch's on Linux) reads this when torch is loaded. By default a thread that has
# done its part of a product spins for 3 ms, which takes the time of whatever else runs on the
# machine (the client of a server, another process of a run); not to spin at all costs small
# products more than they take. This many turns take some 50 µs.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "5000")

_HOMES = {
    "LoRADataModule": "lorakit.data.datamodule",
    "LoRAModule": "lorakit.training.module",
    "LoRASpec": "lorakit.lora.spec",
    "TrainOnWhat": "lorakit.data.render.renderer",
    "LorakitError": "lorakit.errors",
    "ModelSpec": "lorakit.model.spec",
    "RunConfig": "lorakit.config.schema",
    "RestClient": "lorakit.service.clients",
    "SamplingClient": "lorakit.service.sampling_client",
    "ServiceClient": "lorakit.service.clients",
    "TrainingClient": "lorakit.service.training_client",
    "train": "lorakit.pipeline.fit",
    "types": "lorakit.types",
}
__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'lorakit' has no attribute {name!r}")
    module = importlib.import_module(_HOMES[name])
    return module if name == "types" else getattr(module, name)


def __dir__() -> list[str]:
    return sorted(__all__)

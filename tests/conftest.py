"""What every test shares: scripts/ can be imported, nothing reaches for the network, and caches
go to a folder of their own.
"""

from __future__ import annotations

import importlib
import os
import sys
import tempfile
from pathlib import Path

import hypothesis

# before any test loads torch: it says how OpenMP's threads wait for one another
importlib.import_module("lorakit")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts" / "bench"))

_cache = tempfile.TemporaryDirectory(prefix="lorakit-tests-")  # removed when the process ends
os.environ["HF_DATASETS_CACHE"] = _cache.name
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

# No deadline, since machines are shared; the same examples every time; no folder of hypothesis's
# own in the checkout.
hypothesis.settings.register_profile(
    "lorakit", deadline=None, max_examples=40, derandomize=True, database=None
)
hypothesis.settings.load_profile("lorakit")

"""What each process takes: ZeRO-3 never holds the whole base in one; the other strategies share
one copy on a machine.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny_models import make_model
from transformers import AutoConfig, AutoModelForCausalLM

from lorakit.lora.plan import plan_lora
from lorakit.lora.spec import LoRASpec
from lorakit.model.load import load_skeleton
from lorakit.planner.memory import Settings, memory_of
from lorakit.planner.trace import StepShape, trace_step

pytestmark = pytest.mark.slow  # 967 MB, read by up to four processes: three minutes
HERE = Path(__file__).parent
POSITIONS, BUCKET, LIVE = 128, 5_000_000, 20_000_000
Figures = dict[str, Any]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama of 242 million parameters in float32, and rows for it."""
    folder, generator = tmp_path_factory.mktemp("base"), random.Random(0)
    config = AutoConfig.for_model(
        "llama",
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=20,
        num_attention_heads=16,
        num_key_value_heads=4,
        vocab_size=8000,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "model")
    make_model("llama").save_pretrained(folder / "small_model")
    with (folder / "rows.jsonl").open("w") as file:
        for _ in range(64):
            tokens = [generator.randrange(3, 64) for _ in range(POSITIONS + 1)]
            file.write(json.dumps({"tokens": tokens, "weights": [1.0] * len(tokens)}) + "\n")
    return folder


def run(base: Path, folder: Path, strategy: str, world: int) -> list[Figures]:
    """Train for three steps; return each process's figures, in bytes above what it had before."""
    folder.mkdir()
    job = {
        "strategy": strategy,
        "model": str(base / "model"),
        "small_model": str(base / "small_model"),
        "rows": str(base / "rows.jsonl"),
        "rows_each": 1,
        "positions": POSITIONS,
        "bucket_elements": BUCKET,
        "live_elements": LIVE,
    }
    (folder / "plan.json").write_text(json.dumps(job))
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "MALLOC_MMAP_THRESHOLD_": "131072",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    torchrun = (
        ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world)]
        if world > 1
        else []
    )
    command = [sys.executable, *torchrun, str(HERE / "memory_worker.py"), str(folder / "plan.json")]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = []
    for rank in range(world):
        figures = json.loads((folder / f"rank_{rank}.json").read_text())
        before = figures["before"]
        above = {
            phase: {name: size - before[name] for name, size in peak.items()}
            for phase, peak in figures["peaks"].items()
        }
        found.append(
            {
                **above,
                "settled": {name: size - before[name] for name, size in figures["settled"].items()},
            }
        )
        print(
            f"{strategy}, {world} processes, rank {rank}:",
            {key: {n: round(s / 1e6) for n, s in v.items()} for key, v in found[-1].items()},
        )
    return found


def test_zero3_never_holds_the_whole_base_in_one_process(base: Path, tmp_path: Path) -> None:
    size = sum(file.stat().st_size for file in (base / "model").glob("*.safetensors"))
    found = {world: run(base, tmp_path / str(world), "zero3", world) for world in (1, 2, 4)}
    settled = {
        world: max(one["settled"]["anonymous"] for one in ranks) for world, ranks in found.items()
    }
    # Between the steps a process has its share: half of the base less with twice as many, then a
    # quarter.
    assert settled[1] - settled[2] == pytest.approx(size / 2, rel=0.15)
    assert settled[2] - settled[4] == pytest.approx(size / 4, rel=0.15)
    for phase in ("load", "steps"):
        assert all(one[phase]["anonymous"] < size for one in found[4]), phase
    # nothing stays mapped
    assert all(one["steps"]["files"] < 0.1 * size for ranks in found.values() for one in ranks)
    # On the machine, while it is loaded: the parts of all processes, and the largest tensor in each
    # of them.
    for ranks in found.values():
        assert sum(one["load"]["anonymous"] for one in ranks) < 1.1 * size + len(ranks) * 0.1 * size
    own = run(base, tmp_path / "single", "single", 1)[0]
    planned = _plan(base)
    for world, ranks in found.items():
        memory = memory_of(
            "zero3",
            world,
            planned,
            Settings(accumulates=False, is_cuda=False, bucket_elements=BUCKET, live_elements=LIVE),
        )
        print(f"zero3 on {world}: planned {memory.total / 1e6:.0f} MB, {vars(memory)}")
        most = max(one["steps"]["anonymous"] for one in ranks)
        # Some 65 MB of it are no tensors, with any number of processes: a tenth of a base as small
        # as this one.
        assert memory.total == pytest.approx(most - 65e6, rel=0.1)
    assert own["settled"]["files"] > 0.95 * size


def test_processes_of_a_machine_share_one_copy_of_the_base(base: Path, tmp_path: Path) -> None:
    """It is mapped from its file, the same pages in each: on the machine there is one, and 1.1
    of it are the bar.
    """
    size = sum(file.stat().st_size for file in (base / "model").glob("*.safetensors"))
    for strategy in ("ddp", "zero1", "zero2"):
        ranks = run(base, tmp_path / strategy, strategy, 2)
        assert all(one["steps"]["files"] > 0.95 * size for one in ranks)
        assert all(
            one[phase]["anonymous"] < 0.4 * size for one in ranks for phase in ("load", "steps")
        )


def _plan(base: Path) -> Any:
    import functools

    import torch

    skeleton = load_skeleton(str(base / "model"))
    spec = plan_lora(skeleton, LoRASpec(rank=8)).spec
    shape = StepShape(
        num_rows=1, num_positions=POSITIONS, dtype="float32", precision="32-true", device="cpu"
    )
    return trace_step(skeleton, spec, shape, functools.partial(torch.optim.AdamW, lr=1e-3))

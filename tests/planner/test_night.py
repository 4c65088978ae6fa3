"""README's table "What trains in a night" is what the planner says of the real shapes, and what
its own rates come to.
"""

from __future__ import annotations

import re
from typing import NamedTuple

import pytest
from chat_models import config_of, shapes
from program import REPOSITORY

from lorakit.lora.plan import plan_lora
from lorakit.pipeline.build import build_step_plan

NIGHT_SECONDS = 8 * 3600


class Entry(NamedTuple):
    """A row of the table."""

    machine: str
    model: str
    gigabytes: float
    operations: float  # per token
    tokens: float

    @property
    def has_gpu(self) -> bool:
        return "GPU of" in self.machine

    @property
    def memory(self) -> int:
        """GB of the machine."""
        return int(re.search(r"(\d+) GB", self.machine)[1])


def read_table() -> tuple[list[Entry], str]:
    """The rows, and the section that they stand in."""
    (section,) = re.findall(
        r"### What trains in a night\n(.*?)\n## ",
        (REPOSITORY / "README.md").read_text(encoding="utf-8"),
        re.DOTALL,
    )
    found: list[Entry] = []
    for line in section.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) != 5 or not (said := re.fullmatch(r"([\d.]+) GB", cells[2])):
            continue
        operations = float(re.fullmatch(r"([\d.]+) x 10⁹", cells[3])[1]) * 1e9
        tokens = float(re.match(r"([\d.]+) million", cells[4])[1]) * 1e6
        found.append(
            Entry(cells[0] or found[-1].machine, cells[1], float(said[1]), operations, tokens)
        )
    return found, section


TABLE, SECTION = read_table()


def test_the_table_has_the_machines_that_people_have() -> None:
    assert [(entry.has_gpu, entry.memory) for entry in TABLE] == [
        *((False, 8), (False, 8), (False, 16), (True, 24), (True, 24), (True, 80), (True, 80))
    ]


@pytest.mark.parametrize("entry", TABLE, ids=lambda entry: f"{entry.model} in {entry.memory} GB")
def test_tokens_in_a_night_follow_from_the_rates_that_are_named(entry: Entry) -> None:
    """Two cores: what was measured. GPUs: the share of their data sheet's operations that the
    section names.
    """
    cores = float(re.search(r"(\d+) GFLOP/s", SECTION)[1]) * 1e9
    share, small, large = map(
        float, re.search(r"assume (\d+) % of (\d+) \(24 GB\) and (\d+) TFLOP/s", SECTION).groups()
    )
    rate = share / 100 * (small if entry.memory == 24 else large) * 1e12 if entry.has_gpu else cores
    # of two digits
    assert entry.tokens == pytest.approx(NIGHT_SECONDS * rate / entry.operations, rel=0.06)


@pytest.mark.slow
@pytest.mark.parametrize(
    "entry",
    TABLE,
    ids=lambda entry: f"{entry.model} in {entry.memory} GB",
)
def test_memory_and_operations_are_what_the_planner_says(entry: Entry) -> None:
    length, rows = (4096, 2 if entry.model == "14B" else 1) if entry.has_gpu else (1024, 2)
    config = config_of(
        "lora.rank=16",
        "trainer.activation_checkpointing=true",
        "trainer.accumulate_grad_batches=4",
        f"data.max_tokens={length}",
        f"data.pack_tokens={length}",
        f"data.tokens_per_batch={length * rows}",
    )
    skeleton = shapes(entry.model)
    accelerator = "cuda" if entry.has_gpu else "cpu"
    step = build_step_plan(
        config,
        skeleton,
        plan_lora(skeleton, config.lora),
        accelerator=accelerator,
        precision="bf16-mixed",
    )
    total = step.memory("single", 1).total
    assert total / 1e9 == pytest.approx(entry.gigabytes, rel=0.02)
    assert step.trace.num_flops / step.trace.num_tokens == pytest.approx(entry.operations, rel=0.02)
    # a laptop leaves a quarter to others
    assert total < (1 if entry.has_gpu else 0.75) * entry.memory * 1e9

"""A vision tower under every strategy: where only some processes have an image, nobody hangs and
no loss changes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from test_strategies import launch
from tiny_models import relative_l2
from vision import draw_image, save_vl_model

# of rows in their order, two at a time
HAS_IMAGE = [True, False, False, True, False, False, True, True]


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shared")
    save_vl_model(folder / "model")
    with (folder / "rows.jsonl").open("w") as file:
        for number, has_image in enumerate(HAS_IMAGE):
            draw_image(number, (24 + 8 * (number % 3), 32)).save(folder / f"{number}.png")
            parts: list[dict[str, Any]] = (
                [{"type": "image", "image": f"{number}.png"}] if has_image else []
            )
            user = {
                "role": "user",
                "content": [*parts, {"type": "text", "text": f"Which, {number}?"}],
            }
            file.write(
                json.dumps(
                    {"messages": [user, {"role": "assistant", "content": "abc"[: 1 + number % 3]}]}
                )
                + "\n"
            )
    return folder


def fits(world: int) -> dict[str, dict[str, Any]]:
    same = {
        "steps": 4,
        "batch_size": 1,
        "accumulate": 2 // world,
        "shuffle": False,
        "max_tokens": 128,
    }
    return {
        "frozen": {"optimizer": "sgd", **same},
        "trained": {"optimizer": "sgd", "vision": True, **same},
        "adamw": {"optimizer": "adamw", "vision": True, **same},
    }


@pytest.fixture(scope="module")
def single(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return launch(
        tmp_path_factory.mktemp("single") / "run", shared, "single", 1, fits(1), has_images=True
    )


@pytest.mark.parametrize(
    "strategy",
    ["zero2", *(pytest.param(name, marks=pytest.mark.slow) for name in ("ddp", "zero1", "zero3"))],
)
def test_a_batch_without_an_image_neither_hangs_nor_changes_the_loss(
    strategy: str, shared: Path, single: Any, tmp_path: Path
) -> None:
    found = launch(tmp_path / "run", shared, strategy, 2, fits(2), has_images=True)
    for name in fits(2):
        for step, figures in single[name]["steps"].items():
            # AdamW makes whole steps of gradients that are all rounding.
            rel = 2e-5 if name != "adamw" else 1e-3
            assert found[name]["steps"][step]["train/loss"] == pytest.approx(
                figures["train/loss"], rel=rel
            ), (name, step)
        start, end, expected = found[name]["start"], found[name]["end"], single[name]["end"]
        assert start.keys() == expected.keys()
        assert relative_l2(end, expected) < (1e-5 if name != "adamw" else 0.02)
        towers = [key for key in end if "visual" in key]
        assert bool(towers) == (name != "frozen")
        assert all(not torch.equal(start[key], end[key]) for key in towers if "lora_B" in key)

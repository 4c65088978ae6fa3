"""The commands on rows with images: train, evaluate, sample, show, merge, one after the other as
a user would.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image
from transformers import AutoModelForImageTextToText

from lorakit.data.read.sources import BUNDLED

Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def scan(workplace: Path) -> tuple[str, str]:
    """A file with one held-out scan, and the digit that it shows."""
    row = json.loads((BUNDLED / "digits" / "heldout.jsonl").read_text().splitlines()[0])
    url = row["messages"][0]["content"][0]["image"]
    (workplace / "scan.png").write_bytes(base64.b64decode(url.partition(",")[2]))
    return "scan.png", row["messages"][1]["content"]


def test_from_rows_with_images_to_a_merged_model(
    workplace: Path, lorakit: Call, scan: tuple[str, str]
) -> None:
    assert Image.open(scan[0]).size == (8, 8)
    settings = (
        "experiment=vlm_digits",
        "run=digits",
        "trainer.max_steps=2",
        "trainer.eval_every_steps=2",
        "data.batch_size=8",
    )
    code, out, err = lorakit(
        "train", *settings, "data.val_rows=8", "lora.rank=4", "data.min_pixels=1024"
    )
    assert code == 0, err
    assert (
        "1,400 images of 22,400 tokens" in out
        and "8 images of 128 tokens" in out
        and "merger" in out
        and "vision" in out
    )
    assert (workplace / "runs/digits/adapter/adapter_model.safetensors").stat().st_size < 3e6
    samples = [
        json.loads(line)
        for line in (workplace / "runs/digits/samples.jsonl").read_text().splitlines()
    ]
    assert len(samples) == 4 and all("<|image_pad|>" in sample["prompt"] for sample in samples)
    code, out, err = lorakit("evaluate", "digits", "--limit", "8", "--json", "figures.json")
    assert code == 0, err
    assert json.loads(Path("figures.json").read_text())["rows"] == 8
    code, out, err = lorakit(
        "sample", "digits", "--image", scan[0], "--max-tokens", "4", "--", "which digit?"
    )
    assert code == 0 and out.strip(), err
    code, _, err = lorakit("sample", "digits", "--image", "none.png", "--", "which digit?")
    assert code == 2 and "none.png" in err
    code, out, err = lorakit("merge", "digits", "--out", "merged", "--dtype", "float32")
    assert code == 0, err
    AutoModelForImageTextToText.from_pretrained("merged")
    assert (
        json.loads((workplace / "merged/preprocessor_config.json").read_text())["size"][
            "shortest_edge"
        ]
        == 1024
    )


def test_a_conversation_that_begins_again_shows_its_image_again(
    workplace: Path, lorakit: Call, scan: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = (
        "experiment=vlm_digits",
        "run=digits",
        "trainer.max_steps=1",
        "trainer.eval_every_steps=null",
        "data.batch_size=2",
    )
    code, _, err = lorakit(
        "train", *settings, "data.val_rows=2", "lora.rank=1", "callbacks.samples=null"
    )
    assert code == 0, err
    typed = iter(["which digit?", "and now?", "/clear", "which digit?"])

    def type_line(prompt: str) -> str:
        if (line := next(typed, None)) is None:
            raise EOFError
        return line

    monkeypatch.setattr("builtins.input", type_line)
    monkeypatch.setattr("sys.stdin", type("Terminal", (), {"isatty": lambda self: True})())
    code, out, err = lorakit("sample", "digits", "--image", scan[0], "--max-tokens", "4")
    assert code == 0, err
    first, _, again = out.splitlines()[-3:]
    assert first == again


def test_show_names_images_and_a_model_of_text_refuses_them(workplace: Path, lorakit: Call) -> None:
    code, out, err = lorakit("show", "-n", "1", "experiment=vlm_digits")
    assert code == 0, err
    assert "which digit?" in out and "<|image_pad|>" in out
    code, _, err = lorakit("show", "experiment=vlm_digits", "model.path=tiny")
    assert code == 2 and "is a model of text, but rows have images" in err

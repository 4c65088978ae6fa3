"""A run on several sources of rows: figures of each, in one process and in two, and the commands
that follow it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from program import start
from small import SMALL

from lorakit.runs.folder import History

Call = Callable[..., tuple[int, str, str]]
SETTINGS = (
    *(
        "model.path=tiny",
        "data.val_fraction=0.2",
        "data.max_tokens=64",
        "data.packing=true",
        "data.batch_size=1",
    ),
    *(
        "trainer.accumulate_grad_batches=2",
        "optim.lr=1e-3",
        "logger=none",
        "data.window_rows=64",
        "lora.rank=4",
    ),
    *("trainer.eval_every_steps=2", "callbacks=none", "trainer.max_steps=4", "data.epochs=null"),
)


def write_sources(folder: Path) -> str:
    """Two files, of which the second has other columns; returns the setting."""
    first = [{"prompt": f"say {i}:", "completion": f" {i * i}."} for i in range(30)]
    second = [
        {"question": f"colour of {i}?", "answer": " blue is the answer.", "id": i}
        for i in range(20)
    ]
    for name, rows in (("short", first), ("long", second)):
        (folder / f"{name}.jsonl").write_text(
            "".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8"
        )
    columns = "columns: {prompt: question, completion: answer}"
    return f"data.sources=[short.jsonl, {{path: long.jsonl, weight: 0.5, name: blue, {columns}}}]"


def figures_of(run: Path) -> list[dict[str, float]]:
    return [record for record in History(run).read() if "train/loss" in record]


def test_loss_and_share_are_logged_for_each_source_and_add_up(
    workplace: Path, lorakit: Call
) -> None:
    code, out, err = lorakit("train", write_sources(workplace), *SETTINGS, "run=mixed")
    assert code == 0, err
    assert "short: 2" in out and "blue: " in out and "0.5 times an epoch" in out
    records = figures_of(workplace / "runs/mixed")
    assert len(records) == 4
    for record in records:
        shares = [record[f"train/share/{name}"] for name in ("short", "blue")]
        losses = [record.get(f"train/loss/{name}", 0.0) for name in ("short", "blue")]
        assert sum(shares) == pytest.approx(1.0, abs=1e-6)
        assert sum(a * b for a, b in zip(shares, losses, strict=True)) == pytest.approx(
            record["train/loss"], rel=1e-5
        )
    held_out = [
        record for record in History(workplace / "runs/mixed").read() if "val/loss" in record
    ]
    assert {"val/loss/short", "val/loss/blue"} <= held_out[-1].keys()
    code, out, err = lorakit("evaluate", "mixed", "--no-samples")
    assert code == 0 and json.loads(out)["loss"] == pytest.approx(
        held_out[-1]["val/loss"], rel=1e-3
    ), err


@pytest.mark.slow
def test_two_processes_log_the_same_of_each_source(workplace: Path) -> None:
    sources = write_sources(workplace)
    runs: dict[str, list[dict[str, Any]]] = {}
    for name, options in (
        ("one", ["trainer.devices=1"]),
        ("two", ["trainer.devices=2", "trainer.accumulate_grad_batches=1"]),
    ):
        arguments = [*SETTINGS, *options, f"run={name}", "trainer.threads=1"]
        process = start("train", sources, *arguments, cwd=workplace)
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
        runs[name] = figures_of(workplace / "runs" / name)
    for one, two in zip(runs["one"], runs["two"], strict=True):
        names = [name for name in one if name.startswith(("train/loss", "train/share", "val/loss"))]
        assert len(names) >= 4
        for name in names:
            assert two[name] == pytest.approx(one[name], rel=1e-4), name


def test_a_run_with_a_template_of_its_own_keeps_it_for_sampling_and_merging(
    workplace: Path, lorakit: Call
) -> None:
    row = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
    (workplace / "chat.jsonl").write_text((json.dumps(row) + "\n") * 8, encoding="utf-8")
    (workplace / "mine.jinja").write_text(
        "{% for message in messages %}{{ '<' + message.role + '>' + message.content + '<|im_end|>'"
        " }}{% endfor %}{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}",
        encoding="utf-8",
    )
    code, _, err = lorakit(
        "train",
        "model.path=tiny",
        "data.path=chat.jsonl",
        "data.chat_template=mine.jinja",
        *SMALL,
        "trainer.max_steps=1",
        "run=chat",
        "logger=none",
        "optim.lr=1e-3",
        "data.val_rows=null",
        "trainer.eval_every_steps=null",
    )
    assert code == 0, err
    (workplace / "mine.jinja").unlink()  # the run has it
    code, out, err = lorakit("sample", "chat", "--max-tokens", "4", "--", "q")
    assert code == 0, err
    code, out, err = lorakit("evaluate", "chat", "--data", "chat.jsonl", "--no-samples")
    assert code == 0 and json.loads(out)["rows"] == 8, err
    code, out, err = lorakit("merge", "chat", "--out", "merged")
    assert code == 0, err
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained("merged")
    assert (
        tokenizer.apply_chat_template([{"role": "user", "content": "q"}], tokenize=False)
        == "<user>q<|im_end|>"
    )


def test_examples_of_each_source_are_shown(workplace: Path, lorakit: Call) -> None:
    code, out, err = lorakit(
        "show", "-n", "2", write_sources(workplace), *SETTINGS[:1], "data.max_tokens=64"
    )
    assert code == 0, err
    for line in ("short.jsonl:1 ", "short.jsonl:2 ", "long.jsonl:1 ", "long.jsonl:2 "):
        assert line in out, out
    assert ".jsonl:3 " not in out

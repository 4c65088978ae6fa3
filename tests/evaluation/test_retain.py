"""`eval.retain_path`: the loss on unrelated text before and after, and base beside adapter in
`lorakit evaluate`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from program import start
from small import SMALL

from lorakit.model.load import load_model, load_tokenizer
from lorakit.runs.folder import History

Call = Callable[..., tuple[int, str, str]]
TEXTS = [f"Unrelated text, number {i}: {'words ' * (i % 4)}end." for i in range(12)]
SETTINGS = (
    "eval.retain_path=unrelated.jsonl",
    "eval.retain_rows=6",
    "trainer.max_steps=4",
    "logger=none",
    *SMALL,
)


@pytest.fixture
def unrelated(workplace: Path) -> Path:
    (workplace / "unrelated.jsonl").write_text(
        "".join(json.dumps({"text": text}) + "\n" for text in TEXTS), encoding="utf-8"
    )
    return workplace


def plain_loss() -> float:
    """The base's loss per token on the first six texts, by transformers alone."""
    model, tokenizer = load_model("tiny", dtype="float32"), load_tokenizer("tiny")
    loss = weight = 0.0
    for text in TEXTS[:6]:
        tokens = torch.tensor([tokenizer(text)["input_ids"] + [tokenizer.eos_token_id]])
        with torch.no_grad():
            logprobs = model(tokens).logits[0, :-1].log_softmax(-1)
        loss -= float(logprobs.gather(1, tokens[0, 1:, None]).sum())
        weight += tokens.shape[1] - 1
    return loss / weight


def test_the_loss_on_unrelated_text_is_told_before_and_after(
    unrelated: Path, lorakit: Call
) -> None:
    code, out, err = lorakit("train", *SETTINGS, "run=one", "trainer.precision=32-true")
    assert code == 0, err
    records = [
        record for record in History(unrelated / "runs/one").read() if "retain/loss" in record
    ]
    # at each evaluation, and the last one only once
    assert [record["step"] for record in records] == [2, 4]
    assert all(
        record["retain/base_loss"] == pytest.approx(plain_loss(), abs=1e-5) for record in records
    )
    before, after = records[-1]["retain/base_loss"], records[-1]["retain/loss"]
    assert after != before
    assert (
        f"unrelated text unrelated.jsonl: loss {before:.4f} before, {after:.4f} after"
        f" ({after - before:+.4f})" in out
    )
    code, out, err = lorakit(
        "evaluate", "one", "--data", "unrelated.jsonl", "--limit", "6", "--no-samples"
    )
    figures = json.loads(out)
    assert code == 0 and figures["loss"] == pytest.approx(after, rel=1e-4)
    assert figures["base"]["loss"] == pytest.approx(before, rel=1e-5)


def test_rows_behind_those_that_are_taken_are_not_read(unrelated: Path, lorakit: Call) -> None:
    rows = [{"prompt": "a", "completion": "b"}] * 3 + [{"prompt": "long " * 400, "completion": "x"}]
    (unrelated / "unrelated.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, _, err = lorakit(
        "train", *SETTINGS, "run=few", "eval.retain_rows=3", "trainer.max_steps=1"
    )
    assert code == 0, err


def test_before_means_the_base_itself_where_a_run_begins_with_an_adapter(
    unrelated: Path, lorakit: Call
) -> None:
    assert (
        lorakit("train", *SETTINGS, "run=first", "trainer.precision=32-true", "optim.lr=1e-2")[0]
        == 0
    )
    code, _, err = lorakit(
        "train",
        *SETTINGS,
        "run=second",
        "lora.init_from=runs/first/adapter",
        "optim.lr=0",
        "trainer.precision=32-true",
    )
    assert code == 0, err
    last = [
        [r for r in History(unrelated / "runs" / name).read() if "retain/loss" in r][-1]
        for name in ("first", "second")
    ]
    assert last[1]["retain/base_loss"] == pytest.approx(plain_loss(), abs=1e-5)
    assert (
        last[1]["retain/loss"]
        == pytest.approx(last[0]["retain/loss"], rel=1e-2)
        != last[1]["retain/base_loss"]
    )


@pytest.mark.parametrize(
    ("rows", "settings", "words"),
    [
        (None, (), "absent.jsonl: no such file"),
        ('{"chosen": "a", "rejected": "b"}', (), "pairs have no loss of their own"),
        ('{"x": 1}', (), "columns not recognised"),
        ('{"text": "a b"}', ("eval.retain_rows=0",), "eval.retain_rows=0 must be at least 1"),
        ('{"text": "a b"}', ("eval.retain_rwos=1",), "did you mean eval.retain_rows?"),
    ],
    ids=str,
)
def test_rows_that_cannot_be_used_stop_a_run_before_it_begins(
    workplace: Path, lorakit: Call, rows: str | None, settings: tuple[str, ...], words: str
) -> None:
    if rows:
        (workplace / "absent.jsonl").write_text(rows + "\n")
    code, _, err = lorakit(
        "train", "eval.retain_path=absent.jsonl", "trainer.max_steps=1", *SMALL, *settings
    )
    assert code == 2 and words in err, err
    assert not (workplace / "runs").exists()


def test_base_and_adapter_stand_side_by_side(unrelated: Path, lorakit: Call) -> None:
    assert lorakit("train", "run=two", "trainer.max_steps=2", "logger=none", *SMALL)[0] == 0
    code, out, err = lorakit("evaluate", "two", "--max-tokens", "6", "--answers", "answers.jsonl")
    assert code == 0, err
    figures = json.loads(out)
    assert figures.keys() >= {"loss", "perplexity", "exact_match", "base"} and figures[
        "base"
    ].keys() >= {"loss", "exact_match"}
    answers = [json.loads(line) for line in (unrelated / "answers.jsonl").read_text().splitlines()]
    assert len(answers) == figures["rows"] == 4
    assert all(answer.keys() == {"prompt", "expected", "answer", "base"} for answer in answers)
    code, out, _ = lorakit("evaluate", "two", "--no-samples", "--no-base")
    assert (
        code == 0 and "base" not in json.loads(out) and json.loads(out)["loss"] == figures["loss"]
    )


@pytest.mark.slow
def test_all_processes_measure_it_together(unrelated: Path) -> None:
    found = []
    for name, options in (
        ("one", ["trainer.devices=1"]),
        ("three", ["trainer.devices=2", "strategy=zero3"]),
    ):
        arguments = (
            *SETTINGS,
            *options,
            f"run={name}",
            "trainer.threads=1",
            "trainer.precision=32-true",
            "optim.lr=0",
        )
        process = start("train", *arguments, cwd=unrelated)
        _, errors = process.communicate(timeout=240)
        assert process.returncode == 0, errors
        found += [
            record
            for record in History(unrelated / "runs" / name).read()
            if "retain/loss" in record
        ]
    assert len(found) == 4
    for record in found:
        assert (
            record["retain/loss"]
            == pytest.approx(plain_loss(), abs=1e-4)
            == record["retain/base_loss"]
        )

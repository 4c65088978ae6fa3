"""`lorakit evaluate tasks=…` asks the real lm-evaluation-harness, on a task of one's own."""

from __future__ import annotations

import builtins
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from program import start
from small import SMALL

from lorakit.model.load import load_model, load_tokenizer
from lorakit.weights.merge import attach

Call = Callable[..., tuple[int, str, str]]
WORDS = ["hello", "world", "apple", "under", "stone", "river", "amber", "quick"]
TASK = """
task: which_way
dataset_path: json
dataset_kwargs:
  data_files: {{test: {file}}}
test_split: test
output_type: multiple_choice
doc_to_text: "English: {{{{word}}}}\\nPig Latin:"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: 0
metric_list:
  - metric: acc
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run called `it`, and a folder `tasks` with a task of eight rows: pig latin, or the same
    letters turned round.
    """
    folder = tmp_path_factory.mktemp("harness")
    settings = (
        *SMALL,
        "lora.rank=16",
        "optim.lr=1e-2",
        "trainer.max_steps=12",
        "trainer.eval_every_steps=12",
    )
    process = start("train", "run=it", *settings, cwd=folder)
    _, err = process.communicate()
    assert process.returncode == 0, err
    rows = []
    for word in WORDS:
        right = (
            word + "-way"
            if word[0] in "aeiou"
            else word.lstrip("bcdfghjklmnpqrstvwxyz") + "-" + word[0] + "ay"
        )
        rows.append({"word": word, "choices": [right, right[::-1]]})
    (folder / "tasks").mkdir()
    file = folder / "tasks/rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "tasks/which_way.yaml").write_text(TASK.format(file=file))
    return folder


@pytest.fixture
def task(folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The rows of the task, in the folder of which we are."""
    monkeypatch.chdir(folder)
    return [json.loads(line) for line in (folder / "tasks/rows.jsonl").read_text().splitlines()]


def accuracy(model: Any, rows: list[dict[str, Any]]) -> float:
    """By hand: which of two continuations is likelier."""
    tokenizer, right = load_tokenizer("tiny"), 0
    for row in rows:
        prompt = tokenizer(f"English: {row['word']}\nPig Latin:")["input_ids"]
        scores = []
        for choice in row["choices"]:
            tokens = tokenizer(f"English: {row['word']}\nPig Latin: {choice}")["input_ids"]
            with torch.no_grad():
                logprobs = model(torch.tensor([tokens])).logits[0].log_softmax(-1)
            scores.append(
                sum(float(logprobs[i - 1, tokens[i]]) for i in range(len(prompt), len(tokens)))
            )
        right += scores[0] > scores[1]
    return right / len(rows)


@pytest.mark.slow
def test_a_task_has_the_figures_of_adapter_and_base(
    task: list[dict[str, Any]], folder: Path, lorakit: Call
) -> None:
    code, out, err = lorakit(
        "evaluate", "it", "tasks=which_way", "--tasks-path", "tasks", "json=f.json"
    )
    assert code == 0, err
    figures = json.loads((folder / "f.json").read_text())
    assert json.loads(out[out.index("{") :]) == figures and "loss" not in figures
    base = load_model("tiny")
    expected = accuracy(base, task)
    assert figures["base"]["tasks"]["which_way"]["acc"] == expected
    trained = accuracy(
        attach(base, next((folder / "runs/it/checkpoints").glob("step-000012"))), task
    )
    assert figures["tasks"]["which_way"]["acc"] == trained and trained > expected
    code, out, err = lorakit(
        "evaluate",
        "it",
        "tasks=which_way",
        "--tasks-path",
        "tasks",
        "data=pig_latin/heldout",
        "limit=4",
        "--no-samples",
        "--no-base",
    )
    assert code == 0, err
    both = json.loads(out[out.index("{") :])
    assert (
        both["rows"] == 4
        and both["loss"] > 0
        and "which_way" in both["tasks"]
        and "base" not in both
    )


def test_what_cannot_be_asked_is_one_message(
    task: list[dict[str, Any]], folder: Path, lorakit: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, _, err = lorakit("evaluate", "it", "tasks=which_way,wich", "--tasks-path", "tasks")
    assert code == 2 and "no task wich; " in err and "which_way," not in err.split("no task")[1], (
        err
    )
    (folder / "lost").mkdir()
    (folder / "lost/lost.yaml").write_text(
        TASK.format(file=folder / "gone.jsonl").replace("which_way", "lost")
    )
    code, _, err = lorakit("evaluate", "it", "tasks=lost", "--tasks-path", "lost")
    assert code == 2 and "gone.jsonl" in err and "Traceback" not in err, err
    code, _, err = lorakit("evaluate", "it", "--chat")
    assert code == 2 and "no effect without tasks" in err
    real = builtins.__import__

    def without_it(name: str, *args: Any, **options: Any) -> Any:
        if name.startswith("lm_eval"):
            raise ImportError("No module named 'lm_eval'")
        return real(name, *args, **options)

    monkeypatch.setattr(builtins, "__import__", without_it)
    code, _, err = lorakit("evaluate", "it", "tasks=arc_easy")
    assert code == 2 and "pip install lm-eval" in err

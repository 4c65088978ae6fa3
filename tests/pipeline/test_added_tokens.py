"""A run with new tokens: its adapter, samples, merge and export carry tokenizer and rows."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
import yaml
from program import start
from safetensors.torch import load_file
from small import SMALL
from transformers import AutoModelForCausalLM, AutoTokenizer

from lorakit.lora.state import adapters_off
from lorakit.model.load import load_model
from lorakit.weights.merge import attach

Call = Callable[..., tuple[int, str, str]]
TOKENS = ["<way>", "<ay>"]
SETTINGS = (
    *(
        "data.path=rows.jsonl",
        "model.path=tiny",
        'model.add_tokens=["<way>","<ay>"]',
        "optim.lr=1e-2",
        "trainer.max_steps=30",
    ),
    *("data.batch_size=8", "data.epochs=null", "callbacks.samples=null", "lora.rank=4"),
)


def write_rows(folder: Path) -> None:
    words = ["apple", "stone", "under", "river", "amber", "quick", "other", "water"]
    rows = [
        {"prompt": f"{word}:", "completion": f" {'<way>' if word[0] in 'aeiou' else '<ay>'}"}
        for word in words
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokens")
    write_rows(folder)
    process = start("train", "run=it", *SETTINGS, cwd=folder)
    out, err = process.communicate()
    assert process.returncode == 0, err
    assert "new tokens" in out
    return folder


def test_the_run_has_learnt_its_tokens_and_trains_no_other_row(
    trained: Path, lorakit: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(trained)
    for word, expected in (("apple", "<way>"), ("river", "<ay>")):
        code, out, err = lorakit(
            "sample", "it", "--max-tokens", "2", "--temperature", "0", "--", f"{word}:"
        )
        assert code == 0 and out.strip().endswith(expected), (out, err)
    tensors = load_file(trained / "runs/it/adapter/adapter_model.safetensors")
    rows = {name: tensor for name, tensor in tensors.items() if "lora_" not in name}
    assert [tuple(tensor.shape) for tensor in rows.values()] == [
        (2, 128)
    ] and "trainable_tokens_delta" in next(iter(rows))
    tokenizer = AutoTokenizer.from_pretrained(trained / "runs/it/adapter")
    ids = tokenizer.convert_tokens_to_ids(TOKENS)
    config = json.loads((trained / "runs/it/adapter/adapter_config.json").read_text())
    assert (
        config["trainable_token_indices"] == ids and tokenizer("a<way>")["input_ids"][-1] == ids[0]
    )


def test_merge_and_export_carry_tokenizer_and_rows(
    trained: Path, lorakit: Call, tmp_path: Path
) -> None:
    there = ("it", "--runs", str(trained / "runs"))
    for command in (("merge", *there, "--dtype", "float32"), ("export", *there, "format=peft")):
        code, _, err = lorakit(*command, "--out", str(tmp_path / command[0]))
        assert code == 0, err
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merge")
    assert tokenizer.get_vocab() == AutoTokenizer.from_pretrained(tmp_path / "export").get_vocab()
    probe = torch.tensor([tokenizer("apple: <way> <ay> stone:")["input_ids"]])
    ours = attach(
        load_model("tiny", add_tokens=TOKENS),
        sorted((trained / "runs/it/checkpoints").iterdir())[-1],
    )
    plain = AutoModelForCausalLM.from_pretrained(load_model("tiny").config._name_or_path)
    assert len(tokenizer) <= len(plain.get_input_embeddings().weight)  # it has rows to spare
    with torch.no_grad():
        expected = ours(probe).logits
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merge")(probe).logits
        exported = peft.PeftModel.from_pretrained(plain, tmp_path / "export").eval()(probe).logits
        with adapters_off(ours):
            base = ours(probe).logits
    assert (merged - expected).abs().max() < 1e-4 * expected.abs().max()
    assert (exported - expected).abs().max() < 0.05 * (base - expected).abs().max()  # in bf16
    code, _, err = lorakit("export", *there, "format=vllm", "--out", str(tmp_path / "vllm"))
    assert code == 2 and "trainable_token_indices, which vLLM does not read" in err
    card = (tmp_path / "export/README.md").read_text()
    assert yaml.safe_load(card.split("```yaml\n")[1].split("```")[0])["model"] == {
        "add_tokens": TOKENS
    }


TASK = """
task: ending
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{prompt}}}}"
doc_to_choice: [" <way>", " <ay>"]
doc_to_target: "{{{{target}}}}"
metric_list: [{{metric: acc}}]
"""


def test_the_harness_asks_a_run_with_new_tokens(
    trained: Path, lorakit: Call, tmp_path: Path
) -> None:
    rows = [json.loads(line) for line in (trained / "rows.jsonl").read_text().splitlines()]
    asked = [{"prompt": row["prompt"], "target": int(row["completion"] == " <ay>")} for row in rows]
    (tmp_path / "asked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked))
    (tmp_path / "ending.yaml").write_text(TASK.format(file=tmp_path / "asked.jsonl"))
    code, out, err = lorakit(
        "evaluate",
        "it",
        "--runs",
        str(trained / "runs"),
        "tasks=ending",
        "--tasks-path",
        str(tmp_path),
    )
    assert code == 0, err
    assert json.loads(out[out.index("{") :])["tasks"]["ending"]["acc"] == 1.0


def test_what_cannot_be_trained_is_said(trained: Path, workplace: Path, lorakit: Call) -> None:
    write_rows(workplace)
    code, _, err = lorakit("train", *SETTINGS, 'model.add_tokens=["<way>","<yaw>"]')
    assert (
        code == 2 and "'<yaw>' in none of the 8 rows looked at, so there is nothing to train" in err
    )
    code, _, err = lorakit("train", *SETTINGS, 'model.add_tokens=["e"]')
    assert code == 2 and "'e' is a token of this model already" in err and "Traceback" not in err
    init = f"lora.init_from={trained / 'runs/it/adapter'}"
    code, _, err = lorakit("train", *SETTINGS, init, "model.add_tokens=null")
    assert code == 2 and "trained rows of the tokens" in err
    code, _, err = lorakit(
        "train", *SETTINGS, init, "trainer.max_steps=1", "optim.lr=0", "run=next"
    )
    assert code == 0, err
    files = [
        load_file(folder / "adapter/adapter_model.safetensors")
        for folder in (trained / "runs/it", workplace / "runs/next")
    ]
    assert all(torch.equal(files[0][name], files[1][name]) for name in files[0])


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "zero2", "zero3"])
def test_two_processes_train_the_same_rows(strategy: str, trained: Path, tmp_path: Path) -> None:
    write_rows(tmp_path)
    (tmp_path / "runs").mkdir()
    settings = [
        *SETTINGS,
        "data.batch_size=4",
        "trainer.max_steps=6",
        "trainer.precision=32-true",
        "optim=sgd",
        "optim.lr=0.3",
        *SMALL[-2:],
    ]
    alone = start("train", "run=one", *settings, "trainer.accumulate_grad_batches=2", cwd=tmp_path)
    assert alone.wait() == 0, alone.stderr.read()
    both = start(
        "train", "run=two", *settings, "trainer.devices=2", f"strategy={strategy}", cwd=tmp_path
    )
    assert both.wait() == 0, both.stderr.read()
    one, two = (last_adapter(tmp_path / "runs" / name) for name in ("one", "two"))
    assert max(float((one[name] - two[name]).abs().max()) for name in one) < 1e-5


def last_adapter(run: Path) -> dict[str, torch.Tensor]:
    return load_file(sorted((run / "checkpoints").iterdir())[-1] / "adapter_model.safetensors")

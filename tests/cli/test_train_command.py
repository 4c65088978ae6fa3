"""`lorakit train` and what follows it, on the bundled model."""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from small import SMALL

from lorakit.cli.run_arguments import add_run_arguments, parse
from lorakit.quoting import quote_for_shell
from lorakit.reports.tables import figures_table

Call = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one finished run, `runs/first`."""
    from hydra.core.global_hydra import GlobalHydra

    from lorakit.cli.train import main

    folder = tmp_path_factory.mktemp("trained")
    GlobalHydra.instance().clear()
    main(["run=first", f"paths.runs={folder}/runs", "trainer.max_steps=4", *SMALL])
    return folder


def test_a_run_folder_says_how_it_came_about(trained: Path) -> None:
    info = json.loads((trained / "runs/first/run.json").read_text())
    assert info["status"] == "finished" and info["step"] == 4 and info["base"] == "tiny"
    assert (
        info["format_version"] == 1 and info["data_fingerprint"] and "run=first" in info["command"]
    )
    # of CUDA builds, the package's version lacks it
    assert info["packages"]["torch"] == torch.__version__.partition("+cu")[0]
    config = yaml.safe_load((trained / "runs/first/config.yaml").read_text())
    assert config["lora"]["rank"] == 4 and config["data"]["stop"] == "\n\n"
    names = {path.name for path in (trained / "runs/first").rglob("*")}
    assert {
        "adapter_model.safetensors",
        "adapter_config.json",
        "loss.png",
        "history.jsonl",
        "samples.jsonl",
    } <= names
    assert not [name for name in names if "=" in name]
    assert (trained / "runs/first/loss.png").read_bytes().startswith(b"\x89PNG")


def test_the_history_has_a_line_per_step(trained: Path) -> None:
    lines = [
        json.loads(line) for line in (trained / "runs/first/history.jsonl").read_text().splitlines()
    ]
    assert [line["step"] for line in lines if "train/loss" in line] == [1, 2, 3, 4]
    assert [line["step"] for line in lines if "val/loss" in line] == [2, 4]
    assert {
        "train/grad_norm",
        "train/lr",
        "expert_load/layer_00_max",
        "data/padding_share",
    } <= lines[0].keys()


def test_sample_takes_any_text(trained: Path, lorakit: Call) -> None:
    text = 'English: it\'s 2+2=?, ("yes") ${x} föö\nPig Latin:'
    code, out, err = lorakit(
        "sample", "first", "--runs", f"{trained}/runs", "--max-tokens", "5", "--", text
    )
    assert (code, err) == (0, "") and out.endswith("\n")
    file = trained / "prompt with, comma=.txt"
    file.write_text(text, encoding="utf-8")
    assert lorakit(
        "sample", "--runs", f"{trained}/runs", "--max-tokens", "5", "--prompt-file", str(file)
    )[:2] == (0, out)


def test_evaluate_prints_and_writes_figures(trained: Path, lorakit: Call, tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    code, out, _ = lorakit(
        "evaluate",
        "--runs",
        f"{trained}/runs",
        "--limit",
        "3",
        "--max-tokens",
        "8",
        "--json",
        str(file),
    )
    figures = json.loads(out)
    assert code == 0 and figures == json.loads(file.read_text())
    assert figures["rows"] == 3 and figures["perplexity"] == pytest.approx(
        2.718281828 ** figures["loss"]
    )
    assert 0 <= figures["exact_match"] <= 1


def test_runs_lists_the_run(trained: Path, lorakit: Call) -> None:
    code, out, _ = lorakit("runs", "--runs", f"{trained}/runs")
    assert code == 0 and "first" in out and "4/4" in out and "tiny" in out


def test_merged_folder_is_the_adapter_form_for_plain_transformers(
    trained: Path, lorakit: Call, tmp_path: Path
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from lorakit.model.load import BUNDLED

    out = tmp_path / "merged"
    code, text, err = lorakit(
        "merge", "--runs", f"{trained}/runs", "--out", str(out), "--dtype", "float32"
    )
    assert code == 0, err
    assert "24 tensors merged" in text and "model.layers.*.mlp.experts.down_proj" in text
    merged = AutoModelForCausalLM.from_pretrained(out)
    base = AutoModelForCausalLM.from_pretrained(BUNDLED["tiny"], dtype=torch.float32)
    adapted = PeftModel.from_pretrained(base, trained / "runs/first/checkpoints/step-000004")
    tokens = torch.randint(0, 256, (2, 30), generator=torch.Generator().manual_seed(1))
    expected = adapted(tokens).logits
    assert (merged(tokens).logits - expected).abs().max() <= 1e-4 * expected.abs().max()
    with adapted.disable_adapter():  # the control: the base alone is far away
        assert (adapted(tokens).logits - expected).abs().max() > 1e-2
    assert AutoTokenizer.from_pretrained(out).encode("abc") == [64, 65, 66]
    code, _, err = lorakit("merge", "--runs", f"{trained}/runs", "--out", str(out))
    assert code == 2 and "not empty" in err


def test_a_run_can_be_used_from_any_folder(
    trained: Path, lorakit: Call, workplace: Path, monkeypatch: Any
) -> None:
    rows = '{"prompt": "a", "completion": "b"}\n' * 4
    (workplace / "rows.jsonl").write_text(rows)
    code, _, err = lorakit(
        "train",
        "run=here",
        "model.path=tiny",
        "data.path=rows.jsonl",
        "data.val_fraction=0.5",
        "lora.rank=2",
    )
    assert code == 0, err
    (workplace / "elsewhere").mkdir()
    monkeypatch.chdir(workplace / "elsewhere")
    code, out, err = lorakit("evaluate", "../runs/here", "--no-samples")
    assert code == 0 and json.loads(out)["rows"] == 2, err
    code, _, err = lorakit("sample", "a text", "--runs", "../runs")
    assert code == 2 and "lorakit sample -- 'a text'" in err


def test_an_unfinished_run_says_so_when_it_is_used(
    trained: Path, lorakit: Call, tmp_path: Path
) -> None:
    shutil.copytree(trained / "runs/first", tmp_path / "runs/cut")
    file = tmp_path / "runs/cut/run.json"
    file.write_text(
        file.read_text().replace('"finished"', '"running"').replace('"step": 4', '"step": null')
    )
    shutil.rmtree(tmp_path / "runs/cut/adapter")
    code, _, err = lorakit(
        "sample", "cut", "--runs", f"{tmp_path}/runs", "--max-tokens", "2", "--", "x"
    )
    assert code == 0 and "cut is killed after 4 of 4 steps: taking step-000004" in err
    code, out, _ = lorakit("runs", "--runs", f"{tmp_path}/runs")
    assert "killed" in out and "4/4" in out


def test_a_run_is_never_overwritten(trained: Path, lorakit: Call) -> None:
    code, _, err = lorakit("train", "run=first", f"paths.runs={trained}/runs", *SMALL)
    assert code == 2 and "never overwritten" in err
    code, _, err = lorakit(
        "train", "run=first", "resume=true", f"paths.runs={trained}/runs", *SMALL
    )
    assert code == 2 and "is finished" in err


def test_a_sweep_makes_a_run_per_job(workplace: Path, lorakit: Call) -> None:
    code, _, err = lorakit(
        "train",
        "-m",
        "optim.lr=1e-3,2e-3",
        "trainer.max_steps=1",
        "callbacks.samples=null",
        *SMALL[:4],
    )
    assert code == 0, err
    rates = {
        yaml.safe_load(file.read_text())["optim"]["lr"]
        for file in workplace.glob("runs/*/config.yaml")
    }
    assert rates == {1e-3, 2e-3}


def test_an_adapter_is_the_start_of_the_next_run(
    trained: Path, lorakit: Call, workplace: Path
) -> None:
    first = trained / "runs/first/checkpoints/step-000004"
    settings = (*SMALL, "optim.lr=0.0", "trainer.max_steps=1", "run=next")
    code, _, err = lorakit("train", f"lora.init_from={first}", *settings)
    assert code == 0, err
    then, now = (
        first / "adapter_model.safetensors",
        workplace / "runs/next/checkpoints/step-000001/adapter_model.safetensors",
    )
    assert then.read_bytes() == now.read_bytes()
    code, _, err = lorakit(
        "train", f"lora.init_from={first}", *settings[:-1], "run=other", "lora.rank=8"
    )
    assert code == 2 and "rank 4" in err and "lora.rank=8" in err


def test_a_shared_outer_run_trains_samples_merges_and_exports_for_plain_peft(
    workplace: Path, lorakit: Call
) -> None:
    code, out, err = lorakit(
        "train",
        "run=so",
        "lora.expert_layout=shared_outer",
        "lora.dropout=0.1",
        "trainer.max_steps=3",
        *SMALL,
    )
    assert code == 0, err
    assert (
        "factors on the hidden width shared by all experts" in out
        and "when expanded to PEFT's layout" in out
    )
    code, out, err = lorakit("sample", "so", "--max-tokens", "4", "--", "English: a\nPig Latin:")
    assert code == 0, err
    code, out, err = lorakit("merge", "so", "--dtype", "float32", "--out", "merged")
    assert code == 0, err
    code, out, err = lorakit("export", "so")
    assert code == 0 and "written out for each expert" in out, err
    import peft
    from transformers import AutoModelForCausalLM

    from lorakit.model.load import load_model

    tokens = torch.tensor([list(range(3, 40))])
    with torch.no_grad():
        merged = AutoModelForCausalLM.from_pretrained("merged", dtype=torch.float32)(tokens).logits
        exported = peft.PeftModel.from_pretrained(load_model("tiny"), "runs/so/peft")(tokens).logits
    assert (merged - exported).abs().max() < 0.02 * merged.abs().max()  # the export is in bf16
    code, _, err = lorakit("export", "so")
    assert code == 2 and "is not empty" in err


def test_a_run_in_pefts_layout_is_exported_as_it_is(
    trained: Path, lorakit: Call, tmp_path: Path
) -> None:
    code, out, err = lorakit("export", "--runs", f"{trained}/runs", "--out", str(tmp_path / "peft"))
    assert code == 0 and "MB in bf16\nchecked: names" in out, err
    assert (tmp_path / "peft/adapter_model.safetensors").read_bytes()


def test_options_may_be_written_as_settings_are(
    trained: Path, lorakit: Call, tmp_path: Path
) -> None:
    runs = f"paths.runs={trained}/runs"
    code, out, err = lorakit(
        "evaluate",
        runs,
        "run=first",
        "data.path=pig_latin/heldout",
        "limit=4",
        "no_samples=true",
        "no-base=true",
    )
    assert code == 0 and json.loads(out)["rows"] == 4, err
    assert "loss of 4 examples, the adapter …" in err and "answers" not in err
    for command in ("evaluate", "export", "merge", "sample"):
        code, _, err = lorakit(command, runs, "chekpoint=2")
        assert code == 2 and "there is no chekpoint here; did you mean checkpoint=…?" in err


def test_the_last_line_end_of_a_prompt_is_not_part_of_it(
    trained: Path, lorakit: Call, tmp_path: Path
) -> None:
    said = []
    for text in ("English: cat\nPig Latin:", "English: cat\nPig Latin:\n"):
        (tmp_path / "prompt.txt").write_text(text)
        code, out, err = lorakit(
            "sample",
            "first",
            "--runs",
            f"{trained}/runs",
            "--prompt-file",
            str(tmp_path / "prompt.txt"),
            "--max-tokens",
            "4",
        )
        assert code == 0, err
        said.append(out)
    assert said[0] == said[1]
    code, _, err = lorakit(
        "sample", "first", "--runs", f"{trained}/runs", "--system", "Be kind.", "--", "x"
    )
    assert code == 2 and "--system is a message of a conversation" in err


def test_what_is_written_as_settings_means_the_option(tmp_path: Path) -> None:
    parser = argparse.ArgumentParser()
    add_run_arguments(parser)
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--chat", action="store_true", default=None)
    mode.add_argument("--raw", dest="chat", action="store_false")
    parser.add_argument("--columns", nargs="+")
    parser.add_argument("--limit", type=int)
    parser.add_argument("--base-name")
    for arguments, expected in (
        (("chat=false",), {"chat": False}),
        (("chat=true", "limit=3"), {"chat": True, "limit": 3}),
        (("/data/lr=1e-3/runs/foo",), {"run": "/data/lr=1e-3/runs/foo"}),
        (("data.columns={prompt: q, completion: a}",), {"columns": ["prompt=q", "completion=a"]}),
        (
            ("--columns", "prompt=q", "completion=a", "limit=4"),
            {"columns": ["prompt=q", "completion=a"], "limit": 4},
        ),
        (
            ("columns=prompt=q", "completion=a", "--limit=2"),
            {"columns": ["prompt=q", "completion=a"], "limit": 2},
        ),
        (
            ("--col", "prompt=q", "--base-name", "a=b"),
            {"columns": ["prompt=q"], "base_name": "a=b"},
        ),
        (("base_name=a=b", "run=x"), {"base_name": "a=b", "run": "x"}),
    ):
        found = vars(parse(parser, arguments))
        assert {key: found[key] for key in expected} == expected, arguments
    with pytest.raises(SystemExit):
        parse(parser, ["chat=perhaps"])


def test_a_person_reads_a_table_and_types_a_prompt() -> None:
    figures = {
        "run": "it",
        "rows": 3,
        "loss": 0.5,
        "base": {"loss": 2.0, "tasks": {"t": {"acc": 0.25}}},
        "tasks": {"t": {"acc": 1.0}},
    }
    lines = [line.split() for line in figures_table(figures).splitlines()]
    assert lines == [
        ["adapter", "base"],
        ["run", "it"],
        ["rows", "3"],
        ["loss", "0.5000", "2.0000"],
        ["t", "acc", "1.0000", "0.2500"],
    ]
    for text in ("plain", "it's", "two\nlines", "it's\ntwo \\ lines"):
        typed = subprocess.run(
            ["bash", "-c", f"printf %s {quote_for_shell(text)}"],
            capture_output=True,
            text=True,
            check=True,
        )
        assert typed.stdout == text

"""What a user can do wrong: one message, exit code 2, no traceback."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

Call = Callable[..., tuple[int, str, str]]

CASES = [
    (["lora.rnak=4"], "unknown key 'lora.rnak'; did you mean lora.rank?"),
    (["trainer.max_step=4"], "did you mean trainer.max_steps?"),
    (["lorra.rank=4"], "did you mean lora.rank?"),
    (["+lora.dropuot=0.1"], "did you mean lora.dropout?"),
    (["lora.rank=four"], "lora.rank=four: expected int, got str"),
    (["lora.rank=0"], "lora.rank=0 must be at least 1"),
    (["optim=admw"], "adamw"),
    (["experiment=pig_latn"], "pig_latin"),
    (["optim.lr=fast"], "optim.lr=fast must be a number"),
    (["optim.lr=-1e-3"], "optim.lr=-0.001 must be a number that is not negative"),
    (["optim.clip_norm=-1"], "optim.clip_norm=-1 must be a number that is not negative"),
    (["seed=-1"], "seed=-1 must be a whole number from 0 to 4294967295"),
    (["lora.targets=[q_prj]"], "'q_prj' matches nothing in this model (near: q_proj"),
    (["lora.mlp=true"], "lora.mlp=true: this model has no such matrices"),
    (["lora.dora=true"], "does not work on stacked experts"),
    (["lora.expert_layout=shared"], "choose one of per_expert, shared_outer"),
    (["lora.rslora=true", "optim.lr=auto"], "optim.lr=auto knows plain LoRA with alpha 32 only"),
    (["trainer.precision=bf16"], "trainer.precision=bf16 is unknown"),
    (["trainer.accelerator=cuda"], "sees no GPU"),
    (["model.path=./nowhere", "data.path=pig_latin/train"], "no such folder"),
    (["data.path=nowhere.jsonl", "model.path=tiny"], "nowhere.jsonl: no such file"),
    (
        ["data.path=rows.jsonl", "data.max_tokens=8", "model.path=tiny"],
        "rows.jsonl:1: 12 tokens, but data.max_tokens=8",
    ),
    (["experiment=chat_sft"], "data.path=… (a file of rows"),
    (["resume=true"], "there is no unfinished run of experiment pig_latin"),
    (["run=a/b"], "holds no /"),
    (["loss=mse"], "there are: cross_entropy, dpo"),
    (["logger.csv._target_=os.nothing"], "cannot be imported"),
    (["data.stop"], "data.stop"),
    (
        ["model.path=tiny", "data.path=rows.txt", "callbacks=[default,early_stopping]"],
        "early_stopping needs rows to evaluate on",
    ),
    (["optim.betas=[2,3]"], "optim: torch.optim.AdamW refuses its settings"),
    (["optim=sgd", "optim.lr=auto"], "optim.lr=auto is a rule for Adam and AdamW"),
    (
        ["data.path=rows.txt", "data.format=messages", "model.path=tiny"],
        "a .txt file holds plain text",
    ),
    (
        ["data.path=chat.jsonl", "model.path=tiny"],
        "lorakit would not train on it; rename or remove it",
    ),
    (["rows.jsonl"], "settings are written key=value; data.path=rows.jsonl?"),
    (["--lr=1e-3"], "settings are written without dashes; it is optim.lr here"),
    (["+foo=4"], "unknown key foo"),
    (["+paths.runz=x"], "unknown key paths.runz; did you mean paths.runs?"),
    (["trainer.foo=1"], "unknown key 'trainer.foo'; there are: accelerator"),
    (["schedule=constant", "schedule.final_ratio=0.1"], "belongs to another choice of its group"),
    (["data.path=pig_latin/tran", "model.path=tiny"], "did you mean pig_latin/train?"),
    (["data.path=rows.jsnl", "model.path=tiny"], "did you mean rows.jsonl?"),
    (["data.path=semicolons.csv", "model.path=tiny"], "its cells are separated by ';'"),
    (["data.path=utf16.jsonl", "model.path=tiny"], "UTF-16; save it as UTF-8"),
    (
        ["data.path=role.jsonl", "model.path=tiny"],
        "(known: system, developer, user, assistant, tool)",
    ),
    (
        ["data.path=tools.jsonl", "model.path=tiny"],
        "the row has `tools`, but the model's chat template leaves them out",
    ),
    (["lora.init_from=nowhere"], "nowhere: no adapter_config.json here"),
    (["resume=maybe"], "choose true, false or auto"),
    (["data.pack_tokens=99"], "has no effect without data.packing=true"),
    (["lora.any_base=true"], "has no effect without lora.init_from"),
    (["lora.init=gaussian", "lora.init_from=x"], "has no effect beside lora.init_from"),
    (
        ["lora.targets=[q_proj]", "lora.experts=true"],
        "lora.experts=true has no effect beside lora.targets",
    ),
    (["model.revision=main"], "model.revision=main has no effect"),
    (["data.split=test"], "data.split=test has no effect"),
    (["data.train_on=weights_given"], "carry no weights"),
]


@pytest.mark.parametrize(
    ("overrides", "expected"), CASES, ids=[" ".join(overrides) for overrides, _ in CASES]
)
def test_a_wrong_setting_is_one_clear_message(
    workplace: Path, lorakit: Call, overrides: list[str], expected: str
) -> None:
    (workplace / "rows.jsonl").write_text('{"prompt": "abc", "completion": "defghijk"}\n')
    (workplace / "rows.txt").write_text("a line\n")
    chat = (
        '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b",'
        ' "thinking": "c"}]}\n'
    )
    (workplace / "chat.jsonl").write_text(chat)
    (workplace / "role.jsonl").write_text('{"messages": [{"role": "usr", "content": "a"}]}\n')
    (workplace / "tools.jsonl").write_text(
        chat.replace(', "thinking": "c"', "").replace("]}", '], "tools": [{"name": "f"}]}')
    )
    (workplace / "semicolons.csv").write_text("prompt;completion\na;b\n")
    (workplace / "utf16.jsonl").write_text(
        '{"prompt": "a", "completion": "b"}\n', encoding="utf-16"
    )
    code, _, err = lorakit("train", "data.check_token_rows=50", *overrides)
    assert code == 2, err
    assert expected in err
    assert (
        err.startswith("lorakit: ") and "Traceback" not in err and "Error executing job" not in err
    )
    assert not (workplace / "runs").exists()


def test_all_wrong_settings_are_told_at_once(workplace: Path, lorakit: Call) -> None:
    _, _, err = lorakit("train", "lora.rank=x", "trainer.max_steps=y", "data.batch_size=z")
    assert all(key in err for key in ("lora.rank=x", "trainer.max_steps=y", "data.batch_size=z"))


def test_bad_rows_are_told_before_the_model_is_looked_for(workplace: Path, lorakit: Call) -> None:
    (workplace / "rows.jsonl").write_text(
        '{"prompt": "a", "completion": "b"}\n{"prompt": 3}\nnot json\n'
    )
    code, _, err = lorakit("train", "data.path=rows.jsonl", "model.path=nobody/nothing")
    assert code == 2 and "rows.jsonl:2" in err and "rows.jsonl:3" in err and "nobody" not in err


def test_a_model_of_the_hub_that_is_not_here_is_one_message(workplace: Path, lorakit: Call) -> None:
    code, _, err = lorakit("train", "data.path=pig_latin/train", "model.path=nobody/nothing")
    assert code == 2 and "nobody/nothing" in err and "Traceback" not in err


@pytest.mark.parametrize("command", ["sample", "evaluate", "merge"])
def test_commands_without_a_run_say_so(workplace: Path, lorakit: Call, command: str) -> None:
    arguments = ["--", "x"] if command == "sample" else []
    code, _, err = lorakit(command, *arguments)
    assert code == 2 and "no finished run" in err


def test_debug_shows_the_traceback(
    workplace: Path, lorakit: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lorakit.errors import LorakitError

    monkeypatch.setenv("LORAKIT_DEBUG", "1")
    with pytest.raises(LorakitError, match="rank"):
        lorakit("train", "lora.rank=0")


def test_a_model_that_is_not_there_costs_no_minute_of_retries(
    workplace: Path, lorakit: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    from lorakit.hub import find_hub_problem

    def no_network(*_: object) -> None:
        raise OSError(-2, "Name or service not known")

    find_hub_problem.cache_clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("lorakit.hub.socket.getaddrinfo", no_network)
    for name in ("https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    code, _, err = lorakit(
        "train", "model.path=modelz", "data.path=pig_latin/train", "data.check_token_rows=50"
    )
    assert (
        code == 2
        and "model.path=modelz: no such folder (bundled models: tiny" in err
        and "hf download modelz" in err
    )
    code, _, err = lorakit("train", "model.path=tiny", "data.path=nobody/rows")
    assert code == 2 and "nobody/rows: no such file or folder" in err and "cannot be reached" in err
    find_hub_problem.cache_clear()


def test_text_that_is_not_utf8_is_named(
    workplace: Path, lorakit: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, _, err = lorakit("sample", "--", "caf\udce9")
    assert code == 2 and "TEXT: not UTF-8 at character 3" in err


def test_what_has_no_effect_on_these_rows_is_said(workplace: Path, lorakit: Call) -> None:
    rows = '{"instruction": "a", "imput": "b", "output": "c", "id": 1}\n' * 4
    (workplace / "rows.jsonl").write_text(rows + '{"instruction": 1}\n')
    code, out, err = lorakit(
        *(
            "train",
            "model.path=tiny",
            "data.path=rows.jsonl",
            "data.on_error=skip",
            "data.batch_size=2",
        ),
        *("data.val_rows=3", "trainer.max_steps=9", "lora.rank=2"),
    )
    assert code == 0, err
    assert "1 rows skipped (data.on_error=skip), the first: rows.jsonl:5: " in out
    assert "columns not used: imput, id" in out and "did you mean `input`?" in out
    assert "trainer.max_steps=9 will not be reached: data.epochs=1 ends after about 2 steps" in err
    assert "no rows are held out, so data.val_rows=3 has no effect" in err


@pytest.mark.parametrize(
    "named",
    [
        ["data.path=rowz.jsonl", "data.val_path=./absent"],
        ["data.sources=[rowz.jsonl,{path: ./absent}]", "data.path=null"],
    ],
)
def test_rows_that_are_not_there_are_told_before_the_imports(
    workplace: Path, named: list[str]
) -> None:
    arguments = ["model.path=tiny", *named, "eval.retain_path=rowz.txt"]
    code = f"""
import sys
from lorakit.cli.guard import run_command
from lorakit.cli.train import main
try:
    run_command(lambda typed: main({arguments}))
finally:
    print("torch" in sys.modules)"""
    done = subprocess.run([sys.executable, "-c", code], text=True, capture_output=True)
    assert (done.returncode, done.stdout) == (2, "False\n"), done.stderr
    assert all(
        f"{name}: no such file" in done.stderr for name in ("rowz.jsonl", "./absent", "rowz.txt")
    ), done.stderr


def test_a_sweep_says_which_job_failed_and_names_a_run_for_each(
    workplace: Path, lorakit: Call
) -> None:
    code, out, err = lorakit(
        *(
            "train",
            "-m",
            "run=sweep",
            "optim.lr=1e-3,-1",
            "trainer.max_steps=1",
            "callbacks.samples=null",
        ),
        *(
            "data.check_token_rows=50",
            "data.batch_size=2",
            "data.val_rows=2",
            "lora.rank=2",
            "data.window_rows=64",
        ),
    )
    assert code == 2 and "run runs/sweep-0" in out
    assert (
        "1 of 2 jobs failed; the other 1 finished:\n  job 1 (optim.lr=-1): optim.lr=-1 must be a"
        " number" in err
    )


@pytest.mark.parametrize(
    ("command", "flag"), [("merge", "--out"), ("export", "--out"), ("evaluate", "--json")]
)
def test_a_place_that_cannot_be_written_is_told_before_the_work(
    workplace: Path, lorakit: Call, command: str, flag: str
) -> None:
    (workplace / "file").write_text("")
    code, _, err = lorakit(command, flag, "file/below")
    assert code == 2 and "file/below cannot be written" in err and "is not a folder" in err


def test_a_folder_of_runs_that_is_not_there_is_said(workplace: Path, lorakit: Call) -> None:
    assert lorakit("runs")[:1] == (0,)
    code, _, err = lorakit("runs", "--runs", "nowhere")
    assert code == 2 and "--runs nowhere: no such folder" in err


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("learning_rate=1e-4", "unknown key 'learning_rate'; it is optim.lr here"),
        ("lora.r=8", "it is lora.rank here"),
        ("trainer.gradient_accumulation_steps=4", "it is trainer.accumulate_grad_batches here"),
        ("--max-length", "settings are written without dashes; it is data.max_tokens here"),
        ("--data", "it is data.path here"),
        ("callbacks.samples.max_length=4", "did you mean callbacks.samples.max_tokens?"),
        ("load_in_4bit=true", "lorakit trains on bases of 16 or 32 bits"),
        ("model.dtype=int4", "choose one of auto, float32, bfloat16, float16"),
        ("lora.rank=0", "lora.rank=0 must be at least 1"),
        ("lora.targets=[--a=b, c]", "lora.targets=[--a=b, c] cannot be read"),
    ],
)
def test_what_other_trainers_call_it_is_understood(
    workplace: Path, lorakit: Call, setting: str, said: str
) -> None:
    code, _, err = lorakit("train", setting)
    assert code == 2 and said in err, err


def test_every_key_that_others_call_otherwise_is_one_of_ours(workplace: Path) -> None:
    from lorakit.config.aliases import ALIASES, explain_other_name
    from lorakit.config.documentation import read_choices

    choices = read_choices()
    ours = {setting.key for choice in choices for setting in choice.settings} | {
        choice.group for choice in choices
    }
    assert not ALIASES.keys() - ours
    assert (
        explain_other_name("optim.weight_decay") is None
        and explain_other_name("eval.batch_size") is None
    )  # ours, or another
    assert len({name for names in ALIASES.values() for name in names}) == sum(
        map(len, ALIASES.values())
    )


def test_a_config_that_lies_in_the_wrong_folder_is_found(workplace: Path, lorakit: Call) -> None:
    (workplace / "mine/experiment").mkdir(parents=True)
    (workplace / "mine/support.yaml").write_text("# @package _global_\ndefaults: [chat_sft]\n")
    (workplace / "mine/experiment/raw.yaml").write_text("lora: {rank: 4}\n")
    code, _, err = lorakit("train", "--config-dir", "mine", "experiment=support")
    assert (
        code == 2 and "mine/support.yaml is there: move it to mine/experiment/support.yaml" in err
    )
    code, _, err = lorakit(
        "train",
        "--config-dir",
        "mine",
        "experiment=raw",
        "model.path=tiny",
        "data.path=pig_latin/heldout",
    )
    assert code == 2 and "the first line of an experiment's file is `# @package _global_`" in err


def test_an_experiment_of_ones_own_is_as_the_readme_writes_it(
    workplace: Path, lorakit: Call
) -> None:
    text = (Path(__file__).resolve().parents[2] / "README.md").read_text(encoding="utf-8")
    (written,) = re.findall(r"^```yaml\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    (workplace / "mine/experiment").mkdir(parents=True)
    (workplace / "mine/experiment/support.yaml").write_text(written)
    code, out, err = lorakit("train", "--config-dir", "mine", "experiment=support", "--cfg", "job")
    config = yaml.safe_load(out)
    assert code == 0 and config["data"]["packing"] is True and config["data"]["epochs"] == 3, err
    assert config["trainer"]["accumulate_grad_batches"] == 4 and config["lora"]["rank"] == "auto"

"""What a user can do wrong: one message, exit code 2, no traceback."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

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
    (["lora.targets=[q_prj]"], "'q_prj' matches nothing in this model (near: q_proj"),
    (["lora.mlp=true"], "lora.mlp=true: this model has no such matrices"),
    (["lora.dora=true"], "does not work on stacked experts"),
    (["lora.expert_layout=shared"], "choose one of per_expert, shared_outer"),
    (["lora.rslora=true", "optim.lr=auto"], "optim.lr=auto knows plain LoRA with alpha 32 only"),
    (["trainer.precision=bf16"], "trainer.precision=bf16 is unknown"),
    (["trainer.accelerator=cuda"], "sees no GPU"),
    (["model.path=./nowhere", "data.path=pig_latin/train"], "no such folder"),
    (["data.path=nowhere.jsonl", "model.path=tiny"], "nowhere.jsonl: no such file"),
    (["data.path=rows.jsonl", "data.max_tokens=8", "model.path=tiny"], "rows.jsonl:1: 12 tokens, but data.max_tokens=8"),
    (["experiment=chat_sft"], "data.path=…, model.path=…"),
    (["resume=true"], "there is no unfinished run of experiment pig_latin"),
    (["run=a/b"], "holds no /"),
    (["loss.name=mse"], "loss.name=mse is unknown"),
    (["logger.csv._target_=os.nothing"], "cannot be imported"),
    (["data.stop"], "data.stop"),
    (
        ["model.path=tiny", "data.path=rows.txt", "callbacks=[default,early_stopping]"],
        "early_stopping needs rows to evaluate on",
    ),
    (["optim.betas=[2,3]"], "optim: torch.optim.AdamW refuses its settings"),
    (["optim=sgd", "optim.lr=auto"], "optim.lr=auto is a rule for Adam and AdamW"),
    (["data.path=rows.txt", "data.format=messages", "model.path=tiny"], "a .txt file holds plain text"),
    (["data.path=chat.jsonl", "model.path=tiny"], "lorakit would not train on it; rename or remove it"),
]


@pytest.mark.parametrize(("overrides", "expected"), CASES, ids=[" ".join(overrides) for overrides, _ in CASES])
def test_a_wrong_setting_is_one_clear_message(workplace: Path, lorakit: Call, overrides: list[str], expected: str) -> None:
    (workplace / "rows.jsonl").write_text('{"prompt": "abc", "completion": "defghijk"}\n')
    (workplace / "rows.txt").write_text("a line\n")
    chat = '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "thinking": "c"}]}\n'
    (workplace / "chat.jsonl").write_text(chat)
    code, _, err = lorakit("train", "data.check_token_rows=50", *overrides)
    assert code == 2, err
    assert expected in err
    assert err.startswith("lorakit: ") and "Traceback" not in err and "Error executing job" not in err
    assert not (workplace / "runs").exists()


def test_all_wrong_settings_are_told_at_once(workplace: Path, lorakit: Call) -> None:
    _, _, err = lorakit("train", "lora.rank=x", "trainer.max_steps=y", "data.batch_size=z")
    assert all(key in err for key in ("lora.rank=x", "trainer.max_steps=y", "data.batch_size=z"))


def test_bad_rows_are_told_before_the_model_is_looked_for(workplace: Path, lorakit: Call) -> None:
    (workplace / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n{"prompt": 3}\nnot json\n')
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


def test_debug_shows_the_traceback(workplace: Path, lorakit: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    from lorakit.errors import LorakitError

    monkeypatch.setenv("LORAKIT_DEBUG", "1")
    with pytest.raises(LorakitError, match="rank"):
        lorakit("train", "lora.rank=0")


def test_a_model_that_is_not_there_costs_no_minute_of_retries(
    workplace: Path, lorakit: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    def no_network(*_: object) -> None:
        raise OSError(-2, "Name or service not known")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("lorakit.model.load.socket.getaddrinfo", no_network)
    for name in ("https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    code, _, err = lorakit("train", "model.path=modelz", "data.path=pig_latin/train", "data.check_token_rows=50")
    assert code == 2 and "model.path=modelz: no such folder (bundled models: tiny)" in err and "hf download modelz" in err


def test_text_that_is_not_utf8_is_named(workplace: Path, lorakit: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    code, _, err = lorakit("sample", "--", "caf\udce9")
    assert code == 2 and "TEXT: not UTF-8 at character 3" in err

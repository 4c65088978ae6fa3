"""RunConfig: from plain values and back, partial settings, changes, and what it refuses."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

import lorakit
from lorakit.config.defaults import with_defaults
from lorakit.config.schema import RunConfig
from lorakit.errors import ConfigError
from lorakit.runs.folder import History, flatten

SMALL: dict[str, Any] = {"model": {"path": "tiny"}, "data": {"path": "pig_latin/train"}}


def test_what_is_left_out_is_as_in_conf() -> None:
    config = RunConfig.from_dict({**SMALL, "seed": 7, "trainer": {"max_steps": 3}})
    assert (config.lora.rank, config.trainer.max_steps, config.clip_norm) == (32, 3, 1.0)
    assert config.lora.seed == config.data.batches.seed == 7  # conf/ has ${seed} there
    assert config.callbacks["samples"] is not None and config.callbacks["early_stopping"] is None


def test_an_open_group_that_is_given_is_taken_as_it_is() -> None:
    assert RunConfig.from_dict({**SMALL, "callbacks": {}}).callbacks == {}
    optim = {"_target_": "torch.optim.SGD", "_partial_": True, "lr": 0.1}
    config = RunConfig.from_dict({**SMALL, "optim": optim})
    assert config.optim.arguments == {"lr": 0.1} and config.clip_norm == 1.0


def test_whole_settings_are_not_read_a_second_time() -> None:
    """A text that looks like an interpolation means itself, once a config is composed."""
    whole = RunConfig.from_dict(SMALL).to_dict()
    whole["data"]["path"] = "${seed}"
    assert with_defaults(whole)["data"]["path"] == "${seed}"


def test_auto_waits_in_a_list_and_comes_back() -> None:
    config = RunConfig.from_dict({**SMALL, "lora": {"rank": "auto"}})
    assert config.auto == {"lora.rank"} and config.lora.rank == 32
    assert config.to_dict()["lora"]["rank"] == "auto"
    chosen = config.with_values({"lora.rank": 5})
    assert chosen.auto == frozenset() and chosen.to_dict()["lora"]["rank"] == 5


@pytest.mark.parametrize(
    "key",
    [
        *("seed", "data.max_tokens", "data.batch_size", "lora.alpha", "trainer.max_steps"),
        *("optim.clip_norm", "optim.lr", "callbacks.samples.num_prompts", "model.revision"),
        *("strategy.sequence_parallel", "checkpoint.keep_last", "paths.runs"),
    ],
)
def test_a_changed_key_is_that_key_and_no_other(key: str) -> None:
    config = RunConfig.from_dict(SMALL)
    before, after = flatten(config.to_dict()), flatten(config.with_values({key: 3}).to_dict())
    assert {name for name in before.keys() | after if before.get(name) != after.get(name)} == {key}
    assert after[key] == 3


def test_overrides_are_written_as_on_the_command_line() -> None:
    config = RunConfig.from_dict(SMALL).with_overrides(["data.batch_size=null", "lora.dropout=0.5"])
    assert config.data.batches.batch_size is None and config.lora.dropout == 0.5


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"data": {"path": "x"}}, "model.path has no default"),
        ({**SMALL, "trainer": {"max_step": 3}}, "trainer.max_step; did you mean trainer.max_steps"),
        ({**SMALL, "data": {"path": "x", "rows": {}}}, "unknown key data.rows"),
        ({**SMALL, "lora": {"alpha": 0}}, "lora.alpha=0 must be more than 0"),
        ({**SMALL, "steps": 1}, "unknown key steps"),
    ],
)
def test_what_cannot_be_is_refused_with_its_key(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RunConfig.from_dict(settings)


def test_a_program_trains_without_hydra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = RunConfig.from_dict(
        {
            "model": {"path": "tiny"},
            "data": {"path": "pig_latin/train", "batch_size": 4, "check_token_rows": 50},
            "lora": {"rank": 4},
            "trainer": {"max_steps": 2, "precision": "32-true", "accelerator": "cpu"},
            "callbacks": {},
            "logger": {},
        }
    )
    result = lorakit.train(config, experiment="mine")
    assert result.interrupt is None and result.run.info["status"] == "finished"
    assert [record["step"] for record in History(result.run.folder).read()][-1] == 2
    again = RunConfig.from_dict(dataclasses.replace(config, run="two").to_dict())
    assert again.run == "two" and again.data == config.data

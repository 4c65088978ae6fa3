"""Ranges as they are typed, as Optuna chooses from them, and as W&B's files write them."""

from __future__ import annotations

import optuna
import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from lorakit.cli.overrides import as_typed, quote_path
from lorakit.cli.sweeper import to_space
from lorakit.errors import ConfigError
from lorakit.sweep.space import Choice, Range

CASES = [
    ("k=interval(1,5)", Range(1.0, 5.0), {"distribution": "uniform", "min": 1.0, "max": 5.0}),
    (
        "k=tag(log,interval(1e-5,1e-2))",
        Range(1e-5, 1e-2, is_log=True),
        {"distribution": "log_uniform_values", "min": 1e-5, "max": 1e-2},
    ),
    (
        "k=int(interval(1,5))",
        Range(1, 5, is_whole=True),
        {"distribution": "int_uniform", "min": 1, "max": 5},
    ),
    (
        "k=tag(log,int(interval(1,64)))",
        Range(1, 64, is_whole=True, is_log=True),
        {"distribution": "q_log_uniform_values", "min": 1, "max": 64},
    ),
    ("k=range(4,17,4)", Range(4, 16, 4, is_whole=True), {"values": [4, 8, 12, 16]}),
    ("k=range(0.0,1,0.25)", Range(0.0, 0.75, 0.25), {"values": [0.0, 0.25, 0.5, 0.75]}),
    ("k=8,16,true,adamw", Choice(("8", "16", "True", "adamw")), {"values": [8, 16, True, "adamw"]}),
]


@pytest.mark.parametrize(("text", "space", "for_wandb"), CASES, ids=[case[0] for case in CASES])
def test_a_range_is_what_hydra_means_by_it(
    text: str, space: Choice | Range, for_wandb: dict[str, object]
) -> None:
    found = to_space(OverridesParser.create().parse_override(text))
    assert found == space
    assert found.for_wandb() == for_wandb
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    for _ in range(20):
        trial = study.ask()
        typed = found.suggest(trial, "k")
        assert OverridesParser.create().parse_override(f"k={typed}").value() == (
            trial.params["k"]
            if isinstance(found, Range)
            else OverridesParser.create().parse_override(f"k={trial.params['k']}").value()
        )
        if isinstance(found, Range):
            assert found.low <= float(typed) <= found.high
            assert found.is_whole == ("." not in typed and "e" not in typed)
            assert found.step is None or (float(typed) - found.low) % found.step == 0
        study.tell(trial, 0.0)
    assert len({trial.params["k"] for trial in study.trials}) > 2


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("k=interval(5,1)", "not from 5 to 1"),
        ("k=tag(log,interval(0,1))", "begins above 0"),
        ("k=tag(log,range(1,9,2))", "has no steps"),
        ("k=range(3,3)", "not from 0 to 0"),
    ],
)
def test_a_range_that_has_nothing_in_it_is_refused(text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        to_space(OverridesParser.create().parse_override(text))


@pytest.mark.parametrize(
    "typed",
    [
        "data.path=it's, a (file).jsonl",
        "group=my sweep",
        "lora.rank=8",
        "data.stop=[a,b]",
        "+vars.x={a: 1}",
    ],
)
def test_what_was_quoted_for_hydra_is_given_back_as_it_was_typed(typed: str) -> None:
    parsed = OverridesParser.create().parse_override(quote_path(typed))
    assert as_typed(parsed) == typed

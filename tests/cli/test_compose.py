"""Overrides: paths verbatim, misspelt keys explained."""

from __future__ import annotations

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import example, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from lorakit.cli.compose import prepare_arguments
from lorakit.cli.overrides import quote_path

AWKWARD = [
    "it's, a (file) = x.jsonl",
    "a b",
    "${oc.env:HOME}",
    "föö/日本.jsonl",
    "back\\slash\\",
    "2+2=?",
    "[x]",
    "{y: 1}",
    '"q"',
    "a\\'b",
]


@pytest.mark.parametrize("path", AWKWARD)
@pytest.mark.parametrize(
    "key", ["data.path", "model.path", "data.val_path", "lora.init_from", "paths.runs"]
)
def test_values_of_path_keys_mean_themselves(key: str, path: str) -> None:
    assert _read_back(quote_path(f"{key}={path}")) == path


@given(st.text(st.characters(exclude_categories=("Cs", "Cc")), min_size=1))
@example("\\\\'")
@example("'")
@settings(deadline=None, max_examples=150)
def test_any_text_survives_as_a_path(path: str) -> None:
    if path != "null":
        assert _read_back(quote_path(f"data.path={path}")) == path


def test_other_keys_keep_hydras_grammar() -> None:
    assert quote_path("optim.lr=1e-3,2e-3") == "optim.lr=1e-3,2e-3"
    assert quote_path("data.val_path=null") == "data.val_path=null"


def test_a_stop_text_may_be_written_as_in_a_shell() -> None:
    assert _read_back(quote_path("data.stop=\\n\\n")) == "\n\n"
    assert quote_path("data.stop=[a,b]") == "data.stop=[a,b]"
    assert _read_back(quote_path('data.stop=["\\n\\n",x]')) == ["\n\n", "x"]


def test_the_demo_is_the_default_only_where_nothing_else_is_named() -> None:
    assert "experiment=pig_latin" in prepare_arguments(["lora.rank=8"])
    assert "experiment=pig_latin" not in prepare_arguments(["data.path=x.jsonl"])
    assert "experiment=pig_latin" not in prepare_arguments(["experiment=chat_sft"])


def test_flags_come_first_with_their_values() -> None:
    assert prepare_arguments(
        ["lora.rank=8", "--config-dir", "mine", "experiment=x", "--cfg", "job", "-m"]
    ) == [
        *("--config-dir", "mine", "--cfg", "job", "-m"),
        *("lora.rank=8", "experiment=x"),
    ]


def _read_back(override: str) -> str:
    parsed = OverridesParser.create().parse_override(override)
    return OmegaConf.create({"value": parsed.value()}).value

"""The two tokenizers on which every masking rule is tested."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
from data_toys import build_second_tokenizer

from lorakit.model.load import load_tokenizer


@cache
def _built(name: str) -> Any:
    return load_tokenizer("tiny") if name == "tiny" else build_second_tokenizer()


@pytest.fixture(params=["tiny", "second"])
def tokenizer(request: pytest.FixtureRequest) -> Any:
    """The bundled byte-level tokenizer without BOS, then one with BOS, dummy prefix and a pad of
    its own.
    """
    return _built(request.param)


@pytest.fixture
def tiny() -> Any:
    return _built("tiny")


@pytest.fixture
def second() -> Any:
    return _built("second")


@pytest.fixture
def with_template() -> Callable[[Any, str | None], Any]:
    """Return a copy of a tokenizer that has another chat template."""

    def change(tokenizer: Any, template: str | None) -> Any:
        changed = copy.deepcopy(tokenizer)
        changed.chat_template = template
        return changed

    return change

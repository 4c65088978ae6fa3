"""The one shift and the one truncation."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from lorakit.data.datum import OnLong, TruncationStats, make_datum, truncate
from lorakit.data.render.renderer import Rendered
from lorakit.errors import DataError
from lorakit.types import Datum, ModelInput


def test_the_shift_by_hand() -> None:
    datum = make_datum([10, 11, 12, 13], [0.0, 0.5, 0.0, -2.0])
    assert datum.model_input.to_ints() == [10, 11, 12]
    assert datum.targets.tolist() == [11, 12, 13]
    assert datum.weights.tolist() == [0.5, 0.0, -2.0]
    assert (datum.targets.dtype, datum.weights.dtype, len(datum)) == (np.int64, np.float32, 3)


def test_a_datum_cannot_be_changed_and_does_not_share_its_arrays() -> None:
    weights = np.array([1.0, 2.0], np.float32)
    datum = Datum(ModelInput.from_ints([1, 2]), {"target_tokens": [2, 3], "weights": weights})
    weights[0] = 9
    assert datum.weights.tolist() == [1.0, 2.0]
    with pytest.raises(ValueError, match="read-only"):
        datum.weights[0] = 3
    with pytest.raises(ValueError, match="2 positions"):
        Datum(ModelInput.from_ints([1, 2]), {"target_tokens": [2, 3], "weights": [1.0]})


@st.composite
def examples(draw: st.DrawFn) -> Rendered:
    """A prefix of special tokens, a prompt, then trained and untrained tokens in any order."""
    prefix, prompt = draw(st.integers(0, 2)), draw(st.integers(0, 12))
    rest = draw(st.lists(st.sampled_from([0.0, 1.0, -0.5]), min_size=1, max_size=12).filter(any))
    while not rest[0]:
        prompt, rest = prompt + 1, rest[1:]
    total = prefix + prompt + len(rest)
    assume(any(([0.0] * (prefix + prompt) + rest)[1:]))
    return Rendered(list(range(100, 100 + total)), [0.0] * (prefix + prompt) + rest, prefix)


@given(examples(), st.integers(1, 30), st.sampled_from(list(OnLong)))
def test_an_example_that_fits_is_left_alone_under_every_policy(
    example: Rendered, slack: int, policy: OnLong
) -> None:
    cuts = TruncationStats()
    assert truncate(example, len(example.tokens) + slack - 1, policy, cuts) is example
    assert cuts == TruncationStats()


@given(examples(), st.data())
def test_too_long_is_refused_or_dropped_and_the_drop_counted(
    example: Rendered, data: st.DataObject
) -> None:
    assume(len(example.tokens) > 1)
    max_tokens, cuts = data.draw(st.integers(1, len(example.tokens) - 1)), TruncationStats()
    with pytest.raises(
        DataError, match=f"{len(example.tokens)} tokens, but data.max_tokens={max_tokens}"
    ):
        truncate(example, max_tokens, OnLong.ERROR, cuts)
    assert cuts == TruncationStats()
    assert truncate(example, max_tokens, OnLong.DROP, cuts) is None
    assert cuts == TruncationStats(num_dropped=1)


@given(examples(), st.data())
def test_cutting_on_the_right_keeps_the_beginning(example: Rendered, data: st.DataObject) -> None:
    assume(len(example.tokens) > 1)
    max_tokens, cuts = data.draw(st.integers(1, len(example.tokens) - 1)), TruncationStats()
    if not any(example.weights[1:max_tokens]):
        with pytest.raises(DataError, match="no trained token is left"):
            truncate(example, max_tokens, OnLong.TRUNCATE_RIGHT, cuts)
        assert cuts == TruncationStats()
        return
    kept = truncate(example, max_tokens, OnLong.TRUNCATE_RIGHT, cuts)
    assert kept is not None
    assert (kept.tokens, kept.weights) == (
        example.tokens[:max_tokens],
        example.weights[:max_tokens],
    )
    assert cuts == TruncationStats(num_truncated=1, num_tokens_cut=len(example.tokens) - max_tokens)


@given(examples(), st.data())
def test_cutting_the_prompt_takes_its_left_end_behind_the_special_tokens(
    example: Rendered, data: st.DataObject
) -> None:
    assume(len(example.tokens) > 1)
    max_tokens, cuts = data.draw(st.integers(1, len(example.tokens) - 1)), TruncationStats()
    excess = len(example.tokens) - max_tokens
    prompt_end = next(i for i, weight in enumerate(example.weights) if weight)
    room = prompt_end - example.num_prefix
    if room < excess:
        with pytest.raises(DataError, match="to cut"):
            truncate(example, max_tokens, OnLong.TRUNCATE_PROMPT, cuts)
        assert cuts == TruncationStats()
        return
    # one token must stay in front of the first trained one
    assume(example.num_prefix or room > excess)
    kept = truncate(example, max_tokens, OnLong.TRUNCATE_PROMPT, cuts)
    assert kept is not None
    gone = range(100 + example.num_prefix, 100 + example.num_prefix + excess)
    assert kept.tokens == [token for token in example.tokens if token not in gone]
    weight_of = dict(zip(example.tokens, example.weights, strict=True))
    assert kept.weights == [weight_of[token] for token in kept.tokens]
    assert np.count_nonzero(kept.weights) == np.count_nonzero(example.weights)
    assert kept.num_prefix == example.num_prefix
    assert cuts == TruncationStats(num_truncated=1, num_tokens_cut=excess)


def test_the_prompt_is_cut_by_hand() -> None:
    cuts = TruncationStats()
    kept = truncate(
        Rendered([1, 5, 6, 7, 8, 2], [0, 0, 0, 0, 1, 1], num_prefix=1),
        4,
        OnLong.TRUNCATE_PROMPT,
        cuts,
    )
    assert kept == Rendered([1, 7, 8, 2], [0, 0, 1, 1], num_prefix=1)
    assert cuts == TruncationStats(num_truncated=1, num_tokens_cut=2)

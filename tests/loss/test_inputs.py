"""What a loss is given is looked at first: one DataError names every Datum and field that is
wrong; what passes collates.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from lorakit.data.batch.collate import collate
from lorakit.errors import DataError
from lorakit.loss import LOSSES
from lorakit.loss.inputs import check_knobs, knobs_of, prepare
from lorakit.types import Datum, ModelInput

VOCAB = 10
POLICY = ["importance_sampling", "ppo", "cispo", "dro", "gspo"]
BOUNDS = ("clip_low_threshold", "clip_high_threshold")


def make(tokens: Sequence[int] = (3, 4, 5), **inputs: Any) -> Datum:
    return Datum(ModelInput.from_ints(tokens), inputs)


def good(name: str = "cross_entropy", **changes: Any) -> Datum:
    """What a loss wants, with other inputs or, where None is given, without one."""
    inputs: dict[str, Any] = {"target_tokens": [4, 5, 6]}
    if name == "cross_entropy":
        inputs["weights"] = [0.0, 1.0, -0.5]
    else:
        inputs.update(logprobs=[-1.0, -2.0, -0.5], advantages=[0.0, 1.0, -1.0])
    if name == "gspo":
        inputs["sequence_ratio_mask"] = [0, 1, 1]
    inputs.update(changes)
    return make(**{key: value for key, value in inputs.items() if value is not None})


def run(data: Sequence[Datum], name: str = "cross_entropy", **options: Any) -> list[Datum]:
    return prepare(data, name, LOSSES[name], vocab_size=VOCAB, **options)


def message(data: Sequence[Datum], name: str = "cross_entropy", **options: Any) -> str:
    with pytest.raises(DataError) as caught:
        run(data, name, **options)
    return str(caught.value)


# ---- prepare: what it refuses

WRONG: dict[str, tuple[str, Datum, str, str]] = {
    # the loss, what is wrong, the field, and something that the line says of it
    "an input that no loss knows": (
        "cross_entropy",
        good(mask=[1, 1, 1]),
        "loss_fn_inputs['mask']",
        "unknown",
    ),
    "an input of another loss": (
        "cross_entropy",
        good(advantages=[1, 1, 1]),
        "loss_fn_inputs['advantages']",
        "unknown",
    ),
    "weights for a policy": (
        "ppo",
        good("ppo", weights=[1, 1, 1]),
        "loss_fn_inputs['weights']",
        "unknown",
    ),
    "a mask for ppo": (
        "ppo",
        good("ppo", sequence_ratio_mask=[1, 1, 1]),
        "loss_fn_inputs['sequence_ratio_mask']",
        "unknown",
    ),
    "bounds for dro": (
        "dro",
        good("dro", clip_low_threshold=[1, 1, 1]),
        "loss_fn_inputs['clip_low_threshold']",
        "unknown",
    ),
    "no targets": (
        "cross_entropy",
        good(target_tokens=None),
        "loss_fn_inputs['target_tokens']",
        "missing",
    ),
    "no weights": ("cross_entropy", good(weights=None), "loss_fn_inputs['weights']", "missing"),
    "no advantages": (
        "cispo",
        good("cispo", advantages=None),
        "loss_fn_inputs['advantages']",
        "missing",
    ),
    "no logprobs": ("dro", good("dro", logprobs=None), "loss_fn_inputs['logprobs']", "missing"),
    "no mask for gspo": (
        "gspo",
        good("gspo", sequence_ratio_mask=None),
        "loss_fn_inputs['sequence_ratio_mask']",
        "missing",
    ),
    "weights of one dimension": (
        "cross_entropy",
        good(target_tokens=[[4], [5], [6]]),
        "loss_fn_inputs['weights']",
        "(3,)",
    ),
    "weights of two": (
        "cross_entropy",
        good(weights=[[1, 0]] * 3),
        "loss_fn_inputs['weights']",
        "(3, 2)",
    ),
    "fewer weights than targets": (
        "cross_entropy",
        good(target_tokens=[[4, 5]] * 3, weights=[[1, 2, 3]] * 3),
        "loss_fn_inputs['weights']",
        "(3, 3)",
    ),
    "several targets for a policy": (
        "ppo",
        good("ppo", target_tokens=[[4, 5]] * 3),
        "loss_fn_inputs['target_tokens']",
        "(3, 2)",
    ),
    "no target at all": (
        "cross_entropy",
        good(target_tokens=np.zeros((3, 0)), weights=np.zeros((3, 0))),
        "loss_fn_inputs['target_tokens']",
        "(3, 0)",
    ),
    "a negative token": (
        "cross_entropy",
        make((3, -1, 5), **good().loss_fn_inputs),
        "model_input",
        "[1] is token -1,",
    ),
    "a token too large": (
        "cross_entropy",
        make((3, 4, VOCAB), **good().loss_fn_inputs),
        "model_input",
        f"[2] is token {VOCAB},",
    ),
    "a token beyond 64 bit": (
        "cross_entropy",
        make((2**70, 4, 5), **good().loss_fn_inputs),
        "model_input",
        f"{2**70}",
    ),
    "a negative target": (
        "ppo",
        good("ppo", target_tokens=[4, 5, -100]),
        "loss_fn_inputs['target_tokens']",
        "[2] is token -100",
    ),
    "a target too large": (
        "cross_entropy",
        good(target_tokens=[VOCAB, 5, 6]),
        "loss_fn_inputs['target_tokens']",
        "[0] is token",
    ),
    "a soft target too large": (
        "cross_entropy",
        good(target_tokens=[[4, 5], [6, 99], [7, 8]], weights=[[1, 1]] * 3),
        "loss_fn_inputs['target_tokens']",
        "[1, 1] is token 99",
    ),
    "a weight that is NaN": (
        "cross_entropy",
        good(weights=[1, float("nan"), 1]),
        "loss_fn_inputs['weights']",
        "[1] is nan",
    ),
    "a weight that is infinite": (
        "cross_entropy",
        good(weights=[1, 1, float("-inf")]),
        "loss_fn_inputs['weights']",
        "[2] is -inf",
    ),
    "a soft weight that is NaN": (
        "cross_entropy",
        good(target_tokens=[[4, 5]] * 3, weights=[[1, 1], [1, 1], [float("nan"), 1]]),
        "loss_fn_inputs['weights']",
        "[2, 0] is nan",
    ),
    "an infinite advantage": (
        "ppo",
        good("ppo", advantages=[0, float("inf"), 0]),
        "loss_fn_inputs['advantages']",
        "[1] is inf",
    ),
    "a NaN logprob": (
        "dro",
        good("dro", logprobs=[float("nan"), 0, 0]),
        "loss_fn_inputs['logprobs']",
        "[0] is nan",
    ),
    "a NaN bound": (
        "ppo",
        good("ppo", clip_high_threshold=[1, 1, float("nan")]),
        "loss_fn_inputs['clip_high_threshold']",
        "[2] is",
    ),
    "nothing to read": (
        "cross_entropy",
        make((), target_tokens=[], weights=[]),
        "model_input",
        "empty",
    ),
}


@pytest.mark.parametrize(("name", "wrong", "field", "said"), WRONG.values(), ids=list(WRONG))
def test_what_is_wrong_is_said_of_its_datum_and_field_alone(
    name: str, wrong: Datum, field: str, said: str
) -> None:
    found = message([good(name), wrong, good(name)], name)
    title, *problems, remedy = found.splitlines()
    assert name in title and name in remedy
    assert all(line.strip().startswith("data[1].") for line in problems)
    assert any(line.strip().startswith(f"data[1].{field}") and said in line for line in problems)


def test_no_data_is_refused() -> None:
    assert "data is empty" in message([])


def test_a_datum_longer_than_the_model_takes_is_refused_with_both_numbers() -> None:
    assert len(run([good()], max_tokens=3)) == 1
    found = message(
        [good(), make([3] * 1200, target_tokens=[4] * 1200, weights=[1] * 1200)], max_tokens=1100
    )
    assert "data[1].model_input has 1,200 positions, and the model takes 1,100" in found
    assert "data[0]" not in found


def test_everything_wrong_comes_in_one_message() -> None:
    found = message(
        [
            good(weights=None, mask=[1, 1, 1]),
            good(),
            make((3, 40, 5), target_tokens=[4, -1, 6], weights=[1, float("nan"), float("inf")]),
            make(()),
        ],
        max_tokens=2,
    )
    expected = [
        "data[0, 3].loss_fn_inputs['weights'] is missing",
        "data[0].loss_fn_inputs['mask'] is unknown",
        "data[0–2].model_input has 3 positions",
        "data[2].model_input[1] is token 40",
        "data[2].loss_fn_inputs['target_tokens'][1] is token -1",
        "data[2].loss_fn_inputs['weights'][1] is nan",
        "data[3].model_input is empty",
        "data[3].loss_fn_inputs['target_tokens'] is missing",
    ]
    assert [line for line in expected if line not in found] == []
    assert "takes: target_tokens, weights." in found.splitlines()[-1]


def test_of_very_many_problems_the_number_is_said() -> None:
    found = message([good(weights=None) for _ in range(1030)])
    assert "data[0–1029].loss_fn_inputs" in found
    assert len(found.splitlines()) == 3


def test_what_a_loss_takes_is_said_with_what_it_may_be_given() -> None:
    found = message([good("gspo", logprobs=None)], "gspo").splitlines()[-1]
    for name in ("target_tokens", "logprobs", "advantages", "sequence_ratio_mask"):
        assert re.search(rf"\b{name}\b(?! \(optional\))", found)
    for name in BOUNDS:
        assert f"{name} (optional)" in found


# ---- prepare: what it returns


@pytest.mark.parametrize("name", list(LOSSES))
def test_what_is_returned_collates(name: str) -> None:
    data = [
        good(name),
        Datum(
            ModelInput.from_ints([3]),
            {key: value[:1] for key, value in good(name).loss_fn_inputs.items()},
        ),
    ]
    ready = run(data, name)
    batch = collate([[datum] for datum in ready], pad_token_id=0)
    assert batch.spans == ((0, 0, 3), (1, 0, 1))
    assert set(batch.extras) == set(data[0].loss_fn_inputs) - {"target_tokens", "weights"}
    for row, datum in enumerate(data):
        length = len(datum)
        assert batch.targets[row, :length].tolist() == datum.targets.tolist()
        for key, tensor in batch.extras.items():
            assert tensor.dtype == torch.float32
            assert tensor[row, :length].tolist() == datum.loss_fn_inputs[key].tolist()
            assert not tensor[row, length:].any()
    if name == "cross_entropy":
        assert batch.weights.tolist() == [[0.0, 1.0, -0.5], [0.0, 0.0, 0.0]]
    else:  # 1 where there is a token
        assert batch.weights.tolist() == [[1.0, 1.0, 1.0], [1.0, 0.0, 0.0]]


def test_datums_of_one_and_of_several_targets_collate() -> None:
    soft = good(target_tokens=[[4, 5], [6, 7], [8, 9]], weights=[[0.5, 0.25], [-1, 0], [0, 1]])
    batch = collate([[datum] for datum in run([good(), soft])], pad_token_id=0)
    assert batch.targets.tolist() == [[[4, 0], [5, 0], [6, 0]], [[4, 5], [6, 7], [8, 9]]]
    assert batch.weights.tolist() == [[[0, 0], [1, 0], [-0.5, 0]], [[0.5, 0.25], [-1, 0], [0, 1]]]


@pytest.mark.parametrize("name", ["ppo", "cispo", "gspo"])
def test_where_one_datum_brings_bounds_the_others_have_those_of_the_knobs(name: str) -> None:
    data = [
        good(name),
        good(name, clip_low_threshold=[0.1, 0.2, 0.3]),
        good(name, clip_high_threshold=[7, 8, 9]),
    ]
    ready = run(data, name, knobs={"clip_low_threshold": 0.5, "clip_high_threshold": 2.5})
    found = [[datum.loss_fn_inputs[bound].tolist() for bound in BOUNDS] for datum in ready]
    given = np.array([0.1, 0.2, 0.3], np.float32).tolist()
    assert found == [[[0.5] * 3, [2.5] * 3], [given, [2.5] * 3], [[0.5] * 3, [7, 8, 9]]]
    assert set(collate([[datum] for datum in ready], 0).extras) >= set(BOUNDS)


def test_where_no_datum_brings_bounds_none_are_made() -> None:
    ready = run(
        [good("ppo"), good("ppo")],
        "ppo",
        knobs={"clip_low_threshold": 0.5, "clip_high_threshold": 2.5},
    )
    assert not {*BOUNDS} & {name for datum in ready for name in datum.loss_fn_inputs}


def test_without_knobs_a_datum_without_bounds_has_the_loss_s_own() -> None:
    _, filled = run([good("ppo", clip_high_threshold=[3, 3, 3]), good("ppo")], "ppo")
    assert filled.loss_fn_inputs["clip_high_threshold"].tolist() == [np.float32(1.2)] * 3


@pytest.mark.parametrize("name", list(LOSSES))
def test_what_was_given_is_left_as_it_was(name: str) -> None:
    datum = good(name)
    before = {key: array.tolist() for key, array in datum.loss_fn_inputs.items()}
    run([datum], name)
    assert {key: array.tolist() for key, array in datum.loss_fn_inputs.items()} == before


# ---- check_knobs


def test_knobs_that_are_not_given_have_their_defaults() -> None:
    assert check_knobs("ppo", LOSSES["ppo"], None) == {
        "clip_low_threshold": 0.8,
        "clip_high_threshold": 1.2,
    }
    assert check_knobs("dro", LOSSES["dro"], {}) == {"beta": 0.05}
    assert check_knobs("cispo", LOSSES["cispo"], {"clip_high_threshold": 2}) == {
        "clip_low_threshold": 0.0,
        "clip_high_threshold": 2,
    }
    assert check_knobs("cross_entropy", LOSSES["cross_entropy"], None) == {}


def test_numbers_of_numpy_are_numbers() -> None:
    given = {"clip_low_threshold": np.float32(0.5), "clip_high_threshold": np.int64(2)}
    assert check_knobs("ppo", LOSSES["ppo"], given) == {
        "clip_low_threshold": 0.5,
        "clip_high_threshold": 2,
    }


@pytest.mark.parametrize("name", list(LOSSES))
def test_an_unknown_knob_is_refused_with_those_that_there_are(name: str) -> None:
    with pytest.raises(DataError) as caught:
        check_knobs(name, LOSSES[name], {"epsilon": 0.2, "kl": 1.0})
    *_, remedy = str(caught.value).splitlines()
    assert "epsilon" in str(caught.value) and "kl" in str(caught.value)
    assert remedy.startswith(f"{name} takes: ")
    assert all(knob in remedy for knob in knobs_of(LOSSES[name]) or ["none"])


@pytest.mark.parametrize(
    "value", [float("nan"), float("inf"), "0.5", None, [0.5], 10**400], ids=lambda v: str(v)[:8]
)
def test_a_knob_that_is_no_finite_number_is_refused_by_name(value: Any) -> None:
    with pytest.raises(DataError, match=r"beta.*is not a finite number") as caught:
        check_knobs("dro", LOSSES["dro"], {"beta": value})
    assert "beta (0.05)" in str(caught.value)


def test_all_that_is_wrong_with_knobs_comes_in_one_message() -> None:
    with pytest.raises(DataError) as caught:
        check_knobs(
            "ppo",
            LOSSES["ppo"],
            {"clip_low": 0.2, "clip_low_threshold": float("nan"), "clip_high_threshold": "x"},
        )
    assert all(
        part in str(caught.value)
        for part in ("clip_low:", "clip_low_threshold=nan", "clip_high_threshold='x'")
    )


# ---- Datum

NO_ARRAYS: dict[str, Any] = {
    "text": "abc",
    "texts": ["a", "b", "c"],
    "numbers as text": ["1", "2", "3"],
    "ragged": [[1], [1, 2], [1]],
    "a dict": {"a": 1},
    "nested": [{}, {}, {}],
    "complex": [1j, 0, 0],
}


@pytest.mark.parametrize("name", ["weights", "target_tokens"])
@pytest.mark.parametrize("values", NO_ARRAYS.values(), ids=list(NO_ARRAYS))
def test_a_datum_takes_numbers_only(name: str, values: Any) -> None:
    with pytest.raises(DataError, match=rf"loss_fn_inputs\['{name}'\]"):
        make(**{name: values})


SHAPES: dict[str, tuple[str, Any]] = {
    "too few": ("weights", [1, 1]),
    "too many": ("target_tokens", [1, 1, 1, 1]),
    "none": ("advantages", []),
    "a number": ("weights", 1.0),
    "nothing": ("weights", None),
    "the other way round": ("target_tokens", np.zeros((2, 3))),
    "two dimensions of an advantage": ("advantages", np.zeros((3, 2))),
    "two dimensions of a log-probability": ("logprobs", np.zeros((3, 1))),
    "three dimensions": ("target_tokens", np.zeros((3, 1, 1))),
}


@pytest.mark.parametrize(("name", "values"), SHAPES.values(), ids=list(SHAPES))
def test_a_datum_takes_one_entry_per_position(name: str, values: Any) -> None:
    with pytest.raises(
        DataError,
        match=rf"loss_fn_inputs\['{name}'\] (has shape .* 3 positions|is not an array of numbers)",
    ):
        make(**{name: values})


@pytest.mark.parametrize(
    "values",
    [
        [4.0, 5.5, 6.0],
        np.array([4.0, np.nan, 6.0]),
        torch.tensor([4.0, 5.5, 6.0]),
        [2**70, 5, 6],
        [float("inf"), 5, 6],
    ],
    ids=["fraction", "NaN of numpy", "fraction of torch", "beyond 64 bit", "infinite"],
)
def test_a_token_that_is_no_whole_number_is_refused(values: Any) -> None:
    with pytest.raises(DataError, match="target_tokens"):
        run([good(target_tokens=values)])


@pytest.mark.parametrize(
    "values",
    [
        [0.5, -1, 2],
        (0.5, -1, 2),
        np.array([0.5, -1, 2]),
        np.array([0.5, -1, 2], np.float16),
        torch.tensor([0.5, -1, 2]),
        torch.tensor([0.5, -1, 2], requires_grad=True),
        torch.tensor([0.5, -1, 2], dtype=torch.bfloat16),
        torch.tensor([0.5, -1, 2], dtype=torch.float64),
        torch.tensor([[0.5, 9, -1, 9, 2]])[0, ::2],
    ],
    ids=[
        "list",
        "tuple",
        "float64",
        "float16",
        "torch",
        "with graph",
        "bfloat16",
        "torch float64",
        "strided",
    ],
)
def test_a_datum_takes_lists_arrays_and_tensors_alike(values: Any) -> None:
    weights = make(weights=values).weights
    assert weights.dtype == np.float32 and weights.tolist() == [0.5, -1.0, 2.0]


@pytest.mark.parametrize(
    "values",
    [[4, 5, 6], [4.0, 5.0, 6.0], np.array([4, 5, 6], np.int32), torch.tensor([4, 5, 6]).short()],
)
def test_target_tokens_are_whole_numbers_of_64_bit(values: Any) -> None:
    targets = make(target_tokens=values).targets
    assert targets.dtype == np.int64 and targets.tolist() == [4, 5, 6]


def test_a_datum_has_arrays_of_its_own_that_cannot_be_written() -> None:
    given = np.ones(3, np.float32)
    datum = make(weights=given)
    given[0] = 7.0
    assert datum.weights.tolist() == [1.0, 1.0, 1.0]
    with pytest.raises(ValueError, match="read-only"):
        datum.weights[0] = 2.0
    datum.weights.to_torch()[0] = 2.0  # a copy
    assert datum.weights.tolist() == [1.0, 1.0, 1.0]


def test_a_sequence_without_a_ratio_is_refused_where_it_would_train() -> None:
    def datum(advantage: float) -> Datum:
        ones = {name: [0.0, 0.0] for name in ("logprobs", "sequence_ratio_mask")}
        return Datum(
            ModelInput.from_ints([3, 4]),
            {"target_tokens": [4, 5], **ones, "advantages": [0.0, advantage]},
        )

    prepare([datum(0.0)], "gspo", LOSSES["gspo"], vocab_size=8)
    with pytest.raises(DataError, match=r"data\[1\].*sequence_ratio_mask.* is 0 everywhere"):
        prepare([datum(0.0), datum(1.0)], "gspo", LOSSES["gspo"], vocab_size=8)


def test_bounds_that_cross_are_refused() -> None:
    with pytest.raises(DataError, match="above clip_high_threshold"):
        check_knobs("ppo", LOSSES["ppo"], {"clip_low_threshold": 1.3})

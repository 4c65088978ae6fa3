"""The DataModule: the split, the state, the fingerprint, the number of batches, and settings
that cannot be.
"""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from data_toys import text_of, write_jsonl

from lorakit.data.datamodule import LoRADataModule
from lorakit.data.specs import BatchSpec, DataSpec, ImageSpec, RenderingSpec, RowSpec
from lorakit.errors import ConfigError, DataError


@pytest.fixture
def path(tmp_path: Path) -> str:
    rows = [{"prompt": f"row {n}:", "completion": " yes" * (1 + n % 5)} for n in range(30)]
    return write_jsonl(tmp_path / "rows.jsonl", rows)


def ready(tokenizer: Any, **settings: Any) -> LoRADataModule:
    """A module on which everything was called that comes before loaders."""
    module = LoRADataModule(**({"max_tokens": 64, "batch_size": 4, "window_rows": 7} | settings))
    module.check_rows()
    module.set_tokenizer(tokenizer)
    module.check_tokens()
    return module


@pytest.mark.parametrize(
    ("fraction", "count"), [(0.2, 6), (0.5, 15), (0.001, 1), (0.999, 29), (0.0, 0)]
)
def test_a_split_is_disjoint_complete_and_repeatable(
    path: str, fraction: float, count: int
) -> None:
    module, again = (LoRADataModule(path=path, val_fraction=fraction, seed=3) for _ in range(2))
    train, val = module.train_indices.tolist(), module.val_indices.tolist()
    assert len(val) == count
    assert not set(train) & set(val)
    assert sorted(train + val) == list(range(30))
    assert (again.train_indices.tolist(), again.val_indices.tolist()) == (train, val)


def test_another_seed_splits_differently(path: str) -> None:
    splits = {
        tuple(LoRADataModule(path=path, val_fraction=0.3, seed=seed).val_indices.tolist())
        for seed in range(5)
    }
    assert len(splits) == 5


def test_rows_for_evaluation_come_from_their_own_file_in_order(
    path: str, tmp_path: Path, tokenizer: Any
) -> None:
    val_path = write_jsonl(
        tmp_path / "val.jsonl", [{"prompt": f"v{n}", "completion": " no"} for n in range(5)]
    )
    module = ready(tokenizer, path=path, val_path=val_path, val_rows=3)
    assert len(module.train_indices) == 30 and module.val_indices.tolist() == [0, 1, 2]
    batches = list(module.val_dataloader())
    texts = [
        text_of(tokenizer, b.input_ids[row, start:end].tolist())
        for b in batches
        for row, start, end in b.spans
    ]
    assert [f"v{n}" in text for n, text in enumerate(texts)] == [True] * 3
    assert list(ready(tokenizer, path=path).val_dataloader()) == []


@pytest.mark.parametrize(
    "settings",
    [{}, {"packing": True, "pack_tokens": 100}, {"batch_size": None, "tokens_per_batch": 300}],
)
def test_the_padding_that_is_told_is_that_of_the_batches(
    settings: dict[str, Any], path: str, tokenizer: Any
) -> None:
    module = ready(tokenizer, path=path, window_rows=30, **settings)
    batches = list(module.train_dataloader())
    held = sum(end - start for batch in batches for _, start, end in batch.spans)
    share = 1 - held / sum(batch.input_ids.numel() for batch in batches)
    assert share > 0.01 and module.estimate_padding() == pytest.approx(share, abs=0.05)


@pytest.mark.parametrize("packing", [False, True])
def test_the_longest_batch_is_full_of_the_longest_row(
    packing: bool, path: str, tmp_path: Path, tokenizer: Any
) -> None:
    rows = [{"prompt": f"row {n}:", "completion": " yes" * (1 + 9 * (n == 17))} for n in range(30)]
    mixed = write_jsonl(tmp_path / "mixed.jsonl", rows)
    module = ready(
        tokenizer,
        path=mixed,
        batch_size=None,
        tokens_per_batch=200,
        packing=packing,
        pack_tokens=100 if packing else None,
    )
    batch, longest = module.longest_batch(), module.report.longest
    texts = [
        text_of(tokenizer, batch.input_ids[row, start:end].tolist())
        for row, start, end in batch.spans
    ]
    assert len(texts) == (2 * (100 // longest) if packing else 200 // longest) > 2
    assert all(
        "row 17:" in text and end - start == longest
        for text, (_, start, end) in zip(texts, batch.spans, strict=True)
    )
    ordinary = list(module.train_dataloader())
    assert (
        batch.input_ids.numel() >= max(made.input_ids.numel() for made in ordinary) - 100 * packing
    )
    assert float(batch.window_weight) == float(batch.weights.sum())


def test_the_longest_pair_stays_together(tmp_path: Path, tokenizer: Any) -> None:
    rows = [
        {"prompt": f"row {n}:", "chosen": " yes", "rejected": " no" * (1 + 9 * (n == 17))}
        for n in range(30)
    ]
    module = ready(
        tokenizer,
        path=write_jsonl(tmp_path / "pairs.jsonl", rows),
        batch_size=None,
        tokens_per_batch=200,
    )
    batch = module.longest_batch()
    texts = [
        text_of(tokenizer, batch.input_ids[row, start:end].tolist())
        for row, start, end in batch.spans
    ]
    assert len(texts) == 2 * batch.num_pairs > 2 and all("row 17:" in text for text in texts)
    assert ["yes" in text for text in texts] == [True, False] * batch.num_pairs


def test_prompts_for_samples_end_where_training_begins(path: str, tokenizer: Any) -> None:
    module = ready(tokenizer, path=path, val_fraction=0.2)
    expected = [tokenizer(f"row {index}:")["input_ids"] for index in module.val_indices[:4]]
    assert [prompt.to_ints() for prompt in module.val_prompts(4)] == expected


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"batch_size": 3},
        {"epochs": 3},
        {"window_rows": 30},
        {"window_rows": 1000},
        {"window_rows": 1},
        {"val_fraction": 0.3},
        {"shuffle": False},
        {"window_rows": 10, "batch_size": 5},
    ],
    ids=str,
)
def test_the_number_of_batches_is_known_beforehand_without_packing(
    path: str, tiny: Any, settings: dict[str, Any]
) -> None:
    module = ready(tiny, path=path, **settings)
    assert module.estimate_num_batches() == len(list(module.train_dataloader()))


def test_the_number_of_packed_batches_is_about_right_and_endless_epochs_have_none(
    path: str, tiny: Any
) -> None:
    packed = ready(tiny, path=path, packing=True, window_rows=1000, batch_size=1)
    assert packed.estimate_num_batches() == pytest.approx(
        len(list(packed.train_dataloader())), rel=0.3
    )
    by_tokens = ready(tiny, path=path, window_rows=20, batch_size=None, tokens_per_batch=200)
    assert by_tokens.estimate_num_batches() == pytest.approx(
        len(list(by_tokens.train_dataloader())), rel=0.3
    )
    assert ready(tiny, path=path, epochs=None).estimate_num_batches() is None


@pytest.mark.parametrize("packing", [False, True])
def test_the_state_goes_on_behind_the_last_batch_that_was_trained(
    path: str, tiny: Any, packing: bool
) -> None:
    def module() -> LoRADataModule:
        made = ready(tiny, path=path, packing=packing, epochs=2, seed=1, val_fraction=0.1)
        made.trainer = SimpleNamespace(
            training=True, accumulate_grad_batches=2, global_rank=0, world_size=1
        )
        return made

    first = module()
    whole = list(first.train_dataloader())
    for done in (2, 4, 6, len(whole) // 2 * 2):
        first.transfer_batch_to_device(whole[done - 1], torch.device("cpu"), 0)
        second = module()
        second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        rest = list(second.train_dataloader())
        assert len(rest) == len(whole) - done
        for batch, other in zip(rest, whole[done:], strict=True):
            assert (
                torch.equal(batch.input_ids, other.input_ids)
                and batch.window_weight == other.window_weight
            )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tokens_per_batch": 63}, "tokens_per_batch=63 is less than one row of 64 tokens"),
        (
            {"tokens_per_batch": 127, "packing": True, "pack_tokens": 128},
            "less than one row of 128 tokens",
        ),
        ({"tokens_per_batch": 64, "batch_size": 1}, "both set; set one of them to null"),
    ],
    ids=str,
)
def test_a_micro_batch_that_holds_no_row_is_refused(
    path: str, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        LoRADataModule(path=path, max_tokens=64, **settings)


def test_batches_of_evaluation_do_not_move_the_cursor(path: str, tiny: Any) -> None:
    module = ready(tiny, path=path, val_fraction=0.3)
    module.trainer = SimpleNamespace(
        training=False, accumulate_grad_batches=1, global_rank=0, world_size=1
    )
    before = module.state_dict()
    for batch in module.val_dataloader():
        module.transfer_batch_to_device(batch, torch.device("cpu"), 0)
    assert (
        module.state_dict()
        == before
        == {"cursor": {"epoch": 0, "window_start": 0, "batches_done": 0}}
    )


def test_the_fingerprint_changes_with_the_data_and_with_every_setting_of_order_or_mask(
    path: str, tmp_path: Path
) -> None:
    base = {"path": path, "max_tokens": 64}
    changes: list[dict[str, Any]] = [
        {},
        {"seed": 1},
        {"batch_size": 3},
        {"window_rows": 5},
        {"shuffle": False},
        {"packing": True},
        {"packing": True, "pack_tokens": 99},
        {"tokens_per_batch": 256},
        {"max_tokens": 32},
        {"on_long": "drop"},
        {"on_error": "skip"},
        {"append_eos": True},
        {"stop": "\n"},
        {"train_on": "all_tokens"},
        {"format": "prompt_completion"},
        {"val_fraction": 0.1},
    ]
    prints = [LoRADataModule(**(base | change)).fingerprint for change in changes]
    assert len(set(prints)) == len(prints)
    copy = tmp_path / "elsewhere.jsonl"
    copy.write_bytes(Path(path).read_bytes())
    assert LoRADataModule(**(base | {"path": str(copy)})).fingerprint == prints[0]
    copy.write_bytes(Path(path).read_bytes().replace(b"row 7:", b"row 8:"))
    assert LoRADataModule(**(base | {"path": str(copy)})).fingerprint not in prints


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"on_error": "ignore"}, "data.on_error=ignore"),
        ({"val_fraction": 1.0}, "val_fraction=1.0"),
        ({"val_fraction": -0.1}, "val_fraction"),
        ({"val_fraction": 0.1, "val_path": "x"}, "both set"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"train_on": "assistant"}, "last_assistant_message"),
        ({"on_long": "cut"}, "truncate_prompt"),
        ({"packing": True, "pack_tokens": 8, "max_tokens": 9}, "pack_tokens=8"),
    ],
)
def test_a_setting_that_cannot_be_is_named_with_the_choices(
    settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        LoRADataModule(**({"path": "x"} | settings))


def test_rows_are_checked_without_a_tokenizer_and_tokens_before_any_batch(
    tmp_path: Path, tiny: Any
) -> None:
    bad = write_jsonl(tmp_path / "bad.jsonl", [{"prompt": "a", "completion": "b"}, {"prompt": "a"}])
    with pytest.raises(DataError, match=r"bad\.jsonl:2"):
        LoRADataModule(path=bad).check_rows()
    module = LoRADataModule(
        path=write_jsonl(tmp_path / "long.jsonl", [{"text": "x" * 99}]), max_tokens=20
    )
    module.check_rows()
    module.set_tokenizer(tiny)
    with pytest.raises(DataError, match=r"long\.jsonl:1: .*data.max_tokens=20"):
        module.setup()


def test_one_row_cannot_be_split(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="at least 2 rows"):
        LoRADataModule(
            path=write_jsonl(tmp_path / "one.jsonl", [{"text": "x"}]), val_fraction=0.5
        ).train_indices
    module = LoRADataModule(
        path=write_jsonl(tmp_path / "two.jsonl", [{"text": "x"}] * 2), val_fraction=0.99
    )
    assert (
        np.concatenate([module.train_indices, module.val_indices]).size == 2
        and len(module.train_indices) == 1
    )


def test_specs_and_flat_keywords_say_the_same(tmp_path: Path) -> None:
    keywords = {"path": "rows.jsonl", "max_tokens": 64, "packing": True, "seed": 3, "max_pixels": 9}
    flat = LoRADataModule(**keywords).spec
    parts = LoRADataModule(
        rows=RowSpec(path="rows.jsonl"),
        rendering=RenderingSpec(max_tokens=64),
        batches=BatchSpec(packing=True, seed=3),
        images=ImageSpec(max_pixels=9),
    ).spec
    assert flat == parts
    assert flat.keywords() == DataSpec.from_keywords(flat.keywords()).keywords()
    assert flat.row_tokens() == 64 and RowSpec(path="x").title == "x"
    assert flat.row_tokens(are_pairs=True) == 128


def test_a_keyword_beside_its_own_spec_or_of_none_is_refused() -> None:
    with pytest.raises(TypeError, match="unexpected keyword arguments: max_tokens"):
        LoRADataModule(path="a.jsonl", rendering=RenderingSpec(), max_tokens=3)
    with pytest.raises(TypeError, match="unexpected keyword arguments: max_token"):
        LoRADataModule(path="a.jsonl", max_token=3)


def test_what_is_wrong_in_several_specs_is_told_at_once() -> None:
    with pytest.raises(ConfigError) as error:
        LoRADataModule(path="a.jsonl", val_fraction=2.0, max_tokens=0, batch_size=0, epochs=0)
    said = str(error.value)
    assert "data.val_fraction=2.0" in said and "data.max_tokens=0" in said
    assert "data.batch_size=0, data.epochs=0: must be at least 1" in said


def test_help_and_checks_see_every_keyword() -> None:
    parameters = inspect.signature(LoRADataModule).parameters
    assert {"rows", "path", "max_tokens", "packing", "min_pixels"} <= parameters.keys()
    assert parameters["max_tokens"].default == 1024
    assert "keywords" not in parameters

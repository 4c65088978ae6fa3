"""Several sources of rows: how often each row is seen, what is logged of each, and columns by
any name.
"""

from __future__ import annotations

import json
import shlex
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_toys import write_jsonl

from lorakit.cli.compose import prepare_arguments
from lorakit.data.datamodule import LoRADataModule
from lorakit.data.read.sources import SourceSpec, name_sources, open_source, read_mixed
from lorakit.errors import ConfigError, DataError


def pairs(count: int, mark: str) -> list[dict[str, str]]:
    return [{"prompt": f"{mark}{i}", "completion": f" {mark}"} for i in range(count)]


@pytest.fixture
def mixed(tmp_path: Path, tiny: Any) -> Any:
    """A DataModule over two sources of 6 and 10 rows, whose weights are given."""

    def make(first: float, second: float, **options: Any) -> LoRADataModule:
        paths = [
            write_jsonl(tmp_path / f"{name}.jsonl", pairs(count, name))
            for name, count in (("a", 6), ("b", 10))
        ]
        entries = [
            {"path": path, "weight": weight}
            for path, weight in zip(paths, (first, second), strict=True)
        ]
        data = LoRADataModule(sources=entries, **{"batch_size": 4} | options)
        data.set_tokenizer(tiny)
        data.check_tokens()
        return data

    return make


@pytest.mark.parametrize(("first", "second"), [(1.0, 1.0), (2.0, 0.5), (1.5, 0.3), (0.5, 3.0)])
def test_a_weight_is_how_often_each_row_is_seen(mixed: Any, first: float, second: float) -> None:
    data = mixed(first, second, epochs=10)
    counts = Counter(index for epoch in range(10) for index in data.mixture.rows(epoch).tolist())
    assert {counts[index] for index in range(6)} == {round(first * 10)}
    assert {counts[index] for index in range(6, 16)} == {round(second * 10)}
    assert all(
        abs(len(data.mixture.rows(epoch)) - data.mixture.num_rows) < 2 for epoch in range(10)
    )
    assert data.mixture.num_rows == pytest.approx(first * 6 + second * 10)


def test_a_share_of_few_rows_is_carried_over_to_the_next_epoch(tmp_path: Path, tiny: Any) -> None:
    one, three = (write_jsonl(tmp_path / f"{count}.jsonl", pairs(count, "x")) for count in (1, 3))
    data = LoRADataModule(
        sources=[{"path": one, "weight": 0.25}, {"path": three, "weight": 0.5}], epochs=8
    )
    data.check_rows()
    counts = Counter(index for epoch in range(8) for index in data.mixture.rows(epoch).tolist())
    assert counts == {0: 2, 1: 4, 2: 4, 3: 4}
    with pytest.raises(
        ConfigError,
        match=r"1\.jsonl has weight 0\.25 and too few rows for it: none is seen in data\.epochs=1",
    ):
        LoRADataModule(sources=[{"path": one, "weight": 0.25}, three]).check_rows()


@pytest.mark.parametrize(
    "options",
    [
        {"packing": True, "batch_size": 2},
        {"batch_size": None, "tokens_per_batch": 256},
        {"batch_size": 4},
    ],
    ids=str,
)
@pytest.mark.parametrize("turned", [False, True])
def test_the_number_of_steps_is_estimated_from_all_sources(
    tmp_path: Path, tiny: Any, options: Any, turned: bool
) -> None:
    short = write_jsonl(tmp_path / "short.jsonl", pairs(300, "s"))
    long = write_jsonl(
        tmp_path / "long.jsonl", [{"prompt": "p" * 60, "completion": "c" * 60} for _ in range(300)]
    )
    entries = [{"path": short, "weight": 1.0}, {"path": long, "weight": 0.5}]
    data = LoRADataModule(
        sources=entries[::-1] if turned else entries,
        max_tokens=128,
        window_rows=128,
        epochs=2,
        **options,
    )
    data.set_tokenizer(tiny)
    data.check_tokens()
    made = len(list(data.train_dataloader()))
    assert data.estimate_num_batches() == pytest.approx(made, rel=0.15)


def test_held_out_rows_have_no_weights(mixed: Any, capsys: Any) -> None:
    from rich.console import Console

    from lorakit.pipeline.printing import print_data_report

    data = mixed(2.0, 0.5, val_fraction=0.25)
    print_data_report(data, Console(soft_wrap=True))
    assert capsys.readouterr().out.count("times an epoch") == 2  # of the training rows alone


def test_the_stream_has_the_mixture_and_says_of_each_example_where_it_is_from(
    mixed: Any, tiny: Any
) -> None:
    data = mixed(2.0, 0.5, shuffle=True)
    batches = list(data.train_dataloader())
    assert data.estimate_num_batches() == len(batches) == 5  # 12 + 5 rows in batches of 4
    origins = Counter(origin for batch in batches for origin in batch.origins)
    assert origins == {0: 12, 1: 5}
    for batch in batches:
        for (row, start, end), origin in zip(batch.spans, batch.origins, strict=True):
            assert set(batch.origin_ids[row, start:end].tolist()) == {origin}
            assert tiny.decode(batch.input_ids[row, start]) == "ab"[origin]


def test_a_packed_row_may_have_examples_of_several_sources(mixed: Any) -> None:
    data = mixed(1.0, 1.0, packing=True, max_tokens=64, batch_size=1)
    (batch, *_) = data.train_dataloader()
    assert set(batch.origins) == {0, 1}
    for row, start, end in batch.spans:
        assert len(set(batch.origin_ids[row, start:end].tolist())) == 1


def test_the_report_counts_each_source(mixed: Any, capsys: Any) -> None:
    from rich.console import Console

    from lorakit.pipeline.printing import print_data_report

    data = mixed(2.0, 0.5)
    shares = data.report.shares
    assert {name: (share.num_rows, share.num_trained_tokens) for name, share in shares.items()} == {
        "a": (6, 18),
        "b": (10, 30),
    }
    print_data_report(data, Console(soft_wrap=True))
    said = capsys.readouterr().out
    assert (
        "a: 6 rows, 2 times an epoch, 70.6% of the trained tokens" in said
        and "b: 10 rows, 0.5 times" in said
    )


def test_the_survey_looks_at_each_source(mixed: Any) -> None:
    data = mixed(1.0, 1.0, check_token_rows=4)
    assert {share.num_rows_profiled for share in data.report.shares.values()} == {2}


def test_a_fit_goes_on_in_the_middle_of_a_mixture(mixed: Any) -> None:
    data = mixed(1.5, 0.5, epochs=2)
    batches = list(data.train_dataloader())
    data.load_state_dict({"cursor": batches[2].cursor.to_dict()})
    assert [b.input_ids.tolist() for b in data.train_dataloader()] == [
        b.input_ids.tolist() for b in batches[3:]
    ]


def test_weights_belong_to_the_fingerprint(mixed: Any) -> None:
    assert mixed(1.0, 1.0).fingerprint != mixed(2.0, 1.0).fingerprint


def test_sources_have_names_all_different() -> None:
    entries = [
        SourceSpec("x/train.jsonl"),
        SourceSpec("y/train.jsonl"),
        SourceSpec("z", name="mine"),
        SourceSpec("org/data"),
        SourceSpec("train-2"),
    ]
    assert name_sources(entries) == ["train", "train-2", "mine", "data", "train-2-2"]


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ([], "is empty"),
        ([{"weight": 2}], "write a path"),
        (
            [{"path": "a", "wieght": 2}],
            r"unknown key data.sources\[0\].wieght; did you mean weight",
        ),
        ([{"path": "a", "weight": "x"}], r"data.sources\[0\]: expected"),
        ([{"path": "a", "weight": 0}], "must be above 0"),
        ([{"path": "a", "weight": float("inf")}], "must be above 0"),
    ],
)
def test_entries_that_cannot_be_used_are_said(entries: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        read_mixed(entries)


def test_path_and_sources_exclude_one_another() -> None:
    with pytest.raises(ConfigError, match="both set"):
        LoRADataModule(path="a", sources=["b"])
    with pytest.raises(ConfigError, match=r"set data\.path"):
        LoRADataModule()


def test_problems_of_all_sources_come_together(tmp_path: Path) -> None:
    first = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "a", "completion": 1}])
    data = LoRADataModule(sources=[first, str(tmp_path / "absent.jsonl")])
    with pytest.raises(DataError) as caught:
        data.check_rows()
    assert "a.jsonl:1" in str(caught.value) and "absent.jsonl: no such file" in str(caught.value)


# ---- columns by any name


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    if path.suffix == ".jsonl":
        return write_jsonl(path, rows)
    if path.suffix == ".json":
        path.write_text(json.dumps(rows), encoding="utf-8")
        return str(path)
    import datasets

    table = datasets.Dataset.from_list(rows)
    table.to_csv(str(path), index=False) if path.suffix == ".csv" else table.to_parquet(str(path))
    return str(path)


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
def test_columns_say_what_the_data_calls_ours(tmp_path: Path, suffix: str) -> None:
    rows = [{"question": "q", "the answer": " a", "prompt": "not this", "id": "7"}]
    path = write(tmp_path / f"a{suffix}", rows)
    source = open_source(path, columns={"prompt": "question", "completion": "the answer"})
    row: Any = source.row(0)
    assert (row.prompt, row.completion, source.formats) == ("q", " a", ["prompt_completion"])
    assert set(source.unused_columns) == {"prompt", "id"}


def test_messages_and_tools_have_other_names_too(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    path = write_jsonl(tmp_path / "a.jsonl", [{"chat": turns, "functions": "[]"}])
    row: Any = open_source(path, columns={"messages": "chat", "tools": "functions"}).row(0)
    assert row.messages[1].content == "a" and row.tools == "[]"


@pytest.mark.parametrize(
    ("present", "guess"),
    [
        (["question", "answer"], "data.columns={prompt: question, completion: answer}"),
        (["id", "Query", "Response"], "data.columns={prompt: Query, completion: Response}"),
        (["dialog"], "data.columns={messages: dialog}"),
        (["my text", "other"], 'data.columns={prompt: "my text", completion: other}'),
        (["content"], "data.columns={text: content}"),
        (["zzz"], "data.columns={text: zzz}"),
    ],
)
def test_a_file_that_is_not_recognised_says_what_to_type_and_that_works(
    tmp_path: Path, present: list[str], guess: str
) -> None:
    from hydra.core.override_parser.overrides_parser import OverridesParser

    is_chat = "messages:" in guess
    said: Any = (
        [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
        if is_chat
        else "x"
    )
    path = write_jsonl(tmp_path / "a.jsonl", [dict.fromkeys(present, said)])
    with pytest.raises(DataError) as caught:
        open_source(path)
    typed = str(caught.value).splitlines()[-1].strip()
    assert f"found: {', '.join(present)}" in str(caught.value) and shlex.split(typed) == [guess]
    *_, override = prepare_arguments([*shlex.split(typed), "data.path=x"])[:1]
    columns = OverridesParser.create().parse_override(override).value()
    assert len(open_source(path, columns={str(k): str(v) for k, v in columns.items()})) == 1


def test_columns_that_are_not_there_or_not_ours_are_errors(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"question": "q", "answer": "a"}])
    with pytest.raises(
        DataError, match=r"data.columns names qestion \(for prompt\), which is not there"
    ):
        open_source(path, columns={"prompt": "qestion", "completion": "answer"})
    with pytest.raises(ConfigError, match="promt is none of ours; did you mean prompt"):
        open_source(path, columns={"promt": "question"})
    with pytest.raises(ConfigError, match="question two meanings"):
        open_source(path, columns={"prompt": "question", "completion": "question"})


@pytest.mark.parametrize("suffix", [".jsonl", ".csv"])
def test_a_mapping_that_would_do_nothing_is_an_error(tmp_path: Path, suffix: str) -> None:
    rows = [{"instruction": "i", "context": "c", "output": "o"}]
    path = write(tmp_path / f"a{suffix}", rows)
    with pytest.raises(DataError, match="text, which rows of alpaca do not have"):
        open_source(path, columns={"text": "context"})
    with pytest.raises(
        DataError, match="input is called contxt, and no such column is there; did you mean context"
    ):
        open_source(path, columns={"input": "contxt"})
    row: Any = open_source(path, columns={"input": "context"}).row(0)
    assert row.input == "c"


def test_a_column_may_bear_the_name_of_another_of_ours(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"input": "ask", "output": "say"}])
    row: Any = open_source(path, columns={"instruction": "input"}).row(0)
    assert (row.instruction, row.input, row.output) == ("ask", None, "say")
    with pytest.raises(
        ConfigError,
        match="gives `completion` another meaning, and rows of prompt_completion need it",
    ):
        open_source(path, format="prompt_completion", columns={"prompt": "completion"})


def test_each_source_may_have_columns_of_its_own(tmp_path: Path) -> None:
    first = write_jsonl(tmp_path / "a.jsonl", [{"question": "q", "answer": "a"}])
    second = write_jsonl(tmp_path / "b.jsonl", pairs(2, "b"))
    data = LoRADataModule(
        sources=[{"path": first, "columns": {"prompt": "question", "completion": "answer"}}, second]
    )
    data.check_rows()
    assert len(data.source) == 3 and np.array_equal(data.source.origins_of(np.arange(3)), [0, 1, 1])

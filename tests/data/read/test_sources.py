"""Paths and names to rows: every suffix, folders, globs, bundled names, the hub without a
network, odd file names.
"""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path
from typing import Any, NoReturn

import pytest
from data_toys import write_jsonl

from lorakit.data.read.sources import Source, open_source
from lorakit.errors import ConfigError, DataError
from lorakit.hub import find_hub_problem

ROWS = [
    {"prompt": "NA", "completion": "007"},
    {"prompt": 'é, "q"', "completion": "1.50\n2"},
    {"prompt": "", "completion": "null"},
]


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    """Write ``rows`` in the format of the suffix; ``.csv`` and ``.parquet`` by other means than
    lorakit's.
    """
    if path.suffix == ".csv":
        import csv

        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    else:
        write_jsonl(path, rows)
    return str(path)


def read(source: Source) -> list[dict[str, str]]:
    return [
        {"prompt": source.row(i).prompt, "completion": source.row(i).completion}
        for i in range(len(source))
    ]


@pytest.mark.parametrize("suffix", [".jsonl", ".ndjson", ".json", ".csv", ".parquet"])
def test_a_file_of_any_type_gives_its_rows_as_text_and_in_order(
    tmp_path: Path, suffix: str
) -> None:
    source = open_source(write(tmp_path / f"rows{suffix}", ROWS))
    assert read(source) == ROWS
    assert source.formats == ["prompt_completion"]
    end = ":2" if suffix in (".jsonl", ".ndjson") else ": row 2"
    assert source.where(1) == f"{tmp_path / 'rows'}{suffix}{end}"


@pytest.mark.parametrize("suffix", [".json", ".parquet"])
def test_nulls_that_a_table_adds_to_records_are_not_part_of_a_row(
    tmp_path: Path, suffix: str
) -> None:
    call = [{"type": "function", "function": {"name": "f"}}]
    rows = [
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "tool_calls": call}]},
        {
            "messages": [
                {"role": "user", "content": "a"},
                {"role": "assistant", "content": "b", "weight": -0.5},
            ]
        },
    ]
    source = open_source(write(tmp_path / f"chat{suffix}", rows))
    first, second = source.row(0).messages, source.row(1).messages
    assert (first[1].content, first[1].tool_calls, first[1].weight) == (None, call, None)
    assert (second[1].content, second[1].tool_calls, second[1].weight) == ("b", None, -0.5)


def test_json_may_hold_lines_instead_of_an_array(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("\ufeff\n" + "\n".join(map(json.dumps, ROWS)))
    source = open_source(str(tmp_path / "a.json"))
    assert read(source) == ROWS and source.where(0).endswith("a.json:2")


@pytest.mark.parametrize("suffix", [".json", ".parquet", ".csv"])
def test_bad_rows_of_a_table_are_named_by_number_and_skipped_on_request(
    tmp_path: Path, suffix: str
) -> None:
    rows = [dict(ROWS[0]), {"prompt": "x", "completion": ""}, dict(ROWS[1])] * 15
    path = write(tmp_path / f"rows{suffix}", rows)
    with pytest.raises(DataError, match="15 of 45 rows") as error:
        open_source(path)
    assert (
        f"rows{suffix}: row 2, 5, 8, 11, 14, 17, 20, 23, 26, 29, 32, 35, 38, 41, 44: `comp"
        in str(error.value)
    )
    source = open_source(path, on_error="skip")
    assert (len(source), source.num_skipped) == (30, 15)
    assert source.where(2).endswith("row 4") and source.row(3).prompt == ROWS[1]["prompt"]


def test_missing_and_mistyped_cells_of_a_json_array_are_named_by_row(tmp_path: Path) -> None:
    rows = [ROWS[0], {"prompt": "only"}, {"prompt": ["list"], "completion": "c"}]
    with pytest.raises(DataError) as error:
        open_source(write(tmp_path / "a.json", rows))
    assert "row 2: " in str(error.value) and "row 3: wrong type" in str(error.value)


def test_a_malformed_json_array_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('[{"prompt": "a", "completion": "b"},\n{"prompt": }]')
    with pytest.raises(DataError, match=r"a\.json: cannot be read"):
        open_source(str(tmp_path / "a.json"))


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.csv", ""),
        ("b.csv", "prompt,completion\n"),
        ("a.json", ""),
        ("b.json", "[]"),
        ("a.parquet", ""),
    ],
)
def test_a_table_without_rows_is_an_error(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=name):
        open_source(str(tmp_path / name))


def test_a_table_of_unknown_columns_says_what_it_has(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="question, answer"):
        open_source(write(tmp_path / "a.csv", [{"question": "q", "answer": "a"}]))


def test_a_folder_gives_all_its_files_in_order_and_names_each_row(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    write(tmp_path / "b.csv", ROWS[:1])
    write(tmp_path / "a.jsonl", ROWS[1:])
    write(tmp_path / "deep" / "c.parquet", ROWS)
    (tmp_path / "notes.md").write_text("not data")
    source = open_source(str(tmp_path))
    assert read(source) == [*ROWS[1:], *ROWS[:1], *ROWS]
    assert [Path(source.where(i).split(":")[0]).name for i in (0, 1, 2, 3, 5)] == [
        "a.jsonl"
    ] * 2 + ["b.csv"] + ["c.parquet"] * 2
    with pytest.raises(IndexError):
        source.row(6)


def test_problems_of_several_files_come_in_one_report(tmp_path: Path) -> None:
    for name in ("a.jsonl", "b.jsonl"):
        write_jsonl(tmp_path / name, [ROWS[0], {"prompt": 3, "completion": "c"}])
    with pytest.raises(DataError, match="2 of 4 rows") as error:
        open_source(str(tmp_path))
    assert "a.jsonl:2" in str(error.value) and "b.jsonl:2" in str(error.value)


def test_a_glob_gives_the_files_it_matches_and_none_is_an_error(tmp_path: Path) -> None:
    for name in ("x1.jsonl", "x2.jsonl", "y.jsonl"):
        write_jsonl(tmp_path / name, [{"text": name}])
    source = open_source(str(tmp_path / "x*.jsonl"))
    assert [source.row(i).text for i in range(len(source))] == ["x1.jsonl", "x2.jsonl"]
    with pytest.raises(DataError, match="matches no file"):
        open_source(str(tmp_path / "z*.jsonl"))


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet", ".json", ".txt"])
@pytest.mark.parametrize("name", ["a b", "a,b", 'it\'s "q"', "日本é", "k=v", "(1)", "100%#?"])
def test_any_file_name_is_taken_verbatim(tmp_path: Path, name: str, suffix: str) -> None:
    folder = tmp_path / name
    folder.mkdir()
    path = folder / f"{name}{suffix}"
    path.write_text("hello") if suffix == ".txt" else write(path, [{"text": "hello"}])
    for given in (path, folder):
        source = open_source(str(given))
        assert (len(source), source.row(0).text) == (1, "hello")
        assert source.where(0).startswith(str(path))


def test_a_file_whose_name_looks_like_a_glob_is_that_file(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "data1.jsonl", [{"text": "other"}])
    assert (
        open_source(write_jsonl(tmp_path / "data[1].jsonl", [{"text": "this"}])).row(0).text
        == "this"
    )


def test_a_bundled_set_is_found_by_its_name() -> None:
    assert (len(open_source("pig_latin/train")), len(open_source("pig_latin/heldout"))) == (
        8_000,
        500,
    )


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("rows.jsonl", "no such file.*did you mean row.jsonl"),
        ("rows.xml", "unknown file type '.xml'"),
        ("./none/here", "no such file"),
        ("./none", "no such file"),
    ],
)
def test_a_path_that_cannot_be_read_says_why(
    tmp_path: Path, monkeypatch: Any, path: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "row.jsonl", [{"text": "x"}])
    (tmp_path / "rows.xml").write_text("<x/>")
    with pytest.raises(DataError, match=message):
        open_source(path)


def test_a_folder_without_data_and_an_unknown_format_are_errors(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no file in this folder"):
        open_source(str(tmp_path))
    with pytest.raises(ConfigError, match="prompt_completion"):
        open_source(str(tmp_path), format="prompts")


@pytest.mark.parametrize("name", ["nobody/no-such-set", "nosuchset"])
def test_a_hub_name_offline_is_one_clear_error_at_once(name: str, monkeypatch: Any) -> None:
    def refuse(*args: Any) -> NoReturn:
        raise AssertionError("the network was touched")

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    find_hub_problem.cache_clear()
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    with pytest.raises(DataError, match=f"^{name}: .*HF_HUB_OFFLINE=1"):
        open_source(name)


def test_the_fingerprint_follows_the_bytes_and_not_the_place(tmp_path: Path) -> None:
    a, b = (
        open_source(write(tmp_path / "a.jsonl", ROWS)),
        open_source(write(tmp_path / "b.jsonl", ROWS)),
    )
    changed = open_source(
        write(tmp_path / "c.jsonl", [*ROWS[:2], {"prompt": "", "completion": "nulL"}])
    )
    assert a.fingerprint == b.fingerprint != changed.fingerprint
    assert (
        open_source(write(tmp_path / "a.csv", ROWS)).fingerprint
        != open_source(write(tmp_path / "b.csv", ROWS[:2])).fingerprint
    )


def test_a_csv_row_with_too_many_cells_is_a_problem_and_shifts_nothing(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("prompt,completion\nX,a,b\nY,c\n")
    with pytest.raises(DataError, match="row 1: 3 cells, but the header has 2"):
        open_source(str(tmp_path / "a.csv"))
    source = open_source(str(tmp_path / "a.csv"), on_error="skip")
    assert (source.row(0).prompt, source.row(0).completion, source.num_skipped) == ("Y", "c", 1)


def test_a_csv_rewritten_under_the_same_time_stamp_is_read_anew(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    for word in ("old", "new"):
        path.write_text(f"prompt,completion\nq,{word}\n")
        os.utime(path, (1_000_000_000, 1_000_000_000))
        assert open_source(str(path)).row(0).completion == word


def test_a_csv_with_brackets_in_its_name_is_itself(tmp_path: Path) -> None:
    for name in ("data1.csv", "data[1].csv"):
        (tmp_path / name).write_text(f"prompt,completion,\nq,{name},3\n")
    assert open_source(str(tmp_path / "data[1].csv")).row(0).completion == "data[1].csv"


def test_a_csv_that_is_not_utf8_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b"prompt,completion\nq,caf\xe9\n")
    with pytest.raises(DataError, match=r"a\.csv: not UTF-8"):
        open_source(str(tmp_path / "a.csv"))


def test_dates_in_a_json_array_stay_text(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('[{"prompt": "2024-01-01", "completion": "2024-01-02"}]')
    assert open_source(str(tmp_path / "a.json")).row(0).prompt == "2024-01-01"


def test_a_parquet_file_is_read_and_its_rows_are_named(tmp_path: Path) -> None:
    import datasets

    rows = [{"prompt": "a", "completion": "b"}, {"prompt": "c", "completion": ""}]
    datasets.Dataset.from_list(rows).to_parquet(str(tmp_path / "a[0].parquet"))
    with pytest.raises(DataError, match="row 2: `completion` is empty"):
        open_source(str(tmp_path / "a[0].parquet"))

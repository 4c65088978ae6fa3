"""Files of one row per line: every row is read, and every fault named by its line, whatever the
line ends and blanks.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from data_toys import write_jsonl

from lorakit.data.read.sources import open_source
from lorakit.errors import DataError

GOOD = '{"prompt": "p", "completion": "c"}'


def open_bytes(folder: Path, data: bytes, name: str = "rows.jsonl", **options: str):
    (folder / name).write_bytes(data)
    return open_source(str(folder / name), **options)


def test_a_malformed_line_is_named_by_file_and_line(tmp_path: Path) -> None:
    with pytest.raises(DataError) as error:
        open_bytes(tmp_path, f'{GOOD}\n{{"prompt": "p", "completion"\n{GOOD}\n'.encode())
    assert f"{tmp_path / 'rows.jsonl'}:2: malformed JSON" in str(error.value)
    assert "1 of 3 rows" in str(error.value)


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("last", ["", "end", "blank"])
def test_line_numbers_count_blank_lines_whatever_ends_them(
    tmp_path: Path, end: str, bom: bytes, last: str
) -> None:
    rows = [
        json.dumps({"prompt": f"é{n}", "completion": "c"}, ensure_ascii=False) for n in range(3)
    ]
    text = (
        end.join([rows[0], "", " \t", rows[1], "[oops", "", rows[2]])
        + {"": "", "end": end, "blank": end + " " + end}[last]
    )
    source = open_bytes(tmp_path, bom + text.encode(), on_error="skip")
    assert [source.row(i).prompt for i in range(len(source))] == ["é0", "é1", "é2"]
    assert [source.where(i).rsplit(":", 1)[1] for i in range(3)] == ["1", "4", "7"]
    assert [where.split(":")[1] for where, _ in source.files[0].problems] == ["5"]
    assert source.num_skipped == 1


def test_leading_blank_lines_are_counted_too(tmp_path: Path) -> None:
    source = open_bytes(tmp_path, f"\n\n{GOOD}".encode())
    assert source.where(0).endswith("rows.jsonl:3")


def test_all_problems_come_in_one_report_with_20_shown_and_the_total(tmp_path: Path) -> None:
    lines = [GOOD if n % 2 else '{"prompt": 5, "completion": "c"}' for n in range(2_500)]
    with pytest.raises(DataError) as error:
        open_bytes(tmp_path, "\n".join(["", GOOD, *lines]).encode())
    message = str(error.value)
    (shown,) = [line for line in message.splitlines() if "wrong type" in line]
    lines = ", ".join(map(str, range(3, 43, 2)))
    assert f"rows.jsonl:{lines} and 1,230 more: " in shown
    assert "1,250 of 2,501 rows" in message and "on_error=skip" in message


def test_problems_of_every_kind_are_told_apart(tmp_path: Path) -> None:
    lines = [
        GOOD,
        '{"prompt": "p"}',
        '{"prompt": "p", "completion": 3}',
        '{"prompt": "p", "completion": ""}',
        "[]",
        "null",
    ]
    with pytest.raises(DataError) as error:
        open_bytes(tmp_path, "\n".join(lines).encode())
    told = [line.split("rows.jsonl:")[1] for line in str(error.value).splitlines()[1:6]]
    assert [line[0] for line in told] == list("23456")
    assert "completion" in told[0] and "prompt, completion" in told[0]
    assert (
        "$.completion" in told[1]
        and "no trained token" in told[2]
        and "array" in told[3]
        and "null" in told[4]
    )


def test_invalid_utf8_is_named_by_its_line(tmp_path: Path) -> None:
    for name, good, bad in (
        ("a.jsonl", GOOD.encode(), b'{"prompt": "caf\xe9", "completion": "c"}'),
        ("a.txt", b"ok", b"caf\xe9"),
    ):
        with pytest.raises(DataError, match=rf"{name}:3: not UTF-8"):
            open_bytes(tmp_path, b"\n".join([good, b"", bad, good]), name)


def test_nan_in_json_is_refused_and_a_lone_surrogate_too(tmp_path: Path) -> None:
    rows = [b'{"tokens": [1, 2], "weights": [0, 1]}', b'{"tokens": [1, 2], "weights": [0, NaN]}']
    rows += [
        b'{"tokens": [1, 2], "weights": [0, 1e999]}',
        b'{"tokens": [1, 2.5], "weights": [0, 1]}',
    ]
    source = open_bytes(tmp_path, b"\n".join(rows), on_error="skip")
    assert (len(source), source.num_skipped) == (1, 3)
    with pytest.raises(DataError, match=r"rows\.jsonl:2"):
        open_bytes(tmp_path, GOOD.encode() + b'\n{"prompt": "\\ud800", "completion": "c"}')


def test_skipped_rows_are_counted_and_the_others_keep_their_lines(tmp_path: Path) -> None:
    source = open_bytes(tmp_path, f"{GOOD}\nx\n\nx\n{GOOD}\n".encode(), on_error="skip")
    assert (len(source), source.num_skipped, source.where(1).rsplit(":", 1)[1]) == (2, 2, "5")


def test_a_line_of_a_megabyte_is_read_whole(tmp_path: Path) -> None:
    long = "x" * (1 << 20) + "é"
    source = open_source(
        write_jsonl(tmp_path / "long.jsonl", [{"text": "a"}, {"text": long}, {"text": "b"}])
    )
    assert [source.row(i).text for i in range(3)] == ["a", long, "b"]


def test_separators_other_than_newline_do_not_end_a_line(tmp_path: Path) -> None:
    odd = "a\u2028b\u0085c\x0cd\x1ce"
    assert open_source(write_jsonl(tmp_path / "odd.jsonl", [{"text": odd}])).row(0).text == odd
    source = open_bytes(tmp_path, f"{odd}\nz".encode(), "odd.txt")
    assert [source.row(i).text for i in range(len(source))] == [odd, "z"]


def test_every_line_of_a_text_file_is_a_row_with_its_spaces(tmp_path: Path) -> None:
    source = open_bytes(tmp_path, "\ufeff  a b \r\n\r\n\té\r\n{}".encode(), "rows.txt")
    assert [source.row(i).text for i in range(len(source))] == ["  a b ", "\té", "{}"]
    assert source.where(2).endswith("rows.txt:4") and source.formats == ["text"]


@pytest.mark.parametrize("data", [b"", b"\n\n \n", b"\xef\xbb\xbf", b"\xef\xbb\xbf\r\n"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.txt", "a.ndjson"])
@pytest.mark.parametrize("on_error", ["raise", "skip"])
def test_an_empty_file_is_an_error(tmp_path: Path, data: bytes, name: str, on_error: str) -> None:
    with pytest.raises(DataError, match=f"{name}.*(no row|no usable row)"):
        open_bytes(tmp_path, data, name, on_error=on_error)


def test_columns_not_recognised_name_what_was_found_and_what_is_known(tmp_path: Path) -> None:
    with pytest.raises(DataError) as error:
        open_source(write_jsonl(tmp_path / "a.jsonl", [{"question": "q", "answer": "a"}]))
    assert "question, answer" in str(error.value) and "prompt, completion" in str(error.value)


def test_a_named_format_decides_where_columns_fit_several(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "p", "completion": "c", "text": "t"}])
    assert open_source(path).formats == ["prompt_completion"]
    assert open_source(path, format="text").row(0).text == "t"
    with pytest.raises(DataError, match=r"a\.jsonl:1: .*messages"):
        open_source(path, format="messages")

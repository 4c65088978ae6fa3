"""The pretraining tasks cannot teach pig latin, and the demo's data are what its rule says."""

from __future__ import annotations

import json
import os
import random
import string
import subprocess
import sys
from pathlib import Path

import make_pig_latin
import pytest
import string_tasks
from string_tasks import TASKS, Question

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
EXAMPLES = SCRIPTS.parent / "lorakit" / "examples" / "pig_latin"
PREFIX, SUFFIX = "English: ", "\nPig Latin:"


def rows_of(name: str) -> list[dict[str, str]]:
    return [
        json.loads(line)
        for line in (EXAMPLES / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    ]


def words_in(rows: list[dict[str, str]]) -> set[str]:
    return {
        word
        for row in rows
        for word in row["prompt"].removeprefix(PREFIX).removesuffix(SUFFIX).split()
    }


def random_renaming(rng: random.Random) -> dict[int, int]:
    """A permutation of the lower-case letters; upper case follows, digits and punctuation stay."""
    letters = string.ascii_lowercase
    image = "".join(rng.sample(letters, k=26))
    return str.maketrans(letters + letters.upper(), image + image.upper())


def asked(task: string_tasks.Task, question: Question, renaming: dict[int, int]) -> tuple[str, str]:
    renamed = Question(
        tuple(text.translate(renaming) for text in question.arguments),
        tuple(w.translate(renaming) for w in question.words),
    )
    return task.answer(renamed), task.answer(question).translate(renaming)


@pytest.mark.parametrize("number", range(len(TASKS)), ids=lambda n: f"{n}-{TASKS[n].name}")
def test_no_pretraining_task_can_tell_one_letter_from_another(number: int) -> None:
    task, rng = TASKS[number], random.Random(number)
    words = string_tasks.load_words()[0][:500]
    for _ in range(300):
        chosen = tuple(rng.choices(words, k=rng.randint(1, 3)))
        question = Question(task.draw(rng, chosen), chosen)
        answer_of_renamed, renamed_answer = asked(task, question, random_renaming(rng))
        assert answer_of_renamed == renamed_answer, question


def test_pig_latin_itself_would_fail_that_test() -> None:

    def answer(q: Question) -> str:
        return " ".join(make_pig_latin.pig_latin_word(w) for w in q.words)

    pig_latin = string_tasks.Task("Pig Latin", lambda rng, words: (), answer)
    swapped = str.maketrans("ab", "ba")
    assert len(set(asked(pig_latin, Question((), ("banana",)), swapped))) == 2


def test_what_pig_latin_appends_is_never_appended_or_prepended_by_a_task() -> None:
    rng, appended = random.Random(0), {"ay", "way", "yay"}
    assert appended <= string_tasks.FORBIDDEN_SUFFIXES
    suffixing = [TASKS[12], TASKS[13], TASKS[14], TASKS[16], TASKS[18]]
    assert [task.name for task in suffixing] == ["Suffix", "Prefix", "Tail", "Turn", "Cut"]
    for task in suffixing:
        drawn = {task.draw(rng, ("banana", "apple"))[-1] for _ in range(10_000)}
        assert {len(suffix) for suffix in drawn} == {1, 2, 3}
        assert not drawn & appended


def test_no_other_task_appends_anything() -> None:
    rng = random.Random(2)
    for task in [*TASKS[:12], TASKS[15], TASKS[17]]:
        question = Question(task.draw(rng, ("bcd", "fgh")), ("bcd", "fgh"))
        assert not set("aywAYW") & set(task.answer(question)), task.name


def test_no_letter_set_of_a_cut_holds_all_vowels() -> None:
    rng = random.Random(1)
    cuts = [task for task in TASKS if task.name == "Cut"]
    for _ in range(5_000):
        for task in cuts:
            assert not set("aeiou") <= set(task.draw(rng, ("aeiou", "uoiea"))[0])


def test_the_same_questions_are_drawn_in_every_process() -> None:
    code = """if True:
        import random, string_tasks
        rng, words = random.Random(1), string_tasks.load_words()[0]
        print([string_tasks.draw_question(rng, words)[1] for _ in range(200)])"""
    drawn = [
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONPATH": str(SCRIPTS), "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    ]
    assert drawn[0] == drawn[1] and drawn[0].count("Question") == 200


def test_held_out_words_are_seen_neither_in_pretraining_nor_in_the_demo() -> None:
    seen, held_out = (set(words) for words in string_tasks.load_words())
    assert len(held_out) == string_tasks.NUM_HELD_OUT_WORDS
    assert not seen & held_out
    train, evaluated = words_in(rows_of("train")), words_in(rows_of("heldout"))
    assert evaluated <= held_out
    assert not evaluated & (train | seen)
    assert train <= seen


@pytest.mark.parametrize(
    "line",
    [
        "banana anana-bay",
        "split it-splay",
        "apple apple-way",
        "rhythm ythm-rhay",
        "hmm hmm-way",
        "yes es-yay",
        "queen ueen-qay",
        "quantum uantum-qay",
        "my y-may",
        "string ing-stray",
        "a a-way",
        "y y-way",
        "sky y-skay",
        "ypsilon ilon-ypsay",
        "oh oh-way",
    ],
)
def test_a_word_becomes_pig_latin_as_written_by_hand(line: str) -> None:
    word, expected = line.split()
    assert make_pig_latin.pig_latin_word(word) == expected


@pytest.mark.parametrize(("name", "count"), [("heldout", 500), ("train", 8_000)])
def test_every_row_of_the_demo_is_made_by_the_rule_and_occurs_once(name: str, count: int) -> None:
    rows = rows_of(name)
    assert len(rows) == count == len({row["prompt"] for row in rows})
    for row in rows:
        assert row["prompt"].startswith(PREFIX) and row["prompt"].endswith(SUFFIX)
        words = row["prompt"].removeprefix(PREFIX).removesuffix(SUFFIX).split(" ")
        assert 1 <= len(words) <= 3
        assert row["completion"] == f" {' '.join(_reference(word) for word in words)}\n\n"


def test_the_bundled_files_are_what_the_script_writes() -> None:
    seen, _ = string_tasks.load_words()
    assert make_pig_latin.make_rows(random.Random(7), seen, 8_000) == rows_of("train")


def _reference(word: str) -> str:
    """The rule once more, by a regular expression instead of a search."""
    import re

    head, tail = re.fullmatch(r"(y?[^aeiouy]*|)(.*)", word).groups()
    return f"{tail}-{head}ay" if head and tail else f"{word}-way"

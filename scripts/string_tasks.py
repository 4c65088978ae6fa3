"""The string tasks that the tiny base model is pretrained on.

Every task treats letters as opaque symbols: renaming the letters of a task's input (words and
arguments alike) renames its output in the same way. So no task can depend on what is a vowel and
what is a consonant, which is exactly what the pig latin demo has to teach.
``tests/scripts/test_string_tasks.py`` asserts that property for every task.
"""

from __future__ import annotations

import random
import string
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

WORDS_FILE = Path(__file__).with_name("words.txt")
NUM_HELD_OUT_WORDS = 1_500
# what pig latin appends is never what a pretraining task appends
FORBIDDEN_SUFFIXES = {"ay", "way", "yay"}
VOWELS = set("aeiou")


@dataclass(frozen=True)
class Question:
    """What one task is asked: its arguments (letters or digits) and the words to work on."""

    arguments: tuple[str, ...]
    words: tuple[str, ...]


@dataclass(frozen=True)
class Task:
    """A named string task: how arguments are drawn, and what the answer to a question is."""

    name: str
    draw: Callable[[random.Random, tuple[str, ...]], tuple[str, ...]]
    answer: Callable[[Question], str]

    def ask(self, question: Question) -> str:
        """The instruction as text, for instance ``Turn 2``."""
        return " ".join((self.name, *question.arguments))


def load_words() -> tuple[list[str], list[str]]:
    """Return (seen, held_out): the word list of the repository, split once and for all by a
    fixed seed.
    """
    words = WORDS_FILE.read_text(encoding="utf-8").split()
    random.Random(2026).shuffle(words)
    return words[NUM_HELD_OUT_WORDS:], words[:NUM_HELD_OUT_WORDS]


def _nothing(rng: random.Random, words: tuple[str, ...]) -> tuple[str, ...]:
    return ()


def _a_count(rng: random.Random, words: tuple[str, ...]) -> tuple[str, ...]:
    return (str(rng.randint(1, 4)),)


def _a_count_each(rng: random.Random, words: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(str(rng.choice((0, 1, 1, 2, 2, 3))) for _ in words)


def _a_suffix(rng: random.Random, words: tuple[str, ...]) -> tuple[str, ...]:
    while True:
        suffix = "".join(rng.choices(string.ascii_lowercase, k=rng.randint(1, 3)))
        if suffix not in FORBIDDEN_SUFFIXES:
            return (suffix,)


def _letter_set(rng: random.Random, words: tuple[str, ...]) -> tuple[str, ...]:
    while True:
        letters = set(rng.sample(string.ascii_lowercase, k=rng.randint(2, 8)))
        letters.add(rng.choice(rng.choice(words)))
        if letters & VOWELS != VOWELS:
            # Sorted before it is shuffled: a set of strings has another order in every process.
            return ("".join(rng.sample(sorted(letters), k=len(letters))),)


def _counts_and_suffix(rng: random.Random, words: tuple[str, ...]) -> tuple[str, ...]:
    return (*_a_count_each(rng, words), *_a_suffix(rng, words))


def _letters_and_suffix(rng: random.Random, words: tuple[str, ...]) -> tuple[str, ...]:
    return (*_letter_set(rng, words), *_a_suffix(rng, words))


def _each(change: Callable[[str, Question], str]) -> Callable[[Question], str]:
    return lambda question: " ".join(change(word, question) for word in question.words)


def _turn(word: str, count: int, suffix: str = "") -> str:
    """Move the first ``count`` letters behind a dash: ``turn("banana", 2)`` is ``nana-ba``."""
    return f"{word[count:]}-{word[:count]}{suffix}" if count < len(word) else f"{word}-{suffix}"


def _cut(word: str, letters: str, suffix: str = "") -> str:
    """Move what stands before the first letter out of ``letters`` behind a dash; nothing moves
    where there is none.
    """
    start = next((i for i, letter in enumerate(word) if letter in letters), 0)
    return _turn(word, start, suffix)


def _turn_each(question: Question, suffix: str = "") -> str:
    pairs = zip(question.words, question.arguments, strict=False)
    return " ".join(_turn(word, int(count), suffix) for word, count in pairs)


TASKS: tuple[Task, ...] = (
    Task("Copy", _nothing, _each(lambda w, q: w)),
    Task("Reverse", _nothing, _each(lambda w, q: w[::-1])),
    Task("Upper", _nothing, _each(lambda w, q: w.upper())),
    Task("Capital", _nothing, _each(lambda w, q: w[:1].upper() + w[1:])),
    Task("Spell", _nothing, _each(lambda w, q: "-".join(w))),
    Task("Double", _nothing, _each(lambda w, q: w + w)),
    Task("Swap", _nothing, lambda q: " ".join(reversed(q.words))),
    Task("Join", _nothing, lambda q: "-".join(q.words)),
    Task("First", _a_count, _each(lambda w, q: w[: int(q.arguments[0])])),
    Task("Last", _a_count, _each(lambda w, q: w[-int(q.arguments[0]) :])),
    Task("Drop", _a_count, _each(lambda w, q: w[int(q.arguments[0]) :] or "-")),
    Task(
        "Rotate", _a_count, _each(lambda w, q: w[int(q.arguments[0]) :] + w[: int(q.arguments[0])])
    ),
    Task("Suffix", _a_suffix, _each(lambda w, q: w + q.arguments[0])),
    Task("Prefix", _a_suffix, _each(lambda w, q: q.arguments[0] + w)),
    Task("Tail", _a_suffix, _each(lambda w, q: f"{w}-{q.arguments[0]}")),
    Task("Turn", _a_count_each, _turn_each),
    Task("Turn", _counts_and_suffix, lambda q: _turn_each(q, q.arguments[-1])),
    Task("Cut", _letter_set, _each(lambda w, q: _cut(w, q.arguments[0]))),
    Task("Cut", _letters_and_suffix, _each(lambda w, q: _cut(w, q.arguments[0], q.arguments[1]))),
)
TASK_WEIGHTS = (1.0,) * 15 + (2.0, 3.0, 3.0, 4.0)  # the composed tasks take longest to learn


def draw_question(rng: random.Random, words: list[str]) -> tuple[Task, Question]:
    """Draw a task and a question over one to three of ``words``."""
    (task,) = rng.choices(TASKS, TASK_WEIGHTS)
    chosen = tuple(rng.choices(words, k=rng.choice((1, 2, 2, 3))))
    return task, Question(task.draw(rng, chosen), chosen)

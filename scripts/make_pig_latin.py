"""Write the demo's data set, ``lorakit/examples/pig_latin/{train,heldout}.jsonl``: ``python
scripts/make_pig_latin.py``.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

from string_tasks import load_words

OUT = Path(__file__).resolve().parent.parent / "lorakit" / "examples" / "pig_latin"
NUM_TRAIN, NUM_HELD_OUT = 8_000, 500
VOWELS = "aeiou"


def pig_latin_word(word: str) -> str:
    """Move the longest run of leading consonants behind a dash, add ``ay``; ``-way`` for a word
    with a vowel first or with none.

    ``y`` is a consonant only as the first letter; ``u`` behind a leading ``q`` is a vowel like any
    other.
    """
    start = next(
        (i for i, letter in enumerate(word) if letter in VOWELS or (letter == "y" and i > 0)),
        len(word),
    )
    return f"{word}-way" if start in (0, len(word)) else f"{word[start:]}-{word[:start]}ay"


def make_row(words: list[str]) -> dict[str, str]:
    """One prompt/completion row over ``words``."""
    answer = " ".join(pig_latin_word(word) for word in words)
    return {"prompt": f"English: {' '.join(words)}\nPig Latin:", "completion": f" {answer}\n\n"}


def make_rows(rng: random.Random, words: list[str], count: int) -> list[dict[str, str]]:
    """``count`` different rows over phrases of one to three words."""
    phrases: dict[tuple[str, ...], None] = {}
    while len(phrases) < count:
        phrases[tuple(rng.choices(words, k=rng.randint(1, 3)))] = None
    return [make_row(list(phrase)) for phrase in phrases]


def main() -> None:
    seen, held_out = load_words()
    rng = random.Random(7)
    OUT.mkdir(parents=True, exist_ok=True)
    for name, words, count in (("train", seen, NUM_TRAIN), ("heldout", held_out, NUM_HELD_OUT)):
        lines = [json.dumps(row) for row in make_rows(rng, words, count)]
        (OUT / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        print(f"{OUT / name}.jsonl: {count} rows")


if __name__ == "__main__":
    main()

"""Row formats: a record in, a row that lorakit knows out; None leaves it out."""

from __future__ import annotations

from typing import Any


def german(record: dict[str, Any]) -> dict[str, str] | None:
    return {"prompt": record["frage"], "completion": record["antwort"]} if record["gut"] else None


class Style:
    """One with settings of its own."""

    def __init__(self, ending: str) -> None:
        self.ending = ending

    def __call__(self, record: dict[str, Any]) -> dict[str, str]:
        return {
            "prompt": record["frage"],
            "completion": record["antwort"].removesuffix(".") + self.ending,
        }


def broken(record: dict[str, Any]) -> dict[str, str]:
    return {"prompt": record["question"], "completion": "x"}


def nothing(record: dict[str, Any]) -> int:
    return 3


def strange(record: dict[str, Any]) -> dict[str, str]:
    return {"x": "y"}

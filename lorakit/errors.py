"""What lorakit raises when a user can mend it. Each message says what is wrong, where, and how
to put it right.
"""

from __future__ import annotations


class LorakitError(Exception):
    """Base of all errors that a user can cause; the command line prints it without a traceback and
    exits with 2.

    Of several processes the first says what ``is_of_all``.
    """

    is_of_all = False


class ConfigError(LorakitError, ValueError):
    """A setting is wrong, misspelt, missing, or contradicts another."""


class DataError(LorakitError, ValueError):
    """Input data cannot be used; the message names file and line."""


class AdapterError(LorakitError, ValueError):
    """An adapter does not fit its base, its plan, or itself."""


class CheckpointError(LorakitError, ValueError):
    """A run folder or checkpoint is missing, torn, or belongs to another configuration."""


class TrainingError(LorakitError, RuntimeError):
    """Training cannot go on, for instance because losses are no longer finite."""


MAX_SHOWN = 20


def report(title: str, problems: list[str], total: int | None = None, remedy: str = "") -> str:
    """Return one message with the first 20 of ``problems``, the total, and the remedy."""
    total = len(problems) if total is None else total
    lines = [title, *(f"  {problem}" for problem in problems[:MAX_SHOWN])]
    if total > min(len(problems), MAX_SHOWN):
        lines.append(f"  … and {total - min(len(problems), MAX_SHOWN):,} more")
    if remedy:
        lines.append(remedy)
    return "\n".join(lines)


_NO_MEMORY = (
    "can't allocate memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDA error: out of memory",
    "MPS backend out of memory",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device, or the host, has refused memory: by its type, or by the words of those
    who have none for it.
    """
    is_named = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return is_named or (
        isinstance(error, RuntimeError) and any(words in str(error) for words in _NO_MEMORY)
    )

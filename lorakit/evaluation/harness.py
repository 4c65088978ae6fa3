"""EleutherAI's lm-evaluation-harness on a run's model: ``lorakit evaluate tasks=…``."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
from pathlib import Path
from typing import Any

from lorakit.errors import ConfigError
from lorakit.extras import require
from lorakit.hub import explain_hub_error, find_hub_problem


def check_harness(tasks: list[str], folder: Path | None) -> None:
    """Raise ConfigError where the harness is not installed, or does not know all ``tasks``;
    before anything is loaded.
    """
    try:
        manager = _find_tasks(tuple(tasks), folder)
    except ImportError as error:
        raise ConfigError(
            f"tasks={','.join(tasks)} needs lm-evaluation-harness: pip install lm-eval ({error})"
        ) from error
    if unknown := [task for task in tasks if not manager.match_tasks([task])]:
        raise ConfigError(
            f"tasks={','.join(tasks)}: the harness has no task {', '.join(unknown)}; `lm-eval ls"
            " tasks` lists them, and --tasks-path FOLDER adds your own"
        )


def run_harness(
    model: Any,
    tokenizer: Any,
    tasks: list[str],
    folder: Path | None,
    *,
    limit: int | None,
    batch_size: int,
    chat: bool,
) -> dict[str, dict[str, float]]:
    """Return the harness's figures of ``model`` for each task.

    Args:
        folder: with tasks of the user's own, as YAML.
        limit: rows of each task at most.
        chat: ask through the tokenizer's chat template.

    Raises:
        ConfigError: a task's data cannot be had.
    """
    datasets = require("datasets", f"tasks={','.join(tasks)}")
    with _quiet():
        import lm_eval
        from lm_eval.models.huggingface import HFLM

    try:
        with _quiet(), _tied_as_it_is(model):
            results: Any = lm_eval.simple_evaluate(
                model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size),
                tasks=tasks,
                task_manager=_find_tasks(tuple(tasks), folder),
                limit=limit,
                apply_chat_template=chat,
                bootstrap_iters=0,
                log_samples=False,
            )
    except (OSError, ValueError, ImportError, datasets.exceptions.DatasetsError) as error:
        reason = explain_hub_error("a task's data set", error) or " ".join(str(error).split())[:300]
        problem = find_hub_problem()
        raise ConfigError(
            f"tasks={','.join(tasks)}: {reason}{f' ({problem})' if problem else ''}"
        ) from error
    found: dict[str, dict[str, float]] = {}
    for task, figures in (results["results"] | results.get("groups", {})).items():
        found[task] = {
            name.removesuffix(",none"): value
            for name, value in figures.items()
            if isinstance(value, float) and "_stderr" not in name
        }
    return found


@functools.cache
def _find_tasks(tasks: tuple[str, ...], folder: Path | None) -> Any:
    """The harness's index: of ``folder`` alone where it has all ``tasks``, for its own takes ten
    seconds to read.
    """
    with _quiet():
        from lm_eval.tasks import TaskManager

        own = TaskManager(include_path=str(folder), include_defaults=False) if folder else None
        if own is not None and all(own.match_tasks([task]) for task in tasks):
            return own
        return TaskManager(include_path=str(folder) if folder else None)


@contextlib.contextmanager
def _tied_as_it_is(model: Any) -> Any:
    """Keep the harness from tying weights anew: PEFT's layer around trained rows breaks."""
    model.tie_weights = lambda *args, **options: None
    try:
        yield
    finally:
        del model.tie_weights


@contextlib.contextmanager
def _quiet() -> Any:
    """Keep the harness's own log off the output, apart from warnings."""
    os.environ.setdefault("LMEVAL_LOG_LEVEL", "WARNING")
    logger = logging.getLogger("lm_eval")
    before = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(before)

"""An Optuna study in a sweep's folder: which trial comes next, and what came of it. Exact after
a kill at any moment.
"""

from __future__ import annotations

import contextlib
import glob
import json
import logging
import math
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import yaml

from lorakit.errors import CheckpointError, report
from lorakit.extras import require
from lorakit.runs.files import lock_file
from lorakit.runs.folder import RUN_FILE, History, Run, is_held, open_run

if TYPE_CHECKING:
    import optuna

SQLITE_FILE, JOURNAL_FILE = "optuna.db", "optuna.journal"
log = logging.getLogger("lorakit")


def open_storage(folder: Path, kind: str) -> optuna.storages.BaseStorage:
    """The study's file in ``folder``: ``sqlite`` for one worker, else Optuna's ``journal``."""
    optuna = require("optuna")
    from optuna.storages.journal import JournalFileBackend

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    if kind == "sqlite":
        return optuna.storages.RDBStorage(f"sqlite:///{(folder / SQLITE_FILE).absolute()}")
    backend = JournalFileBackend(str((folder / JOURNAL_FILE).absolute()))
    return optuna.storages.JournalStorage(backend)


@dataclass
class Trial:
    """A trial that this process works at, and the lock that says so."""

    trial: optuna.Trial
    lock: IO[str]
    is_resumed: bool  # a worker that has died began it

    @property
    def number(self) -> int:
        return self.trial.number


@dataclass
class Study:
    """A sweep's study.

    Args:
        folder: of the sweep.
        runs: folder of its runs; trial 3 is the run ``NAME-3``.
        metric: the figure of ``history.jsonl`` whose last value counts.
        num_trials: of the whole sweep, failed and pruned ones included.
        build_sampler: from a seed.
    """

    folder: Path
    runs: Path
    study: optuna.Study
    metric: str
    num_trials: int
    build_sampler: Callable[[int], optuna.samplers.BaseSampler]
    is_exhausted: bool = False

    def next_trial(self) -> Trial | None:
        """One that a dead worker left, or a new one; None when there are enough.

        A new trial's sampler is seeded with its number, so that a sweep that was killed chooses
        what it would have chosen.
        """
        from optuna import Trial as OptunaTrial
        from optuna.trial import TrialState

        with self._alone():
            trials = self.study.get_trials(deepcopy=False)
            for left in (trial for trial in trials if trial.state is TrialState.RUNNING):
                run = self.run_of(left.number)
                if (lock := self._lock_of(left.number)) and not (run and is_held(run)):
                    self._seed(left.number)
                    return Trial(OptunaTrial(self.study, left._trial_id), lock, is_resumed=True)
                if lock:
                    lock.close()
            if self.is_exhausted or len(trials) >= self.num_trials:
                return None
            self._seed(len(trials))
            trial = self.study.ask()
            self._seed(trial.number)  # another machine may have begun one meanwhile
            lock = self._lock_of(trial.number)
            assert lock is not None  # nobody else knows of the trial yet
            return Trial(trial, lock, is_resumed=False)

    def run_of(self, number: int) -> Run | None:
        """The run of trial ``number``, or None where it has none yet; one that somebody else
        gave that name is none.
        """
        folder = self.runs / f"{self.folder.name}-{number}"
        if not (folder / RUN_FILE).exists():
            return None
        run = open_run(folder)
        sweep = yaml.safe_load(run.config_text()).get("sweep") or {}
        return run if sweep.get("trial") == number else None

    def close_trial(self, trial: Trial) -> str:
        """Tell Optuna what came of the trial's run, and return it in words."""
        run, state, value = self.run_of(trial.number), "FAIL", None
        text = "failed"
        if run and run.is_finished:
            value = last_value(run, self.metric)
            if value is None:
                text = f"failed: {self.metric} is not among its figures"
            elif not math.isfinite(value):
                text = f"failed: {self.metric} is {value}"
            else:
                state = "PRUNED" if run.info.get("pruned") else "COMPLETE"
                text = f"{'pruned, ' if state == 'PRUNED' else ''}{self.metric} {value:.4f}"
        with self._alone():
            self._tell(trial, state, value)
        return text

    def _tell(self, trial: Trial, state: str, value: float | None) -> None:
        from optuna.trial import TrialState

        try:
            self.study.tell(trial.trial, value if state == "COMPLETE" else None, TrialState[state])
        except RuntimeError as error:
            # a sampler that knows that nothing is left says so by a method that needs Optuna's loop
            if "Study.stop" not in str(error):
                raise
            self.is_exhausted = True
        trial.lock.close()
        (self.folder / f"trial-{trial.number}.lock").unlink(missing_ok=True)

    def best(self) -> optuna.trial.FrozenTrial | None:
        """The best complete trial, or None."""
        try:
            return self.study.best_trial
        except ValueError:
            return None

    def num_left(self) -> int:
        """Trials that other workers are still at."""
        from optuna.trial import TrialState

        return len(self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)))

    def num_ended(self) -> int:
        """Trials of which is known what came of them."""
        return len(self.study.get_trials(deepcopy=False)) - self.num_left()

    def _seed(self, number: int) -> None:
        self.study.sampler = self.build_sampler(number)

    def _lock_of(self, number: int) -> IO[str] | None:
        return lock_file(self.folder / f"trial-{number}.lock")

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        lock = lock_file(self.folder / ".lock", wait=True)
        try:
            yield
        finally:
            if lock:
                lock.close()


def last_value(run: Run, metric: str) -> float | None:
    """The last ``metric`` in the run's history."""
    found = [record[metric] for record in History(run.folder).read() if metric in record]
    return float(found[-1]) if found else None


def open_study(
    folder: Path,
    runs: Path,
    *,
    storage: str,
    metric: str,
    direction: str,
    num_trials: int,
    settings: dict[str, str],
    resume: Any,
    build_sampler: Callable[[int], optuna.samplers.BaseSampler],
) -> Study:
    """Open or begin the study in ``folder``.

    Args:
        settings: what must be the same whenever it continues, by key.
        resume: True continues, False begins, ``auto`` does either.

    Raises:
        CheckpointError: it exists and must not, or must and does not, or was begun with other
            settings.
    """
    optuna = require("optuna")
    files = [file for file in (SQLITE_FILE, JOURNAL_FILE) if (folder / file).exists()]
    if files and resume is False:
        raise CheckpointError(
            f"{folder} holds a sweep already; continue it with resume=true, or choose another"
            " group=NAME"
        )
    if not files and resume is True:
        raise CheckpointError(
            f"resume=true, but there is no sweep in {folder}; resume=auto would begin it"
        )
    if files and files != [SQLITE_FILE if storage == "sqlite" else JOURNAL_FILE]:
        raise CheckpointError(
            f"{folder} was begun with a sweep.storage other than {storage}: it has {files[0]}"
        )
    found = (path.parent for path in runs.glob(f"{glob.escape(folder.name)}-*/{RUN_FILE}"))
    if not files and (
        taken := [path for path in found if path.name.removeprefix(f"{folder.name}-").isdigit()]
    ):
        raise CheckpointError(
            f"{taken[0]} is a run already, and not of this sweep; choose another group=NAME"
        )
    folder.mkdir(parents=True, exist_ok=True)
    study = optuna.create_study(
        storage=open_storage(folder, storage),
        study_name=folder.name,
        direction=direction,
        load_if_exists=True,
    )
    if "settings" not in study.user_attrs:
        study.set_user_attr("settings", json.dumps(settings))
    then = json.loads(study.user_attrs["settings"])
    changed = [
        f"{key}: {then.get(key, 'not set')} then, {settings.get(key, 'not set')} now"
        for key in dict.fromkeys([*then, *settings])
        if then.get(key) != settings.get(key)
    ]
    if changed:
        remedy = "Set these as they were, or choose another group=NAME."
        raise CheckpointError(
            report(f"{folder} was begun with other settings:", changed, remedy=remedy)
        )
    return Study(folder, runs, study, metric, num_trials, build_sampler)


def seed_of(seed: int, number: int) -> int:
    """A seed for trial ``number`` of a sweep with ``seed``."""
    return zlib.crc32(f"{seed} {number}".encode())

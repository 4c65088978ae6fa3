"""A run's folder: what was asked, with what, how far it came, and where its results are."""

from __future__ import annotations

import contextlib
import datetime
import json
import platform
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import IO, Any

from lorakit import __version__
from lorakit.errors import CheckpointError
from lorakit.runs.files import ASIDE, lock_file, write_json, write_text

FORMAT_VERSION = 1
LOCK_FILE = ".lock"
RUN_FILE = "run.json"
CONFIG_FILE = "config.yaml"
HISTORY_FILE = "history.jsonl"
ADAPTER_FOLDER = "adapter"
# stands for ``${paths.run}`` in a config until the run has its folder
RUN_FOLDER = "{the run's folder}"
PACKAGES = (
    *("torch", "lightning", "transformers", "tokenizers", "safetensors", "peft"),
    *("deepspeed", "hydra-core", "omegaconf", "datasets", "numpy", "wandb"),
)


@dataclass(frozen=True)
class Run:
    """A run folder. ``info`` is what ``run.json`` said when it was read.

    Where several processes train a run, one ``writes``.
    """

    folder: Path
    info: dict[str, Any]
    writes: bool = True

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def checkpoints(self) -> Path:
        """The folder of its checkpoints."""
        return self.folder / "checkpoints"

    @property
    def chat_template(self) -> Path:
        """The chat template that the run brought; not there where it took the tokenizer's own."""
        return self.folder / "chat_template.jinja"

    @property
    def adapter(self) -> Path:
        """The finished adapter, a PEFT folder in bf16."""
        return self.folder / ADAPTER_FOLDER

    @property
    def is_finished(self) -> bool:
        return self.info.get("status") == "finished"

    @property
    def state(self) -> str:
        """``running``, ``interrupted``, ``failed``, ``finished``, ``pruned``, or ``killed``:
        running without a process.
        """
        status = "pruned" if self.info.get("pruned") else str(self.info.get("status", "unknown"))
        return "killed" if status == "running" and not is_held(self) else status

    @property
    def last_step(self) -> tuple[int, float | None]:
        """Return (steps made, last loss), from the history where the run did not end itself."""
        if (step := self.info.get("step")) is not None:
            return step, self.info.get("loss")
        records = [record for record in History(self.folder).read() if "train/loss" in record]
        return (records[-1]["step"], records[-1]["train/loss"]) if records else (0, None)

    def update(self, **changes: Any) -> Run:
        """Write ``changes`` into ``run.json`` and return the run as it is now."""
        info = {**self.info, **changes}
        if self.writes:
            write_json(self.folder / RUN_FILE, info)
        return Run(self.folder, info, self.writes)

    def config_text(self) -> str:
        """The resolved config, as YAML."""
        return (self.folder / CONFIG_FILE).read_text(encoding="utf-8")


def create_run(root: Path, name: str, *, config_text: str, info: dict[str, Any]) -> Run:
    """Make ``root/name`` with config and facts.

    Raises:
        CheckpointError: it exists, and is more than what a run leaves that ended before its first
            step: no run is overwritten.
    """
    folder = root / name
    check_name_is_free(root, name)
    try:
        folder.mkdir(parents=True, exist_ok=folder.exists())
    except OSError as error:
        raise CheckpointError(
            f"{folder} cannot be made: {error.strerror}; set paths.runs to a folder you can write"
        ) from error
    write_text(folder / CONFIG_FILE, config_text)
    run = Run(folder, {"format_version": FORMAT_VERSION, "name": name, "status": "running", **info})
    return run.update()


def check_name_is_free(root: Path, name: str) -> None:
    """Raise CheckpointError where ``root/name`` holds anything that a new run would overwrite."""
    folder = root / name
    if folder.exists() and not _holds_nothing(folder):
        raise CheckpointError(
            f"{folder} exists, and a run is never overwritten; choose another run=NAME, or"
            " resume=true to continue it"
        )


def _holds_nothing(folder: Path) -> bool:
    """Whether ``folder`` is what a run left that failed or was killed before its first step: no
    result would be lost.
    """
    results = (HISTORY_FILE, ADAPTER_FOLDER, "checkpoints")
    if not folder.is_dir() or any((folder / name).exists() for name in results):
        return False
    if not (folder / RUN_FILE).exists():
        names = {path.name.removeprefix(ASIDE) for path in folder.iterdir()}
        return names <= {CONFIG_FILE, RUN_FILE, LOCK_FILE}
    with contextlib.suppress(CheckpointError):
        run = open_run(folder)
        hold(run).close()  # refuses where a process trains it
        return not run.is_finished
    return False


def open_run(folder: Path) -> Run:
    """Read the run in ``folder``. Raises CheckpointError where there is none."""
    try:
        info = json.loads((folder / RUN_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder}: not a run of lorakit (no readable {RUN_FILE})") from error
    if not isinstance(info, dict) or not isinstance(info.get("format_version"), int):
        raise CheckpointError(f"{folder}: its {RUN_FILE} is not one that lorakit wrote")
    if info["format_version"] > FORMAT_VERSION:
        raise CheckpointError(
            f"{folder} was written by a newer lorakit (format {info['format_version']}); upgrade to"
            " read it"
        )
    return Run(folder, info)


def hold(run: Run) -> IO[str]:
    """Keep other processes from training the same run until the returned file is closed. Raises
    CheckpointError.
    """
    if (file := lock_file(run.folder / LOCK_FILE)) is None:
        raise CheckpointError(
            f"{run.folder} is being trained by another process; wait for it, or choose another"
            " run=NAME"
        )
    return file


def is_held(run: Run) -> bool:
    """Whether a process trains ``run`` now."""
    if not (run.folder / LOCK_FILE).exists():
        return False
    try:
        file = lock_file(run.folder / LOCK_FILE, shared=True)
    except OSError:  # of another user, most likely
        return True
    if file:
        file.close()
    return file is None


def list_runs(root: Path) -> list[Run]:
    """Return the runs in ``root``, oldest first; those that cannot be read are reported."""
    runs = []
    for path in root.glob(f"*/{RUN_FILE}"):
        try:
            runs.append(open_run(path.parent))
        except CheckpointError as error:
            print(f"left out: {error}", file=sys.stderr)
    return sorted(runs, key=lambda run: (run.info.get("created", ""), run.name))


def find_run(root: Path, wanted: str | None) -> Run:
    """Return run ``wanted`` (a name below ``root``, a folder), or the last with an adapter."""
    if wanted:
        for folder in (root / wanted, Path(wanted).expanduser()):
            if (folder / RUN_FILE).is_file():
                return open_run(folder)
        names = ", ".join(run.name for run in list_runs(root)[-5:]) or "none"
        raise CheckpointError(
            f"no run called {wanted!r} in {root.resolve()} (last runs: {names}); --runs names"
            " another folder of runs"
        )
    with_adapter = [run for run in list_runs(root) if run.adapter.is_dir()]
    if not with_adapter:
        raise CheckpointError(
            f"no finished run in {root.resolve()}; train one with `lorakit train`, or name its"
            " folder"
        )
    return with_adapter[-1]


def free_name(root: Path, stem: str, *, queue: Path | None = None) -> str:
    """Return ``stem-1122-1934``, with a number after it where that is taken, by a run that
    still waits in ``queue`` too.
    """
    stem = stem.replace("/", "-")
    base = f"{stem}-{datetime.datetime.now():%m%d-%H%M}"
    names = (base, *(f"{base}-{number}" for number in range(2, 10_000)))
    return next(
        name
        for name in names
        if not ((root / name).exists() or (queue and (queue / f"{name}.json").exists()))
    )


def describe_environment() -> dict[str, Any]:
    """Facts for ``run.json``: time, git state, versions."""
    return {
        "created": datetime.datetime.now().astimezone().isoformat(timespec="microseconds"),
        "git": _git_state(),
        "python": platform.python_version(),
        "packages": installed_packages(),
    }


def installed_packages() -> dict[str, str]:
    """Versions of lorakit and of what its results depend on."""
    return {"lorakit": __version__} | {
        name: version for name in PACKAGES if (version := _version(name))
    }


def flatten(node: Any, prefix: str = "") -> dict[str, Any]:
    """Return the values of a nested dict by their keys in dots."""
    if not isinstance(node, dict) or not node:
        return {prefix.rstrip("."): node}
    flat: dict[str, Any] = {}
    for key, value in node.items():
        flat |= flatten(value, f"{prefix}{key}.")
    return flat


class History:
    """A file of one JSON object per line, each with its ``step``: ``history.jsonl`` with all
    figures, ``samples.jsonl``.
    """

    def __init__(self, folder: Path | str, name: str = HISTORY_FILE) -> None:
        self.path = Path(folder) / name

    def append(self, record: dict[str, Any]) -> None:
        """Add a line."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")

    def read(self) -> list[dict[str, Any]]:
        """Return all whole lines; one that a crash tore is left out."""
        if self.path.exists():
            return list(_parse(self.path.read_text(encoding="utf-8").split("\n")))
        return []

    def cut_behind(self, step: int) -> None:
        """Remove what is after ``step``: a resumed run repeats it."""
        if not self.path.exists():
            return
        kept = [record for record in self.read() if record.get("step", 0) <= step]
        lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in kept)
        write_text(self.path, "".join(lines))


def _parse(lines: Iterable[str]) -> Iterable[dict[str, Any]]:
    for line in lines:
        try:
            record = json.loads(line)
        except ValueError:
            continue  # torn by a crash
        if isinstance(record, dict):
            yield record


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _git_state() -> dict[str, Any] | None:
    def git(*arguments: str) -> str:
        command = ("git", *arguments)
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=5)
        return done.stdout

    try:
        return {
            "commit": git("rev-parse", "HEAD").strip(),
            "dirty": bool(git("status", "--porcelain").strip()),
        }
    except (OSError, subprocess.SubprocessError):
        return None

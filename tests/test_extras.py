"""The base install alone: what it trains, what it leaves out with a note, and what it refuses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from lorakit.errors import ConfigError
from lorakit.extras import PACKAGES, distribution_of, find_problem, require

REPOSITORY = Path(__file__).resolve().parents[1]
# what wandb, of the base install, brings too
IN_THE_BASE = ("pydantic", "google.protobuf")
UNUSED = ("deepspeed", "wandb", "matplotlib", "fastapi", "optuna")


def test_the_table_is_that_of_pyproject() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    declared = {
        (name, requirement.partition(">=")[0].partition("[")[0])
        for name, requirements in extras.items()
        for requirement in requirements
        if name not in ("all", "dev")
    }
    assert declared == {(entry.extra, distribution_of(name)) for name, entry in PACKAGES.items()}
    names = [name for name in extras if name not in ("all", "dev")]
    assert extras["all"] == [f"lorakit[{','.join(names)}]"] and "lorakit[all]" in extras["dev"]
    assert not {name for _, name in declared} & {
        requirement.partition(">=")[0] for requirement in project["dependencies"]
    }


def test_a_missing_package_is_one_message_and_a_broken_one_keeps_its_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("optuna", "matplotlib", "datasets"):
        for loaded in [one for one in sys.modules if one.partition(".")[0] == name]:
            monkeypatch.delitem(sys.modules, loaded)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "optuna.py").write_text("import a_package_that_is_not_there")
    with pytest.raises(ModuleNotFoundError, match="a_package_that_is_not_there"):
        require("optuna")
    (tmp_path / "matplotlib.py").write_text("raise ImportError('a library of the system')")
    with pytest.raises(ImportError, match="a library of the system"):
        require("matplotlib")
    assert find_problem("optuna") is None
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.setattr(sys, "meta_path", [])
    message = "sweep=optuna needs optuna, which is not installed: pip install 'lorakit[sweep]'"
    with pytest.raises(ConfigError) as raised:
        require("optuna")
    assert str(raised.value) == message
    with pytest.raises(ConfigError, match=r"^x\.csv needs datasets, .* 'lorakit\[hub\]'$"):
        require("datasets", "x.csv")


# The first lines of a program for which the packages HIDDEN are not installed.
_HIDING = """\
import contextlib, importlib, io, json, pkgutil, re, sys

class Hiding:
    '''A finder that does not find HIDDEN, neither to import nor by their metadata.'''
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, path=None, target=None):
        hidden = name.partition(".")[0] in HIDDEN
        return None if hidden else self.finder.find_spec(name, path, target)
    def find_distributions(self, *given, **options):
        found = getattr(self.finder, "find_distributions", lambda *given, **options: ())
        for entry in found(*given, **options):
            if re.sub("[-_.]+", "-", entry.name).lower() not in HIDDEN:
                yield entry
    def __getattr__(self, name):
        return getattr(self.finder, name)

sys.meta_path[:] = map(Hiding, sys.meta_path)
assert not set(HIDDEN) & set(sys.modules)

"""


def _run(program: str, folder: Path, hidden: Sequence[str]) -> dict[str, list[Any]]:
    """What ``program`` says in its last line, run in ``folder`` without the packages ``hidden``."""
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "HF_HUB_OFFLINE": "1"}
    environment.pop("LORAKIT_DEBUG", None)
    result = subprocess.run(
        [sys.executable, "-c", f"HIDDEN = {tuple(hidden)}\n{_HIDING}{program}"],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    found: dict[str, list[Any]] = json.loads(result.stdout.splitlines()[-1])
    return found


_SMALL = (
    *("trainer.max_steps=2", "data.batch_size=4", "data.val_rows=2", "data.check_token_rows=50"),
    *("callbacks.samples.num_prompts=1", "callbacks.samples.max_tokens=4", "lora.rank=4"),
    "trainer.eval_every_steps=2",
)
_COMMANDS: dict[str, tuple[str, ...]] = {
    "train": ("train", "run=one", *_SMALL),
    "sample": ("sample", "one", "--max-tokens", "2", "--", "English: pig"),
    "report": ("report", "one"),
    "doctor": ("doctor",),
    "tensorboard": ("train", "run=two", "logger=tensorboard", *_SMALL),
    "optuna": ("train", "sweep=optuna", "lora.rank=4,8", *_SMALL),
    "csv": ("train", "run=two", "data.path=rows.csv", "model.path=tiny"),
    "mixed": ("train", "run=two", "data.sources=[no.jsonl,folder]", "model.path=tiny"),
    "hub": ("train", "run=two", "data.path=someone/rows", "model.path=tiny"),
    "serve": ("serve",),
}
_ALL_COMMANDS = f"""\
from lorakit.cli.guard import run_command

said = {{}}
for title, (command, *arguments) in {_COMMANDS!r}.items():
    from hydra.core.global_hydra import GlobalHydra
    GlobalHydra.instance().clear()
    sys.argv = [f"lorakit/cli/{{command}}.py", *arguments]
    out, err, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            run_command(importlib.import_module(f"lorakit.cli.{{command}}").main)
        except SystemExit as ended:
            code = ended.code
    loaded = [name for name in {UNUSED!r} if name in sys.modules]
    said[title] = [code, out.getvalue(), err.getvalue(), loaded]
try:
    import lorakit
    lorakit.ServiceClient
except Exception as error:
    said["client"] = [str(error)]
print(json.dumps(said))
"""


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    """Of each command: (exit code, output, errors, which of ``UNUSED`` are imported by then)."""
    folder = tmp_path_factory.mktemp("base")
    (folder / "rows.csv").write_text("prompt,completion\na,b\n")
    (folder / "folder").mkdir()
    (folder / "folder/rows.parquet").write_bytes(b"")
    found = _run(
        _ALL_COMMANDS, folder, hidden=[name for name in PACKAGES if name not in IN_THE_BASE]
    )
    found["files"] = [str(path.relative_to(folder)) for path in folder.rglob("*")]
    return found


@pytest.mark.parametrize("title", ["train", "sample", "report", "doctor"])
def test_what_a_run_needs_works_and_imports_nothing_else(
    said: dict[str, list[Any]], title: str
) -> None:
    code, out, err, loaded = said[title]
    assert code == 0, f"{out}{err}"
    assert loaded == []


def test_what_a_run_can_do_without_is_left_out_with_a_note(said: dict[str, list[Any]]) -> None:
    missing = "which is not installed: pip install 'lorakit[plots]'"
    out = str(said["train"][1])
    assert "loss curve" not in out and "runs/one/loss.png" not in said["files"]
    assert f"loss.png needs matplotlib, {missing}\n" in out
    assert "runs/one/adapter/adapter_model.safetensors" in said["files"]
    assert f"report.html has no plots: plotting needs matplotlib, {missing}" in str(
        said["report"][1]
    )
    assert "runs/.report/report.html" in said["files"]
    out = str(said["doctor"][1])
    assert "hub (datasets), serve (sqlalchemy, fastapi, uvicorn, zstandard)" in out
    assert "pip install 'lorakit[sweep,plots,tensorboard,hub,serve]'" in out


@pytest.mark.parametrize(
    "title, message",
    [
        (
            "tensorboard",
            "logger.tensorboard needs tensorboard, {is_missing} 'lorakit[tensorboard]'",
        ),
        ("optuna", "sweep=optuna needs optuna, {is_missing} 'lorakit[sweep]'"),
        ("csv", "rows.csv needs datasets, {is_missing} 'lorakit[hub]'"),
        ("mixed", "folder/rows.parquet needs datasets, {is_missing} 'lorakit[hub]'"),
        ("hub", "a data set of the hub needs datasets, {is_missing} 'lorakit[hub]'"),
        (
            "serve",
            "lorakit serve needs sqlalchemy, fastapi, uvicorn, zstandard, which are not installed:"
            " pip install 'lorakit[serve]'",
        ),
    ],
)
def test_what_a_command_cannot_do_without_is_refused_before_it_begins(
    said: dict[str, list[Any]], title: str, message: str
) -> None:
    code, out, err, _ = said[title]
    is_missing = "which is not installed: pip install"
    assert code == 2 and message.replace("{is_missing}", is_missing) in str(err), err
    assert "Traceback" not in str(err) and "LoRA plan" not in str(out)
    assert not [name for name in said["files"] if str(name).startswith(("runs/two", "runs/serve"))]


def test_a_client_without_the_database_is_refused(said: dict[str, list[Any]]) -> None:
    message = "ServiceClient needs sqlalchemy, which is not installed: pip install 'lorakit[serve]'"
    assert said["client"] == [message]


def test_no_module_imports_an_extra_but_those_of_the_service(tmp_path: Path) -> None:
    others = [*dict.fromkeys([*UNUSED, *PACKAGES])]
    program = f"""\
import lorakit

loaded = {{}}
for module in pkgutil.walk_packages(lorakit.__path__, "lorakit.", onerror=lambda name: None):
    if not module.name.startswith(("lorakit.__main__", "lorakit.service.http")):
        importlib.import_module(module.name)
        for name in {others!r}:
            if name in sys.modules:
                loaded.setdefault(name, module.name)
print(json.dumps({{"loaded": [*loaded.items()]}}))
"""
    # where these are installed, torchmetrics and torch import them themselves
    found = _run(program, tmp_path, hidden=("matplotlib", "zstandard"))
    assert [entry for entry in found["loaded"] if entry[0] not in IN_THE_BASE] == [
        ["sqlalchemy", "lorakit.service"]
    ]

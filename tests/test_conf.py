"""The config files, tested as code."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

from lorakit.cli import train
from lorakit.config.documentation import as_page, read_choices
from lorakit.config.instantiate import find_argument_problems, import_target, instantiate
from lorakit.config.paths import conf_dir
from lorakit.config.schema import RunConfig
from lorakit.data.specs import SPECS
from lorakit.runs.folder import flatten

CONF = conf_dir()
FILES = sorted(CONF.rglob("*.yaml"))
EXPERIMENTS = sorted(path.stem for path in (CONF / "experiment").glob("*.yaml"))
THIRD_PARTY_GROUPS = ("trainer", "logger", "optim", "schedule", "paths", "hydra", "experiment")
RUNTIME = {"params", "optimizer", "total_steps", "self", "token_ids"}  # handed over by the program
NOT_ARGUMENTS = {"clip_norm", "defaults"}  # read by the program, and by Hydra


def _compose(*overrides: str) -> dict[str, Any]:
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose("train", overrides=[*overrides, "paths.run=x"])
    return OmegaConf.to_container(config, resolve=True)


def _targets(node: Any, key: str = "") -> list[tuple[str, dict[str, Any]]]:
    if not isinstance(node, dict):
        return []
    here = [(key, node)] if node.get("_target_", "auto") != "auto" else []
    return here + [
        found for name, inner in node.items() for found in _targets(inner, f"{key}.{name}")
    ]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(CONF)))
def test_every_target_takes_what_its_file_says(path: Path) -> None:
    for key, node in _targets(yaml.safe_load(path.read_text(encoding="utf-8"))):
        settings = {name: value for name, value in node.items() if name not in NOT_ARGUMENTS}
        plain = {
            name: value
            for name, value in settings.items()
            if not (isinstance(value, str) and ("$" in value or "?" in value))
        }
        assert not [p for p in find_argument_problems(plain, key) if "unknown key" in p]


@pytest.mark.parametrize("group", ["data", "lora"])
def test_every_argument_of_ours_is_a_key(group: str) -> None:
    settings = _compose("experiment=pig_latin")[group]
    parameters = set(inspect.signature(import_target(settings["_target_"], group)).parameters)
    parameters -= RUNTIME | SPECS.keys()  # a group is flat
    assert parameters == settings.keys() - {"_target_"}


def test_groups_are_named_as_the_package_folders() -> None:
    folders = {path.name for path in (CONF.parent / "lorakit").iterdir() if path.is_dir()}
    for group in (path.name for path in CONF.iterdir() if path.is_dir()):
        assert group in folders or group in THIRD_PARTY_GROUPS


def test_every_key_of_every_file_has_its_meaning_beside_it() -> None:
    silent = [
        f"{choice.group}/{choice.name}: {found.key}"
        for choice in read_choices()
        for found in choice.settings
        if not found.meaning
    ]
    assert not silent


def test_the_help_lists_every_key_with_its_default(capsys: pytest.CaptureFixture[str]) -> None:
    train.main(["--help"])
    said = capsys.readouterr().out
    composed = _compose("experiment=pig_latin")
    for group in (
        "model",
        "data",
        "lora",
        "optim",
        "trainer",
        "checkpoint",
        "plan",
        "schedule",
        "launch",
        "strategy",
        "loss",
    ):
        for key in composed[group]:
            assert key in ("_target_", "_partial_") or f"  {group}.{key}=" in said, f"{group}.{key}"
    for typed in (
        "lora.rank=32",
        "data.max_tokens=1024",
        "data.path=(must be set)",
        "optim=sgd",
        "sweep.trials=20",
    ):
        assert re.search(rf"^(  )?{re.escape(typed)}\b|{re.escape(typed)} ", said, re.MULTILINE), (
            typed
        )


def test_every_line_of_the_help_has_what_the_file_says_of_its_key(
    capsys: pytest.CaptureFixture[str],
) -> None:
    train.main(["--help"])
    said = capsys.readouterr().out
    for choice in read_choices():
        for found in choice.settings:
            default = "(must be set)" if found.default == "???" else found.default
            assert re.search(
                rf"^  {re.escape(f'{found.key}={default}')} +{re.escape(found.meaning)}$",
                said,
                re.MULTILINE,
            ), found


def test_a_key_that_is_a_size_or_a_time_names_its_unit() -> None:
    """By the key's own name, or by its meaning."""
    unit = re.compile(
        r"token|row|step|epoch|second|minute|positions|pixels|GB|bytes|TFLOP|share|times|hour|dollar|rank|process|machine|device|"
        r"trials|checkpoints|batch|factor|port|GPU|node|core|prompt|thread|limit|as SLURM"
        r" writes|elements|fraction"
    )
    sizes = re.compile(
        r"tokens|rows|steps|seconds|epochs|size|pixels|_gb|tflops|time|last|best|trials|threads|devices|price"
    )
    numbers = [
        (choice, found)
        for choice in read_choices()
        for found in choice.settings
        if sizes.search(found.key)
    ]
    assert len(numbers) > 30
    unnamed = [
        f"{choice.group}/{choice.name}: {found}"
        for choice, found in numbers
        if not unit.search(found.meaning)
    ]
    assert not unnamed, "\n".join(unnamed)


def test_the_page_of_settings_is_made_from_the_files() -> None:
    page = CONF.parent / "docs" / "settings.md"
    assert page.read_text(encoding="utf-8") == as_page(read_choices()), (
        "run python scripts/make_settings_page.py"
    )


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_composes_and_passes_the_check(experiment: str) -> None:
    composed = _compose(f"experiment={experiment}", "model.path=tiny", "data.path=pig_latin/train")
    config = RunConfig.from_dict(composed)
    assert flatten(config.to_dict()) == flatten(composed)  # nothing is lost, nothing added


@pytest.mark.parametrize("name", sorted(path.stem for path in (CONF / "optim").glob("*.yaml")))
def test_every_optimiser_and_schedule_can_be_made(name: str) -> None:
    import torch

    settings = _compose("experiment=pig_latin", f"optim={name}", "optim.lr=0.1")["optim"]
    optimizer = instantiate(
        {key: value for key, value in settings.items() if key != "clip_norm"}, "optim"
    )([torch.nn.Parameter(torch.ones(2))])
    for schedule in ("constant", "linear", "cosine"):
        built = instantiate(
            _compose("experiment=pig_latin", f"schedule={schedule}")["schedule"], "schedule"
        )(optimizer, total_steps=10)
        assert built.get_last_lr()[0] > 0

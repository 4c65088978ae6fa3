"""Every key of ``lorakit train``: default and meaning, from the config files and their comments."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from lorakit.config.aliases import ALIASES
from lorakit.config.paths import conf_dir

_NOT_KEYS = ("defaults", "_target_", "_partial_", "hydra")


@dataclass(frozen=True)
class Setting:
    """One key, as it is typed before ``=``."""

    key: str
    default: str
    meaning: str


@dataclass(frozen=True)
class Choice:
    """One file of a group, chosen by ``group=name``; the file of the top level has no group."""

    group: str
    name: str
    is_default: bool
    meaning: str  # what the file's first comment says
    settings: list[Setting]


def read_choices() -> list[Choice]:
    """All files that a run is composed of, groups in the order in which the config lists them.
    Presets have no settings here.
    """
    root = conf_dir()
    top = yaml.safe_load((root / "train.yaml").read_text(encoding="utf-8"))
    entries = [entry for entry in top["defaults"] if isinstance(entry, dict)]
    chosen = {group: name for entry in entries for group, name in entry.items()}
    found = [read_choice(root / "train.yaml", "", is_default=True)]
    for group in (group for group in chosen if (root / group).is_dir()):
        files = sorted(
            (root / group).glob("*.yaml"), key=lambda file: (file.stem != chosen[group], file.stem)
        )
        found += [read_choice(file, group, is_default=file.stem == chosen[group]) for file in files]
    return found


def read_choice(path: Path, group: str, *, is_default: bool) -> Choice:
    """The settings of one file, with the comments after them."""
    text = path.read_text(encoding="utf-8")
    lines = text.splitlines()
    heading = [
        line.lstrip("# ") for line in lines[:2] if line.startswith("# ") and "@package" not in line
    ]
    is_global = any("@package _global_" in line for line in lines[:1])
    node = yaml.compose(text)
    settings: list[Setting] = []
    if group != "experiment":
        settings += _settings_of(node, lines, "" if is_global or not group else f"{group}.")
    return Choice(group, path.stem, is_default, heading[0] if heading else "", settings)


def _settings_of(node: Any, lines: list[str], prefix: str) -> Iterator[Setting]:
    if not isinstance(node, yaml.MappingNode):
        return
    for key_node, value_node in node.value:
        name = key_node.value
        if name in _NOT_KEYS:
            continue
        is_group = (
            isinstance(value_node, yaml.MappingNode)
            and not value_node.flow_style
            and bool(value_node.value)
        )
        end = key_node.end_mark if is_group else value_node.end_mark
        meaning = lines[end.line][end.column :].lstrip(": ")
        meaning = meaning.removeprefix("#").strip() if meaning.startswith("#") else ""
        if is_group:
            if meaning:
                yield Setting(f"{prefix}{name}", "", meaning)
            yield from _settings_of(value_node, lines, f"{prefix}{name}.")
        else:
            start = value_node.start_mark
            yield Setting(f"{prefix}{name}", lines[start.line][start.column : end.column], meaning)


def as_help(choices: list[Choice]) -> str:
    """All keys as text: ``key=default  meaning``, and after each group its other choices."""
    lines = ["settings, as key=default:"]
    shown: set[Setting] = set()
    for choice in choices:
        title = f"{choice.group}={choice.name}" if choice.group else ""
        if title:
            default = " (default)" if choice.is_default else ""
            meaning = f": {choice.meaning}" if choice.meaning else ""
            lines += ["", f"{title}{default}{meaning}"]
        for setting in choice.settings:
            if setting in shown and not choice.is_default:
                continue  # as in the default choice of the group
            shown |= {setting}
            default = "(must be set)" if setting.default == "???" else setting.default
            lines.append(f"  {f'{setting.key}={default}':42} {setting.meaning}".rstrip())
    return "\n".join(lines)


def as_page(choices: list[Choice]) -> str:
    """The same as a page of Markdown."""
    lines = [
        "# Settings",
        "",
        (
            "Every key of `lorakit train`, `show`, `plan` and `launch`, made from [conf/](../conf)"
            " by `scripts/make_settings_page.py`. A key is typed as `key=value`; a group's file is"
            " chosen as `group=name`."
        ),
    ]
    for choice in (choice for choice in choices if choice.group != "experiment"):
        title = (
            f"`{choice.group}={choice.name}`{' (default)' if choice.is_default else ''}"
            if choice.group
            else "Of the run"
        )
        lines += ["", f"## {title}"]
        lines += ["", choice.meaning] if choice.meaning else []
        if choice.settings:
            lines += ["", "| key | default | meaning |", "| --- | --- | --- |"]
        for setting in choice.settings:
            cells = (
                f"`{setting.key}`",
                f"`{setting.default}`" if setting.default else "",
                setting.meaning,
            )
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    lines += [
        "",
        "## As others call it",
        "",
        "Of axolotl, LLaMA-Factory, TRL, transformers and PEFT; values may differ.",
        "",
    ]
    lines += ["| here | there |", "| --- | --- |"]
    lines += [
        f"| `{key}` | {', '.join(f'`{name}`' for name in names)} |"
        for key, names in ALIASES.items()
    ]
    presets = [choice for choice in choices if choice.group == "experiment"]
    lines += ["", "## Presets", "", "| preset | what it is |", "| --- | --- |"]
    lines += [
        f"| [`experiment={choice.name}`](../conf/experiment/{choice.name}.yaml) |"
        f" {choice.meaning} |"
        for choice in presets
    ]
    return "\n".join(lines) + "\n"

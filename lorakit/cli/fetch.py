"""``lorakit fetch …``: bring a run's model and data into the hub's cache."""

from __future__ import annotations

import dataclasses
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from lorakit.cli.compose import run_hydra
from lorakit.cli.guard import run_command
from lorakit.errors import ConfigError

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from lorakit.config.schema import RunConfig
    from lorakit.model.spec import ModelSpec

HELP = """\
usage: lorakit fetch [key=value …]

  lorakit fetch experiment=chat_sft model.path=Qwen/Qwen3-0.6B data.path=HuggingFaceH4/no_robots
  lorakit fetch model.path=Qwen/Qwen3-0.6B             the model alone

Takes the settings of `lorakit train`. What is a folder or a file stays where it is. Afterwards the
same settings train without a network: on this machine, or on one that is given the cache
(HF_HOME)."""


def main(arguments: list[str]) -> None:
    """Fetch what ``arguments`` name."""
    if {"-h", "--help"} & set(arguments):
        print(HELP)
        return
    run_hydra(lambda config: fetch(config, arguments), arguments, config_name="train")


def fetch(config: DictConfig, arguments: list[str]) -> None:
    """Hydra's task: fetch model and rows, and say where they are."""
    from omegaconf import OmegaConf

    from lorakit.config.resolve import to_plain
    from lorakit.config.schema import RunConfig

    has_model, has_data = (
        not OmegaConf.is_missing(config[group], "path") for group in ("model", "data")
    )
    has_data = has_data or config.data.sources is not None
    if not (has_model or has_data):
        raise ConfigError(
            "name what to fetch: model.path=…, data.path=…, or an experiment that does"
        )
    for group, is_named in (("model", has_model), ("data", has_data)):
        if not is_named:
            OmegaConf.update(
                config, f"{group}.path", "tiny" if group == "model" else "pig_latin/heldout"
            )
    run_config = RunConfig.from_dict(to_plain(config))
    if has_model:
        _fetch_model(run_config.model)
    if has_data:
        _fetch_rows(run_config)
    print(f"without a network: HF_HUB_OFFLINE=1 {shlex.join(['lorakit', 'train', *arguments])}")


def _fetch_model(model: ModelSpec) -> None:
    from lorakit.hub import explain_hub_error, fetch_model, find_hub_problem
    from lorakit.model.load import resolve_model_path

    path = model.path
    is_folder = Path(path).expanduser().is_dir()
    if (
        not is_folder
        and find_hub_problem() is None
        and resolve_model_path(path, model.revision) == path
    ):
        try:
            folder = fetch_model(path, model.revision, with_code=model.trust_remote_code)
        except Exception as error:  # the hub's own types, and those of the network
            raise ConfigError(
                f"model.path={explain_hub_error(path, error) or f'{path}: {error}'}"
            ) from error
    else:
        folder = Path(resolve_model_path(path, model.revision))
    bare = dataclasses.replace(model, add_tokens=None)
    bare.load_tokenizer()
    bare.load_skeleton()  # what is missing is said now
    files = [file for file in folder.rglob("*") if file.is_file()]
    print(
        f"model {path}: {len(files)} files, {sum(file.stat().st_size for file in files) / 1e9:.2f}"
        f" GB in {folder}"
    )


def _fetch_rows(config: RunConfig) -> None:
    from lorakit.pipeline.build import build_datamodule, build_retain_rows

    datamodule = build_datamodule(config)
    datamodule.check_rows()
    print(f"data {datamodule.spec.rows.title}: {len(datamodule.source):,} rows")
    if datamodule.spec.rows.val_path:
        print(f"held out {datamodule.spec.rows.val_path}: {len(datamodule.val_source):,} rows")
    if other := build_retain_rows(config):
        other.check_rows()
        print(f"unrelated {other.spec.rows.title}: {len(other.source):,} rows")


if __name__ == "__main__":
    run_command(main)

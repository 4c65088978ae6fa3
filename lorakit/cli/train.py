"""``lorakit train``: compose, check, plan, then train. A bad row or a wrong key costs seconds, not a download."""

from __future__ import annotations

import functools
import shlex
from typing import TYPE_CHECKING, Any

from lorakit.cli.compose import run_hydra
from lorakit.cli.guard import run_command

if TYPE_CHECKING:
    from omegaconf import DictConfig
HELP = """\
usage: lorakit train [key=value …] [--config-dir DIR] [-m] [--cfg job]

  lorakit train                                          the pig latin demo
  lorakit train model.path=… data.path=… lora.rank=32    your model, your rows
  lorakit train experiment=chat_sft model.path=… data.path=…
  lorakit train … resume=true                            go on with the newest unfinished run
  lorakit train … -m optim.lr=1e-4,3e-4                  a sweep
  lorakit train … --cfg job                              print the whole config, with each key's meaning in conf/

Values of path keys are taken verbatim: spaces, commas, quotes and = need no escape."""


def main(arguments: list[str]) -> None:
    """Train as ``arguments`` say."""
    if {"-h", "--help"} & set(arguments):
        print(HELP)
        return
    command = shlex.join(["lorakit", "train", *arguments])
    run_hydra(functools.partial(train, command=command), arguments, config_name="train")


def train(config: DictConfig, *, command: str = "") -> None:
    """Hydra's task: one run. Raises KeyboardInterrupt behind a run that Ctrl-C ended, so that a sweep ends with it."""
    from hydra.core.hydra_config import HydraConfig

    from lorakit.cli.training_run import train_run

    experiment = HydraConfig.get().runtime.choices.get("experiment") or "run"
    outcome = train_run(to_plain(config), experiment=str(experiment), command=command)
    if outcome.was_interrupted:
        raise KeyboardInterrupt  # nothing is returned: Hydra would keep every job's model


def to_plain(config: DictConfig) -> dict[str, Any]:
    """The config as plain values, interpolations resolved. Raises ConfigError for a key that is still ``???``."""
    from omegaconf import OmegaConf

    from lorakit.cli.resume import RUN_FOLDER
    from lorakit.errors import ConfigError

    free: Any = OmegaConf.create(OmegaConf.to_container(config, resolve=False))  # a copy without Hydra's struct flag
    free.paths.run = RUN_FOLDER
    missing = sorted(OmegaConf.missing_keys(free))
    if missing:
        raise ConfigError("these keys have no default and must be set: " + ", ".join(f"{key}=…" for key in missing))
    plain: Any = OmegaConf.to_container(free, resolve=True)
    return plain


if __name__ == "__main__":
    run_command(main)

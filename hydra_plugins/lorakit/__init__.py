"""lorakit's sweepers, as Hydra finds them: ``hydra.sweeper._target_`` in conf/sweep names them.

Hydra imports every plug-in in every Hydra program of an environment. So this module imports hydra
alone, and lorakit only when one of its sweeps begins. Hydra also reads the modules of its own
plug-ins a second time, so that their classes are others than those an import gives: a sweeper
derives from ``hydra.plugins.sweeper.Sweeper``, never from one of them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hydra.core.plugins import Plugins
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction

if TYPE_CHECKING:
    from omegaconf import DictConfig


class _Sweeper(Sweeper):
    """What Hydra hands to a sweeper.

    Args:
        params: ranges by key, as a config may hold them below ``hydra.sweeper.params``.
        max_batch_size: an argument of Hydra's own sweeper; lorakit's trials come one by one.
    """

    def __init__(
        self, params: dict[str, str] | None = None, max_batch_size: int | None = None
    ) -> None:
        self.params = params or {}

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        """Keep what Hydra has composed, and make the launcher of the runs."""
        self.hydra_context, self.config = hydra_context, config
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )


class OptunaSweeper(_Sweeper):
    """Runs trials one after the other, each chosen from what is known of those before it."""

    def sweep(self, arguments: list[str]) -> None:
        """Run trials until there are enough. Raises LorakitError."""
        from lorakit.cli.sweeper import run_trials_of

        run_trials_of(self, arguments)


class WandbSweeper(_Sweeper):
    """Writes a sweep file for W&B and runs nothing."""

    def sweep(self, arguments: list[str]) -> None:
        """Write the file and print what to type. Raises ConfigError."""
        from lorakit.cli.sweeper import write_wandb_sweep

        write_wandb_sweep(self, arguments)

"""A composed config to plain values: where OmegaConf ends."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from lorakit.errors import ConfigError

if TYPE_CHECKING:
    from omegaconf import DictConfig

_MEANT = {
    "model.path": "model.path=… (a folder, a name of the hub, or the bundled tiny or tiny-vl)",
    "data.path": "data.path=… (a file of rows, a folder, or a name of the hub)",
}


def to_plain(config: DictConfig) -> dict[str, Any]:
    """The config as plain values, interpolations resolved. Raises ConfigError for each ``???``."""
    from omegaconf import OmegaConf

    from lorakit.runs.folder import RUN_FOLDER

    # a copy without Hydra's struct flag
    free: Any = OmegaConf.create(OmegaConf.to_container(config, resolve=False))
    free.paths.run = RUN_FOLDER
    if free.data.sources is not None and OmegaConf.is_missing(free.data, "path"):
        free.data.path = None
    missing = sorted(OmegaConf.missing_keys(free))
    if missing:
        raise ConfigError(
            "these keys have no default and must be set: "
            + ", ".join(_MEANT.get(key, f"{key}=…") for key in missing)
        )
    return cast("dict[str, Any]", OmegaConf.to_container(free, resolve=True))

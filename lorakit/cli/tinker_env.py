"""``lorakit tinker-env``: the variables with which a program for the tinker SDK runs against
this machine's server.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

from lorakit.cli.guard import run_command
from lorakit.cli.serve import ADDRESS_FILE, KEY_FILE
from lorakit.errors import ConfigError
from lorakit.quoting import quote_for_shell


def main(arguments: list[str]) -> None:
    """Print ``export`` lines for a shell."""
    parser = argparse.ArgumentParser(
        prog="lorakit tinker-env", description='Print variables: eval "$(lorakit tinker-env)"'
    )
    parser.add_argument(
        "--data", default="runs/serve", help="the server's folder (default: %(default)s)"
    )
    parser.add_argument("--url", help="where the server is reached, if not where it listens")
    options = parser.parse_args(arguments)
    folder = Path(options.data).expanduser().absolute()
    try:
        served = json.loads((folder / ADDRESS_FILE).read_text(encoding="utf-8"))
        key = (folder / KEY_FILE).read_text(encoding="utf-8").strip()
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{folder} is not the folder of a server: {error}; give --data as `lorakit serve`"
            " has it"
        ) from error
    home = seed_cache(folder / "huggingface", served["models"])
    variables = {
        "TINKER_BASE_URL": options.url or served["url"],
        "TINKER_API_KEY": key,
        "TINKER_TELEMETRY": "0",
        "HF_HOME": str(home),
        "HF_HUB_OFFLINE": "1",
    }
    for name, value in variables.items():
        print(f"export {name}={quote_for_shell(value)}")


def seed_cache(home: Path, models: dict[str, str]) -> Path:
    """Make ``home`` a cache of the hub in which each served model has the name that programs
    use, by links.

    The SDK loads tokenizers by the model's name, wherever the program runs. What the user's own
    cache has is linked as well.
    """
    from lorakit.model.load import resolve_model_path

    hub = home / "hub"
    hub.mkdir(parents=True, exist_ok=True)
    before = Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser()
    if before.resolve() != home.resolve():
        for entry in (before / "hub").glob("*--*"):
            _link(hub / entry.name, entry.resolve())
        for name in ("token", "datasets"):
            if (before / name).exists():
                _link(home / name, (before / name).resolve())
    for name, path in models.items():
        folder = Path(resolve_model_path(path))
        if not folder.is_dir():
            continue  # of the hub, and in its cache
        repository = hub / f"models--{name.strip('/').replace('/', '--')}"
        if repository.is_symlink():
            repository.unlink()
        snapshot = repository / "snapshots" / "local"
        snapshot.mkdir(parents=True, exist_ok=True)
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / "main").write_text("local", encoding="utf-8")
        for file in folder.iterdir():
            if file.is_file():
                _link(snapshot / file.name, file.resolve())
    return home


def _link(path: Path, target: Path) -> None:
    if path.is_symlink():
        path.unlink()
    if not path.exists():
        path.symlink_to(target)


if __name__ == "__main__":
    run_command(main)

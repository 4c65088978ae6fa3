"""``lorakit serve --model NAME=PATH``: Tinker's protocol and OpenAI's, for programs on this
machine or others.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from lorakit.cli.guard import run_command
from lorakit.errors import ConfigError, LorakitError, TrainingError
from lorakit.extras import check_extra

KEY_FILE, ADDRESS_FILE = "api-key", "server.json"
FIRST_USER = "owner"
SDK_RANGE = "0.13 to 0.38"


def main(arguments: list[str]) -> None:
    """Read the models, make a key at the first start, and serve until interrupted."""
    options = parse(arguments)
    check_extra("serve", "lorakit serve")
    models = dict(named_model(text) for text in options.model or ["tiny"])
    folder = Path(options.data).expanduser()
    from lorakit.runs.files import find_write_problem, lock_file, write_json
    from lorakit.strategy.world import current_world

    if problem := find_write_problem(folder / "a file"):
        raise ConfigError(f"--data {folder} cannot be used: {problem}")
    folder.mkdir(parents=True, exist_ok=True)
    if options.new_user:
        from lorakit.service.database import Database
        from lorakit.service.http.keys import ApiKeyStore

        print(
            f"the key of {options.new_user}, shown this once:"
            f" {ApiKeyStore(Database(folder)).make(options.new_user)}"
        )
        return
    if not current_world().is_rank_zero:
        build_state(options, models, folder)  # follows the first process, and ends with it
    if (lock := lock_file(folder / ".lock")) is None:
        raise ConfigError(
            f"--data {folder} is served by another process; choose another folder, or end that one"
        )
    with lock:
        state = build_state(options, models, folder)
        print_key(state, folder)
        address = f"http://{options.host}:{options.port}"
        write_json(folder / ADDRESS_FILE, {"url": address, "models": models})
        print(
            f"serving {', '.join(models)} at {address} for tinker {SDK_RANGE} and OpenAI clients"
            " (Ctrl-C ends)"
        )
        print(
            f'programs for the tinker SDK: eval "$(lorakit tinker-env --data {folder})"', flush=True
        )
        serve(state, options.host, options.port)


def parse(arguments: list[str]) -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(
        prog="lorakit serve", description="Serve Tinker's verbs, and OpenAI's, over HTTP."
    )
    parser.add_argument(
        "--model",
        action="append",
        metavar="NAME=PATH",
        help="a folder or hub name and what programs call it; repeatable (default: tiny)",
    )
    parser.add_argument(
        "--data",
        default="runs/serve",
        help="folder of the database and the checkpoints (default: %(default)s)",
    )
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        help="address to listen on; 0.0.0.0 for all (default: %(default)s)",
    )
    parser.add_argument("--port", type=int, default=8470, help="default: %(default)s")
    parser.add_argument(
        "--new-user",
        metavar="NAME",
        help="make a key for one more user, print it, and end; a server may be running",
    )
    parser.add_argument("--accelerator", default="auto", help="auto, cpu, cuda or mps")
    parser.add_argument("--precision", default="auto", help="auto, 32-true or bf16-mixed")
    parser.add_argument(
        "--strategy",
        default="auto",
        help="for several processes, under torchrun: auto, ddp, zero1, zero2 or zero3",
    )
    parser.add_argument(
        "--lora-alpha",
        type=float,
        default=32.0,
        help="alpha of new adapters (default: %(default)s)",
    )
    parser.add_argument(
        "--expert-layout",
        default="per_expert",
        help="per_expert or shared_outer (default: %(default)s)",
    )
    parser.add_argument(
        "--max-pass-tokens",
        type=int,
        default=16_384,
        help="positions of a forward pass (default: %(default)s)",
    )
    parser.add_argument(
        "--batch-invariant",
        action="store_true",
        help="sampled and scored log-probabilities equal to the bit; slow",
    )
    parser.add_argument(
        "--max-body-mb", type=int, default=256, help="largest request (default: %(default)s)"
    )
    parser.add_argument(
        "--session-timeout",
        type=float,
        default=600.0,
        help="seconds after which a silent program's adapters are freed (default: %(default)s)",
    )
    return parser.parse_args(arguments)


def named_model(text: str) -> tuple[str, str]:
    """Return name and path of ``NAME=PATH``, or of a path that stands for itself."""
    name, separator, path = text.partition("=")
    if not name or (separator and not path):
        raise ConfigError(
            f"--model {text}: say NAME=PATH, for instance Qwen/Qwen3-8B=/models/qwen3-8b"
        )
    return name, path or name


def build_state(options: argparse.Namespace, models: dict[str, str], folder: Path) -> Any:
    """Read the models, and return the server's state."""
    import functools

    from rich.console import Console

    from lorakit.service.base import Base
    from lorakit.service.core import Service
    from lorakit.service.http.state import ServerState

    load = functools.partial(
        Base.load,
        accelerator=options.accelerator,
        precision=options.precision,
        strategy=options.strategy,
    )
    worker_options = {
        "max_pass_tokens": options.max_pass_tokens,
        "batch_invariant": options.batch_invariant,
    }
    lora = {"alpha": options.lora_alpha, "expert_layout": options.expert_layout}
    service = Service(
        folder,
        models=models,
        any_model=False,
        load=load,
        lora=lora,
        worker_options=worker_options,
    )
    console = Console(stderr=True)
    for name in models:
        with console.status(f"reading {name} …"):
            base = service.engine(name).base
        print(
            f"{name}: {base.model.num_parameters():,} parameters, {base.precision} on {base.device}"
        )
    return ServerState(
        service,
        session_timeout_seconds=options.session_timeout,
        max_body_bytes=options.max_body_mb << 20,
    )


def print_key(state: Any, folder: Path) -> None:
    """At the first start make a key, print it, and write it to a file of mode 600."""
    path = folder / KEY_FILE
    try:
        key = state.keys.make(FIRST_USER)
    except LorakitError:
        print(
            f"the key is in {path}"
            if path.exists()
            else f"the key was made at the first start, and {path} is gone"
        )
        return
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(key + "\n")
    print(f"the key, shown this once and kept in {path}: {key}")


def serve(state: Any, host: str, port: int) -> None:
    """Serve until interrupted."""
    import uvicorn

    from lorakit.service.http.app import create_app

    config = uvicorn.Config(
        create_app(state),
        host=host,
        port=port,
        log_level="warning",
        access_log=False,
        timeout_keep_alive=75,
        timeout_graceful_shutdown=3,
    )
    server, executor = uvicorn.Server(config), state.service.executor
    # another process is gone
    executor.on_problem.append(lambda error: setattr(server, "should_exit", True))
    server.run()
    if executor.problem is not None:
        raise TrainingError(f"the server has ended: {executor.problem}")


if __name__ == "__main__":
    run_command(main)

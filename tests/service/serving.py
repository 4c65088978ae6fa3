"""`lorakit serve` for tests, as a process of its own."""

from __future__ import annotations

import os
import re
import socket
import time
from dataclasses import dataclass
from pathlib import Path

import preloaded


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass
class Server:
    """`lorakit serve` as a process of its own."""

    folder: Path
    port: int
    process: preloaded.Process
    key: str

    @classmethod
    def start(
        cls,
        folder: Path,
        *options: str,
        port: int | None = None,
        models: tuple[str, ...] = ("tiny",),
    ) -> Server:
        port = port or free_port()
        named = [part for model in models for part in ("--model", model)]
        log = (folder / "serve.log").open("a")
        data = ("--data", str(folder / "data"), "--port", str(port))
        process = preloaded.start(
            ["-m", "lorakit", "serve", *named, *data, *options],
            stdout=log,
            stderr=log,
            env={**os.environ, "PYTHONUNBUFFERED": "1", "CUDA_VISIBLE_DEVICES": ""},
        )
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    key = (folder / "data" / "api-key").read_text().strip()
                    return cls(folder, port, process, key)
            if process.poll() is not None:
                raise RuntimeError((folder / "serve.log").read_text())
            time.sleep(0.05)
        raise TimeoutError("the server did not start")

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def log(self) -> str:
        return (self.folder / "serve.log").read_text()

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(30)

    def environment(self) -> dict[str, str]:
        """The variables that `lorakit tinker-env` prints."""
        data = ["--data", str(self.folder / "data")]
        printed = preloaded.run(["-m", "lorakit", "tinker-env", *data], check=True).stdout
        return dict(re.findall(r"export (\w+)=(\S+)", printed))

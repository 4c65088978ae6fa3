"""Processes through torchrun: its agent on this machine, its command line on each of several."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shlex
import signal
import socket
import sys
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorakit.errors import LorakitError
from lorakit.strategy.heartbeat import FAULT_FILE, take_fault

SHUTDOWN_TIMEOUT = (
    # environment: how long torchrun waits for processes that it has asked to stop
    "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"
)
# torch's own 30 are less than a step of a large model and its checkpoint; the watchers end what
# hangs
SHUTDOWN_SECONDS = 300


@dataclass(frozen=True, kw_only=True)
class Launch:
    """How the processes of a run are started.

    Args:
        nodes: machines.
        address: of the first machine; None is this one's name.
        port: of the first machine.
        collective_timeout_seconds: how long one step may take.
        max_restarts: how often a machine's processes are started again when one of them dies.
    """

    nodes: int = 1
    address: str | None = None
    port: int = 29500
    collective_timeout_seconds: float = 600.0
    max_restarts: int = 0


def torchrun_lines(launch: Launch, num_processes: int, program: Sequence[str]) -> list[str]:
    """The command for each machine, in the order of their numbers."""
    address, port = launch.address or socket.gethostname(), str(launch.port)
    lines = []
    for node in range(launch.nodes):
        arguments = torchrun_arguments(
            launch, num_processes, node_rank=str(node), address=address, port=port
        )
        lines.append(shlex.join(["torchrun", *arguments, *program]))
    return lines


def torchrun_arguments(
    launch: Launch, num_processes: int, *, node_rank: str, address: str, port: str
) -> list[str]:
    """torchrun's own arguments on one machine."""
    return [
        f"--nnodes={launch.nodes}",
        f"--node-rank={node_rank}",
        f"--nproc-per-node={num_processes}",
        f"--master-addr={address}",
        f"--master-port={port}",
        *([f"--max-restarts={launch.max_restarts}"] if launch.max_restarts else []),
    ]


def run_here(job: dict[str, Any], num_processes: int, *, max_restarts: int = 0) -> None:
    """Run ``lorakit.cli.worker`` on ``job`` in ``num_processes`` processes and wait for them.

    Raises:
        SystemExit: a process ended with an exit code of its own, and has said why.
        KeyboardInterrupt: they ended at Ctrl-C.
        LorakitError: a process was killed; the message names it.
    """
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    os.environ.setdefault(SHUTDOWN_TIMEOUT, str(SHUTDOWN_SECONDS))
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // num_processes)))
    with tempfile.TemporaryDirectory(prefix="lorakit-") as folder:
        path = Path(folder) / "job.json"
        path.write_text(json.dumps(job), encoding="utf-8")
        os.environ[FAULT_FILE] = str(Path(folder) / "fault")
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=num_processes,
            run_id=uuid.uuid4().hex,
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            max_restarts=max_restarts,
            monitor_interval=0.5,
            start_method="spawn",
        )
        try:
            with ends_as_its_processes():
                elastic_launch(config, sys.executable)("-m", "lorakit.cli.worker", str(path))
        finally:
            del os.environ[FAULT_FILE]


@contextlib.contextmanager
def ends_as_its_processes() -> Iterator[None]:
    """Around torchrun's agent: what it raises becomes what the process that failed first would have
    raised, which has said why.

    Raises:
        SystemExit, KeyboardInterrupt, LorakitError: as ``run_here``.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    try:
        yield
    except SignalException as error:
        if error.sigval == signal.SIGINT:
            raise KeyboardInterrupt from error
        raise SystemExit(128 + error.sigval) from error
    except ChildFailedError as error:
        if reason := take_fault():
            said = f"{reason}. All processes were ended; continue with resume=true"
            raise LorakitError(said) from error
        _explain(error)


def _explain(error: Any) -> None:
    # What a signal has ended comes first: the others fail because of it, or are ended with SIGTERM.
    def order(entry: tuple[int, Any]) -> tuple[bool, int]:
        code = entry[1].exitcode
        return code >= 0 or code == -signal.SIGTERM, entry[1].timestamp

    rank, failure = min(error.failures.items(), key=order)
    if failure.exitcode == 128 + signal.SIGINT:
        raise KeyboardInterrupt from error
    if failure.exitcode > 0:
        raise SystemExit(failure.exitcode) from error
    name = signal.Signals(-failure.exitcode).name
    hint = (
        " (out of memory, most likely: the system kills with SIGKILL)" if name == "SIGKILL" else ""
    )
    raise LorakitError(
        f"rank {rank} was killed by {name}{hint}; the others were ended. Continue with resume=true"
    ) from error

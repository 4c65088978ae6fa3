"""Which process this is, of how many, and the group they form. Processes are started by torchrun
or by `lorakit launch`.
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _set_pg_timeout, _world
from torch.distributed.rendezvous import rendezvous

from lorakit.errors import ConfigError, LorakitError, report
from lorakit.strategy import heartbeat

Found = TypeVar("Found")
_is_watched = False
# of an operation: the watchers know better when to give up
WATCHED_LIMIT = datetime.timedelta(days=7)


@dataclass(frozen=True)
class World:
    """This process among those of the run."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1

    @property
    def is_rank_zero(self) -> bool:
        return self.rank == 0

    @property
    def num_nodes(self) -> int:
        return self.size // self.local_size

    def describe(self) -> str:
        """Return ``rank 3 (host n2)``."""
        return heartbeat.describe_rank(self.rank)


def current_world() -> World:
    """The world that torchrun has set up, or that of a process which runs alone. Raises
    ConfigError where it is torn.
    """
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        return World()
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    if missing := [name for name in names if name not in os.environ]:
        raise ConfigError(
            f"RANK and WORLD_SIZE are set, but not {', '.join(missing)}; start the processes with"
            " torchrun or lorakit launch, or unset these variables"
        )
    return World(*(int(os.environ[name]) for name in names))


def join(
    world: World, *, device: str, timeout_seconds: float = 600.0, watched: bool = False
) -> None:
    """Form the group of all processes, once. A process that runs alone forms a group of one, which
    needs no network.

    Args:
        timeout_seconds: how long a process waits for the others in one operation, where nobody
            watches.
        watched: a watcher beside each process ends all of them where one is stopped, cut off, or
            stuck for that long in a step; one that loads, writes or evaluates for longer is waited
            for.
    """
    if dist.is_initialized():
        return
    # Before anything starts threads: the watcher is a fork.
    tell = None
    if watched and world.size > 1:
        tell = heartbeat.start(world.rank, world.size, step_limit_s=timeout_seconds)
    timeout = datetime.timedelta(seconds=timeout_seconds + 60)
    if world.size == 1:
        dist.init_process_group(
            "gloo", store=dist.HashStore(), rank=0, world_size=1, timeout=timeout
        )
    else:
        if device == "cuda":
            torch.cuda.set_device(world.local_rank)
        backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
        store = _fresh_store(world, timeout)
        dist.init_process_group(
            backend, store=store, rank=world.rank, world_size=world.size, timeout=timeout
        )
    if tell is not None:
        tell(os.environ["MASTER_ADDR"], broadcast_object(heartbeat.free_port()))
        global _is_watched
        _is_watched = True
        lift_limits()


def lift_limits() -> None:
    """Let operations of all groups that there are take as long as they like, where watchers
    decide when to give up.
    """
    for group in list(_world.pg_map) if _is_watched else []:
        _set_pg_timeout(WATCHED_LIMIT, group)


def _fresh_store(world: World, timeout: datetime.timedelta) -> dist.Store:
    """The store that torchrun has set up. What it starts again it gives the same one, which
    holds the addresses of the dead.
    """
    store, _, _ = next(iter(rendezvous("env://", world.rank, world.size, timeout=timeout)))
    return dist.PrefixStore(f"attempt-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def broadcast_object(value: Found) -> Found:
    """Return the first process's ``value`` in every process."""
    if not is_distributed():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def all_gather_object(value: Found) -> list[Found]:
    """Return every process's ``value``, by rank."""
    if not is_distributed():
        return [value]
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found


def is_distributed() -> bool:
    """Whether there are several processes."""
    return dist.is_initialized() and dist.get_world_size() > 1


def raise_on_any_rank(step: Callable[[], Found]) -> Found:
    """Return ``step()``, or raise in every process what it raised in any.

    Raises:
        LorakitError: one message, with the ranks where it is not that of all.
    """
    if not is_distributed():
        return step()
    found: list[Found] = []
    problem: LorakitError | None = None
    try:
        found.append(step())
    except LorakitError as error:
        problem = error
    except OSError as error:
        problem = LorakitError(f"{error.filename or 'input/output'}: {error.strerror or error}")
    problems = all_gather_object(
        None if problem is None else (current_world().describe(), str(problem))
    )
    raised = [entry for entry in problems if entry]
    if not raised:
        return found[0]
    whose: dict[str, list[str]] = {}
    for who, text in raised:
        whose.setdefault(text, []).append(who)
    if len(whose) > 1 or len(raised) < len(problems) or problem is None:
        lines = [f"{', '.join(names)}: {text}" for text, names in whose.items()]
        problem = LorakitError("\n".join(lines))
    problem.is_of_all = True
    raise problem


def check_equal_on_all_ranks(find_facts: Callable[[], Mapping[str, str]]) -> None:
    """Compare what ``find_facts`` returns over all processes, which call this together; one alone
    has nothing to compare.

    Raises:
        ConfigError: they differ; the message, the same in all, names each that does, with its
            values and their ranks.
    """
    if not is_distributed():
        return
    everyone = all_gather_object((current_world().describe(), dict(find_facts())))
    problems = []
    for name in sorted({name for _, theirs in everyone for name in theirs}):
        holders: dict[str, list[str]] = {}
        for who, theirs in everyone:
            holders.setdefault(theirs.get(name, "not there"), []).append(who)
        if len(holders) > 1:
            values = [f"{value} on {_some(whose)}" for value, whose in holders.items()]
            problems.append(f"{name}: {'; '.join(values)}")
    if problems:
        remedy = "Make them equal on all machines."
        error = ConfigError(report("the processes of this run differ:", problems, remedy=remedy))
        error.is_of_all = True
        raise error


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")

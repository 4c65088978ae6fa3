"""A process that has imported everything and forks: a program of its own starts in milliseconds.

``python preloaded.py SOCKET`` serves one pytest run. Each connection sends a program and its three
standard streams, and gets the number of the child, then its exit status. ``start`` is the other
end, and gives what ``subprocess.Popen`` would. Environment variables that libraries read when they
are imported have no effect here beyond ``FIXED``: a program that needs others starts as usual.
"""

from __future__ import annotations

import array
import atexit
import contextlib
import importlib
import json
import os
import runpy
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import traceback
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any, cast

REPOSITORY = Path(__file__).resolve().parent.parent
ADDRESS = "LORAKIT_TESTS_PRELOADED"  # where the server listens, for the workers of a pytest run
FIXED = {  # read at import, the same for all
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "DS_ACCELERATOR": "cpu",
}
# Read by libraries when they are imported: a program that changes one of these starts as usual.
READ_AT_IMPORT = ("GOMP_", "MALLOC_", "TRANSFORMERS_", "MKL_", "LD_", "PYTHON")
PRELOADED = (  # after these, programs import little of their own
    "deepspeed",
    "hydra",
    "torch._dynamo",
    "lorakit.pipeline.fit",
    "lorakit.service.clients",
    "lorakit.service.http.app",
    "lorakit.strategy.deepspeed",
)
SEEN_ALL_THE_SAME = ("PYTHONPATH", "PYTHONUNBUFFERED")


class Preloaded:
    """A forked program, with the interface of ``subprocess.Popen`` as far as tests use it."""

    def __init__(
        self, connection: socket.socket, pid: int, out: IO[str] | None, err: IO[str] | None
    ):
        self.pid, self.returncode = pid, cast(int | None, None)
        self.stdout, self.stderr = out, err
        self.args: Any = ["preloaded"]
        self._connection = connection

    def poll(self) -> int | None:
        return self._wait(0)

    def wait(self, timeout: float | None = None) -> int:
        if (code := self._wait(timeout)) is None:
            raise subprocess.TimeoutExpired(self.args, timeout or 0)
        return code

    def _wait(self, timeout: float | None) -> int | None:
        if self.returncode is None:
            self._connection.settimeout(timeout if timeout is None else max(timeout, 1e-3))
            try:
                answer = self._connection.recv(4)
            except (TimeoutError, BlockingIOError):
                return None
            self.returncode = struct.unpack("i", answer)[0] if len(answer) == 4 else -signal.SIGKILL
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """What it wrote, once it has ended."""
        texts = ["", ""]

        def read(index: int, stream: IO[str]) -> None:
            texts[index] = stream.read()

        streams = (self.stdout, self.stderr)
        readers = [
            threading.Thread(target=read, args=(index, stream), daemon=True)
            for index, stream in enumerate(streams)
            if stream is not None
        ]
        end = None if timeout is None else time.monotonic() + timeout
        for reader in readers:
            reader.start()
        for reader in readers:
            reader.join(None if end is None else max(0.0, end - time.monotonic()))
            if reader.is_alive():
                raise subprocess.TimeoutExpired(self.args, timeout or 0)
        self.wait(None if end is None else max(0.01, end - time.monotonic()))
        return texts[0], texts[1]

    def send_signal(self, signum: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, signum)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def __enter__(self) -> Preloaded:
        return self

    def __exit__(self, *_: object) -> None:
        for stream in (self.stdout, self.stderr):
            if stream is not None:
                stream.close()
        self.wait()


Process = subprocess.Popen[str] | Preloaded


def start(
    program: Sequence[str],
    *,
    cwd: Path | str | None = None,
    env: Mapping[str, str] | None = None,
    stdout: int | IO[str] = subprocess.PIPE,
    stderr: int | IO[str] = subprocess.PIPE,
    own_session: bool = False,
) -> Process:
    """Start Python with ``program``: ``-m MODULE …``, ``-c CODE`` or a file, and its arguments.

    Args:
        env: the whole environment; None is this process's.
        stdout, stderr: a pipe, ``subprocess.DEVNULL``, ``subprocess.STDOUT`` or an open file.
    """
    environment = dict(os.environ if env is None else env)
    address = os.environ.get(ADDRESS)
    changed = {
        name
        for name in {*environment, *os.environ}
        if name.startswith(READ_AT_IMPORT)
        and name not in SEEN_ALL_THE_SAME
        and environment.get(name) != os.environ.get(name)
    }
    if address is None or changed:
        return subprocess.Popen(
            [sys.executable, *program],
            cwd=cwd,
            env=environment,
            stdout=stdout,
            stderr=stderr,
            text=True,
            start_new_session=own_session,
        )
    opened, streams, pipes = [os.open(os.devnull, os.O_RDONLY)], [], []
    for wanted in (stdout, stderr):
        pipe: IO[str] | None = None
        if wanted == subprocess.PIPE:
            reader, writer = os.pipe()
            opened.append(writer)
            streams.append(writer)
            pipe = os.fdopen(reader, encoding="utf-8", errors="replace")
        elif wanted == subprocess.DEVNULL:
            opened.append(os.open(os.devnull, os.O_WRONLY))
            streams.append(opened[-1])
        elif wanted == subprocess.STDOUT:
            streams.append(streams[-1])
        else:
            streams.append(wanted if isinstance(wanted, int) else wanted.fileno())
        pipes.append(pipe)
    request = {
        "program": list(program),
        "cwd": str(cwd or Path.cwd()),
        "env": environment,
        "own_session": own_session,
    }
    connection = _connect(address)
    socket.send_fds(connection, [b"x"], [opened[0], *streams])
    body = json.dumps(request).encode()
    connection.sendall(struct.pack("i", len(body)) + body)
    for number in opened:
        os.close(number)
    (pid,) = struct.unpack("i", _receive(connection, 4))
    return Preloaded(connection, pid, pipes[0], pipes[1])


def run(
    program: Sequence[str], *, timeout: float | None = None, check: bool = False, **options: Any
) -> subprocess.CompletedProcess[str]:
    """Start ``program`` and wait for its end, as ``subprocess.run`` does with pipes."""
    with start(program, **options) as process:
        try:
            out, err = process.communicate(timeout)
        except BaseException:
            process.kill()
            raise
        code = process.wait()
    if check and code:
        raise subprocess.CalledProcessError(code, list(program), out, err)
    return subprocess.CompletedProcess(list(program), code, out, err)


def run_ranks(
    program: Sequence[str],
    count: int,
    *,
    timeout: float,
    env: Mapping[str, str] | None = None,
    cwd: Path | str | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run ``program`` in ``count`` processes with the environment that torchrun would give them.

    Where one fails, the others are killed, and what it wrote is what is returned.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {
        **(os.environ if env is None else env),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "GROUP_RANK": "0",
        "GROUP_WORLD_SIZE": "1",
        "TORCHELASTIC_RUN_ID": "preloaded",
        "TORCHELASTIC_RESTART_COUNT": "0",
        "TORCHELASTIC_MAX_RESTARTS": "0",
    }
    ranks = [
        start(program, cwd=cwd, env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(count)
    ]
    written: list[tuple[str, str]] = [("", "")] * count

    def follow(rank: int) -> None:
        written[rank] = ranks[rank].communicate()
        if ranks[rank].returncode:
            for other in ranks:
                other.kill()

    followers = [threading.Thread(target=follow, args=(rank,)) for rank in range(count)]
    for follower in followers:
        follower.start()
    end = time.monotonic() + timeout
    for follower in followers:
        follower.join(max(0.0, end - time.monotonic()))
        if follower.is_alive():
            for process in ranks:
                process.kill()
            raise subprocess.TimeoutExpired(list(program), timeout)
    codes = [process.wait() for process in ranks]
    code = next((code for code in codes if code not in (0, -signal.SIGKILL)), max(map(abs, codes)))
    out, err = ("\n".join(texts) for texts in zip(*written, strict=True))
    return subprocess.CompletedProcess(list(program), code, out, err)


def _connect(address: str) -> socket.socket:
    """A connection to the server, which may still be starting."""
    end = time.monotonic() + 60
    while True:
        connection = socket.socket(socket.AF_UNIX)
        try:
            connection.connect(address)
            return connection
        except OSError:
            connection.close()
            if time.monotonic() > end:
                raise
            time.sleep(0.02)


def _receive(connection: socket.socket, count: int) -> bytes:
    found = b""
    while len(found) < count:
        if not (part := connection.recv(count - len(found))):
            raise EOFError("the preloaded process is gone")
        found += part
    return found


# ---- the server ---------------------------------------------------------------------------------


def serve(address: str) -> None:
    """Fork programs for whoever connects, until the process that started this one has ended."""
    os.environ.update(FIXED)
    parent = os.getppid()
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen(64)
    listener.settimeout(0.05)
    children: dict[int, socket.socket] = {}
    is_loaded = False
    while os.getppid() == parent:
        _reap(children)
        try:
            connection, _ = listener.accept()
        except TimeoutError:
            continue
        if not is_loaded:
            _preload()
            is_loaded = True
        connection.settimeout(None)
        _, streams, *_ = socket.recv_fds(connection, 1, 3)
        (size,) = struct.unpack("i", _receive(connection, 4))
        request = json.loads(_receive(connection, size))
        if (pid := os.fork()) == 0:
            listener.close()
            for other in (*children.values(), connection):
                other.close()
            _become(request, streams)
        for number in streams:
            os.close(number)
        children[pid] = connection
        connection.sendall(struct.pack("i", pid))


def _preload() -> None:
    """Import what programs import. Nothing is computed: threads do not outlive a fork."""
    sys.path.insert(0, str(REPOSITORY))
    from lorakit.cli.guard import quiet_libraries

    quiet_libraries()
    for name in PRELOADED:
        importlib.import_module(name)
    with contextlib.suppress(ImportError):
        importlib.import_module("tinker")  # which the oldest versions' environment does not have
    from torch.distributed.elastic.multiprocessing.subprocess_handler import SubprocessHandler

    SubprocessHandler._popen = _fork_rank
    for name in [name for name in sys.modules if name.startswith("lorakit.cli.")]:
        # a command runs as ``__main__``, of which Python warns where it is imported already
        if hasattr(sys.modules[name], "run_command") and name != "lorakit.cli.guard":
            del sys.modules[name]


def _fork_rank(handler: Any, args: Sequence[str], env: Mapping[str, str]) -> subprocess.Popen[str]:
    """What torchrun's agent, itself forked from here, does in place of starting a program anew."""
    request = {"program": args[1:], "cwd": os.getcwd(), "env": dict(env), "own_session": True}
    outputs = (handler._stdout, handler._stderr)
    streams = [0, *(file.fileno() if file else n for n, file in enumerate(outputs, 1))]
    if (pid := os.fork()) == 0:
        _become(request, streams)
    process: Any = subprocess.Popen.__new__(subprocess.Popen)
    vars(process).update(
        args=args, pid=pid, returncode=None, stdin=None, stdout=None, stderr=None, text_mode=True
    )
    process._child_created, process._waitpid_lock = True, threading.Lock()
    return process


def _reap(children: dict[int, socket.socket]) -> None:
    """Report the children that have ended."""
    while children:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if not pid:
            return
        if connection := children.pop(pid, None):
            with contextlib.suppress(OSError):  # nobody waits for it
                connection.sendall(struct.pack("i", os.waitstatus_to_exitcode(status)))
            connection.close()


def _become(request: dict[str, Any], streams: array.array[int] | list[int]) -> None:
    """Turn this child into the program; never returns."""
    code = 1
    try:
        for signum in (signal.SIGTERM, signal.SIGHUP, signal.SIGCHLD):  # an agent's handlers
            signal.signal(signum, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        atexit._clear()  # what the process before has to clear away is not this one's
        weakref.finalize._registry.clear()
        weakref.finalize._registered_with_atexit = False
        for target, number in enumerate(streams):
            os.dup2(number, target)
        for number in streams:
            if number > 2:
                os.close(number)
        if request["own_session"]:
            os.setsid()
        os.chdir(request["cwd"])
        os.environ.clear()
        os.environ.update(request["env"])
        sys.stdin = os.fdopen(0, closefd=False)
        sys.stdout = os.fdopen(1, "w", buffering=1, encoding="utf-8", closefd=False)
        sys.stderr = os.fdopen(2, "w", buffering=1, encoding="utf-8", closefd=False)
        _read_hub_variables_again()
        if threads := os.environ.get("OMP_NUM_THREADS"):  # read when torch was loaded
            _set_threads(int(threads))
        code = _run(request["program"])
    except BaseException:
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        os._exit(code)


def _read_hub_variables_again() -> None:
    """Give the hub's library this program's cache, address and token, which it read at import."""
    from huggingface_hub import constants, hf_api

    importlib.reload(constants)
    hf_api.api.endpoint = constants.ENDPOINT


def _set_threads(count: int) -> None:
    import torch

    import lorakit.pipeline.fit

    torch.set_num_threads(count)
    lorakit.pipeline.fit.DEFAULT_THREADS = count


def _run(program: list[str]) -> int:
    """Run ``program`` as Python's command line would; its exit code."""
    extra = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    for path in extra:
        if (custom := Path(path) / "sitecustomize.py").is_file():
            runpy.run_path(str(custom))
    kind, *rest = program
    try:
        if kind == "-m":
            sys.path[:0] = [os.getcwd(), *extra]
            sys.argv = rest
            runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
        elif kind == "-c":
            sys.path[:0] = ["", *extra]
            sys.argv = ["-c", *rest[1:]]
            exec(compile(rest[0], "<string>", "exec"), {"__name__": "__main__"})
        else:
            sys.path[:0] = [str(Path(kind).resolve().parent), *extra]
            sys.argv = [kind, *rest]
            runpy.run_path(kind, run_name="__main__")
        code = 0
    except SystemExit as ended:
        if ended.code is not None and not isinstance(ended.code, int):
            print(ended.code, file=sys.stderr)
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except KeyboardInterrupt:
        traceback.print_exc()
        code = 130
    except BaseException:
        traceback.print_exc()
        code = 1
    # As the interpreter ends: executors are told to, and threads that are no daemons are joined.
    threading._shutdown()
    atexit._run_exitfuncs()
    return code


if __name__ == "__main__":
    serve(sys.argv[1])

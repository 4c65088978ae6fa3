"""One message and exit code 2 for what a user can fix; LORAKIT_DEBUG=1 shows the traceback."""

from __future__ import annotations

import logging
import os
import socket
import sys
import warnings
from collections.abc import Callable
from typing import Any, NoReturn, TextIO

from lorakit.errors import LorakitError, is_out_of_memory
from lorakit.runs.files import ASIDE


def run_command(main: Callable[[list[str]], Any]) -> None:
    """Call ``main`` with the command's arguments; exceptions become messages and exit codes."""
    quiet_libraries()
    try:
        main(sys.argv[1:])
    except BrokenPipeError:
        # `lorakit … | head` is no error
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        _fail("interrupted", code=130)
    except LorakitError as error:
        _fail("" if error.is_of_all and os.environ.get("RANK", "0") != "0" else str(error))
    except Exception as error:
        if (message := explain(error)) is None:
            raise
        _fail(message)


def explain(error: Exception) -> str | None:
    """The message for what a user can fix, or None where it is a defect of ours."""
    if isinstance(error, LorakitError):
        return str(error)
    return explain_os_error(error) if isinstance(error, OSError) else _explain_foreign(error)


def explain_os_error(error: OSError) -> str:
    """What the system refused, and of which file, by its final name."""
    name = str(error.filename or "input/output").replace(ASIDE, "")
    return f"{name}: {error.strerror or error}"


def _explain_foreign(error: Exception) -> str | None:
    """The message for a user error that a library raised, or None where it is a defect of ours."""
    module = type(error).__module__.split(".")[0]
    if module in ("hydra", "omegaconf"):
        return " ".join(str(error).split("\n")[0:2])
    if type(error).__name__ in (
        "DistBackendError",
        "DistNetworkError",
        "DistStoreError",
    ) or "gloo/transport" in str(error):
        rank = os.environ.get("RANK", "0")
        return (
            f"rank {rank} lost contact with another process ({str(error).splitlines()[0][:200]});"
            " what ended that one comes first"
        )
    if is_out_of_memory(error):
        who = (
            f"rank {os.environ['RANK']} (host {socket.gethostname()}) is"
            if "RANK" in os.environ
            else "the run is"
        )
        said = (str(error).splitlines() or [type(error).__name__])[0][:160]
        return (
            f"{who} out of memory ({said}). Lower data.batch_size (or data.tokens_per_batch) or"
            " data.max_tokens, raise trainer.accumulate_grad_batches, or set"
            " trainer.activation_checkpointing=true"
        )
    if any(
        kind.__name__ == "InvalidCxxCompiler" for kind in type(error).__mro__
    ) or "InvalidCxxCompiler" in str(error):
        return (
            "trainer.compile=true needs a C++ compiler on this machine; install g++, or set it to"
            " false"
        )
    return None


def _fail(message: str, code: int = 2) -> NoReturn:
    if os.environ.get("LORAKIT_DEBUG") == "1":
        raise
    if message:  # else another process says it
        print(f"lorakit: {message}", file=sys.stderr)
    raise SystemExit(code)


_MESSAGES = (
    ".*does not have many workers.*",
    ".*`is_gradient_checkpointing` is deprecated.*",
    ".*LeafSpec.*is deprecated.*",
    ".*Checkpoint directory.*exists and is not empty.*",
    ".*Experiment logs directory.*",
    ".*modules in eval mode.*",
    ".*infer the `batch_size`.*",
    ".*resuming from a checkpoint that ended before the epoch.*",
    ".*IterableDataset.*__len__.*",
    ".*base_model_name_or_path.*was renamed.*",
    ".*a tied layer is part of the adapter.*",
    ".*Could not find a config file in.*",
    ".*tensorboardX.*",
    ".*Trying to infer.*",
    # Lightning's advice, which `lorakit launch slurm` does not follow
    ".*srun. command is available.*",
    ".*torch.distributed.* is deprecated. Please use.*",  # DeepSpeed's calls
)


class _StderrHandler(logging.StreamHandler[TextIO]):
    """Writes to what standard error is when a record comes, not to what it was at the start."""

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
        super().emit(record)


def quiet_libraries() -> None:
    """Call before the heavy imports. Sets up lorakit's own log on standard error."""
    for text in _MESSAGES:
        warnings.filterwarnings("ignore", message=text)
    # A user wants the message, not which line of ours it came from.
    warnings.formatwarning = _format_warning
    for name in ("lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    logging.getLogger("DeepSpeed").addFilter(
        lambda record: "Setting accelerator to CPU" not in record.getMessage()
    )
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DS_LOG_LEVEL", "error")
    # DDP advises to switch off what a batch of another kind may need
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    log = logging.getLogger("lorakit")
    if not log.handlers:
        handler = _StderrHandler()
        handler.setFormatter(logging.Formatter("lorakit: %(message)s"))
        log.addHandler(handler)
        log.propagate = False


def _format_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    line: str | None = None,
) -> str:
    return f"warning: {message}\n"

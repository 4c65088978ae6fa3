"""Library chatter that a user can do nothing about stays off the terminal; lorakit's own
warnings and all errors remain.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from typing import TextIO

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

"""torchrun on one machine of a SLURM job, without tracebacks of its own: the processes have said what ended them."""

from __future__ import annotations

import logging
import signal

from lorakit.cli.guard import run_command
from lorakit.launch.torchrun import raise_as_ended


def main(arguments: list[str]) -> None:
    """Run torchrun on its own ``arguments``; end as the first process has ended."""
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    try:
        run.main(arguments)
    except SignalException as error:
        if error.sigval == signal.SIGINT:
            raise KeyboardInterrupt from error
        raise SystemExit(128 + error.sigval) from error
    except ChildFailedError as error:
        raise_as_ended(error)


if __name__ == "__main__":
    run_command(main)

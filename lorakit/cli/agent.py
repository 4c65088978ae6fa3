"""torchrun on one machine of a SLURM job, without tracebacks of its own: the processes have said
what ended them.
"""

from __future__ import annotations

import socket

from lorakit.cli.guard import run_command
from lorakit.errors import LorakitError
from lorakit.launch.torchrun import ends_as_its_processes


def main(arguments: list[str]) -> None:
    """Run torchrun on its own ``arguments``; end as the first process has ended."""
    from torch.distributed import DistError, run

    try:
        with ends_as_its_processes():
            run.main(arguments)
    except DistError as error:
        raise LorakitError(
            f"{socket.gethostname()} cannot join the others: {str(error).splitlines()[0][:200]}"
        ) from error


if __name__ == "__main__":
    run_command(main)

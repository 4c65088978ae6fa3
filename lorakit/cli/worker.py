"""One of several processes: the run that the job file describes. ``lorakit train`` starts it;
torchrun gives it its rank.
"""

from __future__ import annotations

import json
from pathlib import Path

from lorakit.cli.guard import run_command
from lorakit.cli.train import leave_if_interrupted


def main(arguments: list[str]) -> None:
    """Train as the job file ``arguments[0]`` says."""
    from lorakit.config.schema import RunConfig
    from lorakit.pipeline.fit import train

    job = json.loads(Path(arguments[0]).read_text(encoding="utf-8"))
    outcome = train(
        RunConfig.from_dict(job["config"]),
        experiment=job["experiment"],
        command=job["command"],
        overrides=job["overrides"],
    )
    leave_if_interrupted(outcome.interrupt)


if __name__ == "__main__":
    run_command(main)

"""The ``lorakit`` program: finds the command and runs its module. Imports nothing heavy."""

from __future__ import annotations

import difflib
import os
import runpy
import sys

COMMANDS = {
    "demo": "teach a bundled tiny model pig latin, or to read digits, and show what it learnt",
    "train": "fine-tune: lorakit train model.path=… data.path=… lora.rank=32",
    "launch": "print what to type on each of several machines, or submit a SLURM job",
    "plan": "memory, time and cost of a run, from its config alone",
    "fetch": "bring a run's model and data here, for a machine without a network",
    "doctor": "what of this machine a run would use, with remedies for the rest",
    "show": "print examples coloured by weight, and the figures of a data set",
    "sample": "generate with a trained adapter: lorakit sample [RUN] -- TEXT",
    "evaluate": "loss, perplexity and exact match of a run on a data set",
    "merge": "write base and adapter as one model for plain transformers",
    "export": (
        "write adapter or merged model for PEFT, transformers or vLLM, with a card; push it to"
        " the hub"
    ),
    "serve": "serve Tinker's and OpenAI's interfaces: lorakit serve --model NAME=PATH",
    "tinker-env": "print the variables with which programs for the tinker SDK find the server",
    "runs": "list the runs",
    "report": "compare runs, or those of a sweep: a table, CSV, and a page with plots",
}


def usage() -> str:
    """The text of ``lorakit --help``."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {text}" for name, text in COMMANDS.items()]
    return "\n".join(
        [
            "usage: lorakit COMMAND [ARGUMENTS]",
            "",
            "LoRA fine-tuning of language models on your own hardware.",
            "",
            *lines,
            "",
            (
                "`lorakit COMMAND --help` tells more about a command. LORAKIT_DEBUG=1 shows"
                " tracebacks."
            ),
        ]
    )


def main() -> None:
    """Run the command in ``sys.argv``. The module runs as ``__main__``, so that it can be
    started again by other ranks.
    """
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(usage())
        return
    if arguments[0] in ("-V", "--version"):
        from lorakit import __version__

        print(f"lorakit {__version__}")
        return
    command = arguments[0]
    if command not in COMMANDS:
        near = difflib.get_close_matches(command, COMMANDS, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        print(f"lorakit: unknown command {command!r}{hint}\n\n{usage()}", file=sys.stderr)
        raise SystemExit(2)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.argv = [sys.argv[0], *arguments[1:]]
    runpy.run_module(
        f"lorakit.cli.{command.replace('-', '_')}", run_name="__main__", alter_sys=True
    )


if __name__ == "__main__":
    main()

"""``lorakit report [RUN … | sweep=NAME]``: runs in the terminal, as CSV, and as a page."""

from __future__ import annotations

import argparse
import functools
from pathlib import Path
from typing import TYPE_CHECKING

from lorakit.cli.guard import run_command
from lorakit.errors import ConfigError
from lorakit.extras import find_problem

if TYPE_CHECKING:
    from lorakit.reports.comparison import Comparison


def main(arguments: list[str]) -> None:
    """Print the table and write the files."""
    parser = argparse.ArgumentParser(
        prog="lorakit report",
        usage=(
            "lorakit report [RUN … | sweep=NAME] [--metric FIGURE] [--maximize | --minimize]"
            " [--runs DIR] [--out DIR]"
        ),
        description=(
            "Compare runs, or those of a sweep: a table here, report.csv and report.html in a"
            " folder. Without a name it is the last sweep, or the last run where there is none."
        ),
    )
    parser.add_argument("names", nargs="*", metavar="RUN", help="names of runs, or sweep=NAME")
    parser.add_argument(
        "--metric",
        help="a figure of history.jsonl (default: the sweep's own, or the evaluation loss)",
    )
    direction = parser.add_mutually_exclusive_group()
    direction.add_argument("--maximize", action="store_true", default=None, help="more is better")
    direction.add_argument(
        "--minimize", dest="maximize", action="store_false", help="less is better"
    )
    parser.add_argument("--runs", help="folder of the runs (default: runs, in the current folder)")
    parser.add_argument(
        "--out", help="folder of the files (default: RUNS/.sweep/NAME, or RUNS/.report)"
    )
    options = parser.parse_args(arguments)

    from lorakit.reports.runs_page import as_page
    from lorakit.reports.tables import print_comparison
    from lorakit.runs.files import find_write_problem, write_whole

    root = Path(options.runs or "runs").expanduser()
    if not root.is_dir():
        raise ConfigError(f"{'--runs ' if options.runs else ''}{root}: no such folder")
    comparison, is_sweep = _choose(root, options)
    out = (
        Path(options.out).expanduser()
        if options.out
        else root / (f".sweep/{comparison.name}" if is_sweep else ".report")
    )
    if problem := find_write_problem(out / "report.html"):
        raise ConfigError(f"{out} cannot be written: {problem}")
    out.mkdir(parents=True, exist_ok=True)
    print_comparison(comparison, is_sweep=is_sweep)
    for file, text in (
        ("report.csv", comparison.as_csv()),
        ("report.html", as_page(comparison, is_sweep=is_sweep)),
    ):
        write_whole(out / file, functools.partial(Path.write_text, data=text, encoding="utf-8"))
        print(f"written {out / file}")
    if problem := find_problem("matplotlib"):
        print(f"report.html has no plots: {problem}")


def _choose(root: Path, options: argparse.Namespace) -> tuple[Comparison, bool]:
    """The runs that are asked for, and whether they are those of a sweep."""
    from lorakit.reports.comparison import compare, compare_runs, sweeps_in

    names = list(options.names)
    wanted = {"metric": options.metric, "is_maximized": options.maximize}
    known = sweeps_in(root)
    for name in names:
        if "=" in name and (len(names) > 1 or not name.startswith("sweep=")):
            raise ConfigError(
                f"{name}: what is compared is written sweep=NAME, or as names of runs"
            )
    if names and names[0].startswith("sweep="):
        return compare(root, names[0].partition("=")[2] or None, **wanted), True
    if len(names) == 1 and names[0] in known and not (root / names[0]).is_dir():
        return compare(root, names[0], **wanted), True
    if names or not known:
        return compare_runs(root, names, **wanted), False
    return compare(root, None, **wanted), True


if __name__ == "__main__":
    run_command(main)

"""Documents that cannot rot: every shell block of README and docs/ runs, section by section, in a
fresh folder, on tiny models.

What stands in a block is typed into bash as it is, with three differences, so that it takes
seconds: what trains makes two steps; the hub is one on this machine, where `Qwen/Qwen3-0.6B` is the
bundled model; `sbatch` only says that it was asked. Of quoted output
the form is compared: all but numbers, times and names.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import datasets
import pytest
from hub_stand_in import Hub, Writes

from lorakit.model.load import BUNDLED

REPOSITORY = Path(__file__).resolve().parents[1]
PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
SHORT = (
    "trainer.max_steps=2 data.val_rows=4 callbacks.samples.max_tokens=2"
    " callbacks.samples.num_prompts=1"
)
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PROGRAM = """
import tinker
client = tinker.ServiceClient().create_lora_training_client(base_model="Qwen/Qwen3-8B", rank=4)
print(client.get_info())
"""


class Section(NamedTuple):
    """A heading of a page, with its shell blocks."""

    page: str
    title: str
    blocks: list[str]

    @property
    def commands(self) -> str:
        """The blocks that are typed, one after the other."""
        return "".join(block for block in self.blocks if not _is_output(block))


def sections() -> list[Section]:
    found = []
    for page in PAGES:
        for part in re.split(r"^## ", page.read_text(encoding="utf-8"), flags=re.MULTILINE):
            blocks = [
                text
                for language, text in FENCE.findall(part)
                if language in ("", "sh", "bash", "console")
            ]
            if blocks:
                found.append(Section(page.name, part.split("\n", 1)[0].lstrip("# "), blocks))
    return found


def _is_output(block: str) -> bool:
    return not re.match(
        r"(lorakit \w+ |lorakit \w+$|printf |make |torchrun |python |export |eval )", block
    )


def test_the_pages_have_commands_and_what_is_quoted_is_compared() -> None:
    quoted = {
        block.split("\n")[0]
        for section in sections()
        for block in section.blocks
        if _is_output(block)
    }
    assert {line.split(":")[0] for line in quoted} == {
        "model tiny, data pig_latin/train, on the CPU",
        "held out, exactly right",
        "lorakit",
    }, "compare the new one, too"
    assert sum(len(section.commands.splitlines()) for section in sections()) > 30
    left_out = [
        line
        for section in sections()
        if "make " in section.commands
        for line in section.commands.splitlines()
    ]
    assert all(line.startswith("make ") for line in left_out), (
        "a section that is not run has more than calls of make"
    )
    makefile = (REPOSITORY / "Makefile").read_text()
    for page in (*PAGES, REPOSITORY / "CONTRIBUTING.md", REPOSITORY / "AGENTS.md"):
        for target in re.findall(r"(?:^|`)make ([a-z-]+)", page.read_text(), re.MULTILINE):
            assert re.search(rf"^[a-z -]*\b{target}\b[a-z -]*:", makefile, re.MULTILINE), (
                f"{page.name}: make {target}"
            )


def test_links_lead_somewhere() -> None:
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for target in re.findall(r"\]\(([^)\s]+)\)", text):
            path, _, anchor = target.partition("#")
            if "://" in path:
                continue
            there = (page.parent / path) if path else page
            assert there.exists(), f"{page.name}: {target}"
            titles = (
                re.findall(r"^#+ (.+)$", there.read_text(encoding="utf-8"), re.MULTILINE)
                if anchor
                else []
            )
            anchors = {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}
            assert not anchor or anchor in anchors, f"{page.name}: {target}"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """What a reader has: rows under the names that the pages use, a hub, and an environment with
    lorakit in it.
    """
    folder = tmp_path_factory.mktemp("docs")
    hub = folder / "hub"
    shutil.copytree(BUNDLED["tiny"], hub / "models/Qwen/Qwen3-0.6B")
    (hub / "datasets/HuggingFaceH4/no_robots").mkdir(parents=True)
    write_rows(folder / "rows")
    shutil.copy(folder / "rows/chats.jsonl", hub / "datasets/HuggingFaceH4/no_robots/train.jsonl")
    (folder / "bin").mkdir()
    for name, text in (
        ("sbatch", "#!/bin/sh\necho Submitted batch job 7\n"),
        ("python", f'#!/bin/sh\nexec {sys.executable} "$@"\n'),
    ):
        (folder / "bin" / name).write_text(text)
        (folder / "bin" / name).chmod(0o755)
    with Hub(hub).serving() as serving:
        (folder / "address").write_text(serving.address)
        yield folder


def write_rows(folder: Path) -> None:
    folder.mkdir()
    plain = [{"prompt": f"{i} plus {i}:", "completion": f" {2 * i}."} for i in range(24)]
    chats = [
        {
            "messages": [
                {"role": "user", "content": f"{i}?"},
                {"role": "assistant", "content": f"It is {i * i}."},
            ]
        }
        for i in range(24)
    ]
    pairs = [{"prompt": f"{i}:", "chosen": f" {i}.", "rejected": " no."} for i in range(24)]
    named = {"rows": plain, "held_out": plain[:4], "chats": chats, "chat": chats, "pairs": pairs}
    for name, rows in named.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = [{"question": row["prompt"], "answer": row["completion"]} for row in plain]
    datasets.Dataset.from_list(asked).to_parquet(folder / "maths.parquet")
    bad = [json.dumps(plain[0]), '{"prompt": 3, "completion": "x"}', '{"prompt": "x"}', "not json"]
    (folder / "bad.jsonl").write_text("\n".join(bad) + "\n")
    (folder / "any_program_for_the_sdk.py").write_text(PROGRAM)


def run(script: str, place: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    path = (
        f"{place / 'bin'}{os.pathsep}{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    )
    environment = {
        **os.environ,
        "PATH": path,
        "HF_HOME": str(place / "cache"),
        "HF_ENDPOINT": (place / "address").read_text(),
    }
    environment |= {
        "HF_TOKEN": Writes.TOKEN,
        "HF_HUB_DISABLE_XET": "1",
        "HOME": str(folder),
        "COLUMNS": "160",
    }
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_CACHE", "WANDB_API_KEY", "WANDB_SERVICE"):
        environment.pop(name, None)
    command = ["bash", "-euo", "pipefail", "-c", script]
    return subprocess.run(
        command,
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=1200,
        check=False,
    )


def shortened(script: str) -> str:
    """The same commands, made to take seconds."""
    lines = []
    for line in script.splitlines():
        words, separator, comment = line.partition("  #")
        if re.search(r"\btrain\b", words) and not words.startswith("lorakit fetch"):
            words = f"{words.rstrip()} {SHORT}" + (
                " sweep.trials=2" if "sweep=optuna" in words else ""
            )
        lines.append(words + separator + comment)
    return "\n".join(lines) + "\n"


@pytest.mark.slow
@pytest.mark.parametrize(
    "section",
    [s for s in sections() if s.commands and "make " not in s.commands],
    ids=lambda s: s.title,
)
def test_the_commands_of_a_section_run_in_a_fresh_folder(
    section: Section, place: Path, tmp_path: Path
) -> None:
    shutil.copytree(place / "rows", tmp_path, dirs_exist_ok=True)
    if section.page == "own-code.md":
        shutil.copytree(REPOSITORY / "tests/pipeline/own_package", tmp_path, dirs_exist_ok=True)
        rows = [{"frage": f"{i} plus {i}", "antwort": f" {2 * i}.", "gut": True} for i in range(40)]
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    script = shortened(section.commands)
    if "lorakit serve" in script:
        script = with_server(script)
    done = run(script, place, tmp_path)
    assert done.returncode == 0, f"{script}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    assert "Traceback" not in done.stderr, done.stderr


def with_server(script: str) -> str:
    """The section that starts a server: a port of its own, time to start, and an end."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    script = script.replace("/models/my-model", str(BUNDLED["tiny"])).replace(
        "lorakit serve", f"lorakit serve --port {port}"
    )
    wait = f"for i in $(seq 120); do curl -s 127.0.0.1:{port} >/dev/null && break; sleep 1; done\n"
    before, after = script.split('eval "', 1)
    return f'{before}trap "kill %1" EXIT\n{wait}eval "{after}'


def form_of(text: str) -> list[str]:
    """The lines of ``text`` without what differs from run to run."""
    lines = []
    for line in re.sub(r"\x1b\[[0-9;]*m", "", text).splitlines():
        line = re.sub(r"\b(32-true|bf16-mixed|16-mixed)\b", "PRECISION", line)
        line = re.sub(r"\d[\d,.]*(e-?\d+)?", "#", re.sub(r"[━─┏┓┡┩├┤┴┬┼└┘╇┳]+", "─", line))
        lines.append(re.sub(r"#(-#)+", "#", re.sub(r"\s+", " ", line)).strip())
    return lines


@pytest.mark.slow
@pytest.mark.parametrize(
    ("which", "begins"), [("", "model tiny"), ("digits", "held out, exactly right")]
)
def test_the_demos_say_what_is_quoted(which: str, begins: str, place: Path, tmp_path: Path) -> None:
    (block,) = (
        block for section in sections() for block in section.blocks if block.startswith(begins)
    )
    done = run(f"lorakit demo {which}", place, tmp_path)
    assert done.returncode == 0, done.stderr
    said = form_of(done.stdout)
    answers = re.compile(r"(asking|English|right|wrong)|^[a-z -]+$")  # other words each time
    for line in form_of(block):
        assert answers.search(line) or line in said, (
            f"{line!r} is not said any more:\n{done.stdout}"
        )


@pytest.mark.slow
def test_the_report_of_bad_rows_is_the_one_that_is_quoted(place: Path, tmp_path: Path) -> None:
    (block,) = (
        block
        for section in sections()
        for block in section.blocks
        if block.startswith("lorakit: bad.jsonl")
    )
    shutil.copytree(place / "rows", tmp_path, dirs_exist_ok=True)
    done = run("lorakit train data.path=bad.jsonl model.path=tiny", place, tmp_path)
    assert done.returncode == 2 and done.stderr.strip() == block.strip(), done.stderr

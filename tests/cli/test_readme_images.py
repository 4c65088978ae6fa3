"""README's page on Qwen3-VL-30B-A3B: its commands, exactly as written, on the tiny model."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

README = Path(__file__).parents[2] / "README.md"
PAGE = (
    README.read_text(encoding="utf-8").split("## Fine-tune Qwen3-VL-30B-A3B\n")[1].split("\n## ")[0]
)
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


def run(command: list[str], folder: Path, text: str | None = None) -> str:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        command,
        cwd=folder,
        input=text,
        env={**os.environ, "PATH": path, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def test_the_row_that_is_shown_is_one(tmp_path: Path) -> None:
    (row,) = (json.loads(block) for language, block in BLOCKS if language == "json")
    assert [message["role"] for message in row["messages"]] == ["user", "assistant"]


@pytest.mark.slow
def test_its_commands_lead_from_rows_with_images_to_a_merged_model(tmp_path: Path) -> None:
    shell = "set -e\n" + "".join(block for language, block in BLOCKS if not language)
    assert shell.count("lorakit ") == 6
    out = run(["bash"], tmp_path, shell)
    page = (tmp_path / "rows.html").read_text(encoding="utf-8")
    assert page.count("<figure") == 3 and "which digit?" in re.sub(r"<[^>]+>", "", page)
    assert "4 images of up to 1,024 among them" in out and "zero3" in out
    assert '"exact_match"' in out and '"rows": 100' in out
    assert (tmp_path / "merged" / "preprocessor_config.json").is_file()
    (code,) = (block for language, block in BLOCKS if language == "python")
    model_type, num_parameters = run([sys.executable, "-c", code], tmp_path).split()
    assert model_type == "qwen3_vl_moe" and 2.5e6 < int(num_parameters) < 3.5e6

"""Recipes are flat programs on the public interface; each runs, in this process and, by the
public SDK, against a server.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import signal
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import preloaded
import pytest

from lorakit import ServiceClient

FOLDER = Path(__file__).resolve().parents[1] / "recipes"
RECIPES = sorted(FOLDER.glob("*.py"))


def load(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    assert spec and spec.loader
    recipe = importlib.util.module_from_spec(spec)
    sys.modules[name] = recipe  # where dataclasses look for their annotations
    spec.loader.exec_module(recipe)
    return recipe


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_a_recipe_is_short(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) < 235  # of at most 100 columns


# ---- in this process


def test_the_recipe_of_supervised_fine_tuning_runs(tmp_path: Path) -> None:
    from lorakit.weights.adapter import AdapterFiles

    load("sft").main(steps="1")
    assert AdapterFiles.open(tmp_path / "adapter").config["r"] == 32


def test_sft_loop_goes_on_from_a_saved_state_to_the_same_bits(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = load("sft_loop")
    words = ("abcdef", "bcdefg", "cdefgh", "defghi")
    rows = [
        {"prompt": f"Input: {word}\nSay:", "completion": f" {word[::-1]}\n"} for word in words * 5
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    options = [
        "rows.jsonl",
        "--steps",
        "6",
        "--batch-size",
        "4",
        "--save-every",
        "2",
        "--eval-every",
        "2",
        "--rank",
        "8",
    ]
    whole = recipe.main(options)
    printed = capsys.readouterr().out
    held_out_losses = [float(value) for value in re.findall(r"held-out loss (\S+)", printed)]
    assert list(whole) == list(range(6)) and whole[5] < 0.5 * whole[0]
    assert len(held_out_losses) == 4 and held_out_losses[-1] < held_out_losses[0]
    assert re.search(r"'Input: (abcdef|bcdefg|cdefgh|defghi)\\nSay:' -> ", printed)
    paths = re.findall(r"saved (\S+)", printed)
    assert [path.rpartition("/")[2] for path in paths] == ["step-2", "step-4", "step-6"]
    for path, first_step in zip(paths, (2, 4), strict=False):
        resumed = recipe.main([*options, "--resume", path])
        # to the bit
        assert resumed == {step: loss for step, loss in whole.items() if step >= first_step}
    monkeypatch.setattr(
        ServiceClient,
        "create_training_client_from_state_with_optimizer",
        ServiceClient.create_training_client_from_state,
    )
    without_optimizer = recipe.main([*options, "--resume", paths[0]])
    assert without_optimizer[2] == whole[2] and without_optimizer[5] != whole[5]
    with pytest.raises(SystemExit, match="not a path that this program saved"):
        recipe.main([*options, "--resume", "tinker://x/sampler_weights/step-2"])


def test_rl_loop_learns_and_plots(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    history = load("rl_loop").main(
        ["--steps", "8", "--eval-every", "8", "--samples", "8", "--plot", "reward.png"]
    )
    assert history.blind == 0.25 and "ignores the prompt: 0.250" in capsys.readouterr().out
    assert list(history.trained) == list(range(8)) and list(history.held_out) == [0, 8]
    assert history.held_out[0] < 0.25 < history.held_out[8]
    assert (tmp_path / "reward.png").read_bytes().startswith(b"\x89PNG")


def test_rl_loop_keeps_held_out_prompts_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    import random

    recipe = load("rl_loop")
    monkeypatch.setattr(recipe, "OTHER_LETTERS", "ef")
    held_out = [recipe.draw_problem(random.Random(seed), "a") for seed in range(30)]
    rng = random.Random(0)
    assert not {recipe.draw_new_problem(rng, held_out) for _ in range(500)} & set(held_out)


def test_dpo_learns_what_is_preferred(capsys: pytest.CaptureFixture[str]) -> None:
    scores = load("dpo").main(["--steps", "8", "--eval-every", "8"])
    assert scores[0].accuracy == 0.5 and scores[0].margin == 0 and 0.4 < scores[0].likelier < 0.6
    assert scores[-1].accuracy > 0.7 and scores[-1].margin > 0
    assert "after 8 steps: held-out accuracy" in capsys.readouterr().out


def test_distill_brings_the_student_to_its_teacher(capsys: pytest.CaptureFixture[str]) -> None:
    divergences = load("distill").main(
        ["--steps", "4", "--teacher-steps", "4", "--eval-every", "4", "--samples", "2"]
    )
    assert divergences[-1] < 0.5 * divergences[0]
    assert re.search(
        r"the teacher is tinker://\S+/sampler_weights/teacher", capsys.readouterr().out
    )


# ---- against a server


def is_open(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The variables for a program of the SDK, while `lorakit serve` runs."""
    folder = tmp_path_factory.mktemp("server")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    variables = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(FOLDER.parent)}
    command, data = ["-m", "lorakit"], ["--data", str(folder / "data")]
    with (folder / "log").open("w") as log:
        server = preloaded.start(
            [*command, "serve", *data, "--port", str(port)], stdout=log, stderr=log, env=variables
        )
    try:
        deadline = time.monotonic() + 120
        while not is_open(port):
            assert server.poll() is None and time.monotonic() < deadline, (
                folder / "log"
            ).read_text()
            time.sleep(0.05)
        printed = preloaded.run([*command, "tinker-env", *data], check=True, env=variables).stdout
        yield {**variables, **dict(re.findall(r"export (\w+)=(\S+)", printed))}
    finally:
        server.terminate()
        server.wait(30)


def run_both(
    name: str, options: list[str], environment: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> tuple[str, str]:
    """Return what a recipe prints with ``--server`` and in this process, which runs it at the
    same time.
    """
    command = [str(FOLDER / f"{name}.py"), "--server", *options]
    with preloaded.start(command, env=environment) as program:
        load(name).main(options)
        served, errors = program.communicate(timeout=300)
    # The SDK's process aborts at its exit now and then, all work done: what it printed is compared.
    assert program.returncode in (0, -signal.SIGABRT), errors
    assert not errors.strip()  # the SDK has warned of nothing
    return served, capsys.readouterr().out


def numbers(label: str, printed: str) -> list[float]:
    return [float(value) for value in re.findall(rf"{label} (-?[\d.]+)", printed)]


def test_sft_loop_is_the_same_on_a_server(
    environment: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    served, local = run_both("sft_loop", ["--steps", "3", "--save-every", "2"], environment, capsys)
    assert len(numbers("loss", served)) == 5
    assert numbers("loss", served) == pytest.approx(numbers("loss", local), abs=2e-3)
    command = [str(FOLDER / "sft_loop.py"), "--server", "--steps", "3", "--resume"]
    path = re.findall(r"saved (\S+)", served)[0]
    resumed = preloaded.run([*command, path], env=environment, timeout=300, check=True).stdout
    # the step after the saved one, and what is held out
    assert numbers("loss", resumed)[1:] == numbers("loss", served)[3:]


def test_rl_loop_is_the_same_on_a_server(
    environment: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    served, local = run_both(
        "rl_loop", ["--steps", "1", "--samples", "8", "--plot", "reward.png"], environment, capsys
    )
    assert numbers("reward", served)[:2] == numbers("reward", local)[:2]  # before the first step
    assert numbers("reward", served) == pytest.approx(numbers("reward", local), abs=0.05)
    assert Path("reward.png").is_file()


def test_dpo_is_the_same_on_a_server(
    environment: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    served, local = run_both("dpo", ["--steps", "2", "--batch-size", "16"], environment, capsys)
    assert numbers("loss", served) == pytest.approx(numbers("loss", local), abs=2e-3)
    assert numbers("held-out accuracy", served) == pytest.approx(
        numbers("held-out accuracy", local), abs=0.02
    )


def test_distill_is_the_same_on_a_server(
    environment: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    served, local = run_both(
        "distill", ["--steps", "1", "--teacher-steps", "3", "--samples", "1"], environment, capsys
    )
    assert numbers("held-out KL", served)[0] == pytest.approx(
        numbers("held-out KL", local)[0], abs=0.02
    )
    assert numbers("held-out KL", served)[-1] < numbers("held-out KL", served)[0]


# ---- to the end


@pytest.mark.slow
def test_sft_loop_reaches_rows_that_it_was_not_shown(capsys: pytest.CaptureFixture[str]) -> None:
    load("sft_loop").main([])
    printed = capsys.readouterr().out
    assert numbers("held-out loss", printed)[-1] < 0.01
    answers = re.findall(r"-> '(.*)' \(right: '(.*)'\)", printed)
    assert len(answers) == 4 and all(given == right for given, right in answers)


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["importance_sampling", "ppo"])
def test_rl_loop_reads_its_prompts(loss: str) -> None:
    history = load("rl_loop").main(["--loss", loss])
    assert history.held_out[0] < 0.3 and history.blind < 0.3 and history.held_out[50] > 0.9


@pytest.mark.slow
def test_dpo_prefers_among_pairs_that_it_was_not_shown() -> None:
    scores = load("dpo").main([])
    assert scores[0].accuracy == 0.5 and scores[-1].accuracy > 0.9 and scores[-1].likelier > 0.9


@pytest.mark.slow
def test_distill_lowers_the_divergence_tenfold() -> None:
    divergences = load("distill").main([])
    assert divergences[0] > 1 and divergences[-1] < divergences[0] / 10


@pytest.mark.slow
@pytest.mark.parametrize("options", [[], ["--server"]], ids=["in_process", "server"])
def test_the_first_program_of_all_runs(options: list[str], environment: dict[str, str]) -> None:
    command = [str(FOLDER / "pig_latin.py"), *options]
    printed = preloaded.run(command, env=environment, timeout=300, check=True).stdout
    assert printed.splitlines()[-8:].count(" ubber-ray uck-day") == 4

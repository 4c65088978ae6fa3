"""What happens before a run's first step: what is imported, composed and planned, and how often."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from small import SMALL

from lorakit.planner import step_plan as planning
from lorakit.training import gpus

Call = Callable[..., tuple[int, str, str]]
QUICK = (*SMALL, "trainer.max_steps=1", "callbacks.samples=null", "logger=none")


def run_alone(code: str) -> subprocess.CompletedProcess[str]:
    """Run ``code`` in a process that has imported nothing."""
    return subprocess.run([sys.executable, "-c", code], text=True, capture_output=True, check=False)


def test_help_and_version_import_nothing_but_python() -> None:
    done = run_alone("""
import sys
before = set(sys.modules)
from lorakit.cli.main import main
for word in ("--help", "--version"):
    sys.argv = ["lorakit", word]
    main()
new = {name.partition(".")[0] for name in set(sys.modules) - before}
print(sorted(new - set(sys.stdlib_module_names)))
""")
    assert done.stdout.splitlines()[-1] == "['lorakit']", done.stderr
    assert done.stdout.startswith("usage: lorakit COMMAND")


def test_the_first_line_names_model_data_and_device_before_torch_is_imported() -> None:
    done = run_alone("""
import sys
sys.modules["torch"] = None  # whoever imports it ends the program
from lorakit.cli.train import main
main(["model.path=tiny", "data.path=pig_latin/train", "trainer.accelerator=cpu"])
""")
    assert done.stdout == "model tiny, data pig_latin/train, on the CPU\n"
    assert "import of torch halted" in done.stderr  # the control: it was next


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        (("data.path=rows.txt",), "model tiny, data rows.txt, on the CPU"),
        (
            ("data.path=null", "data.sources=[rows.txt,{path: rows.txt}]"),
            "model tiny, data 2 sources, on the CPU",
        ),
        (("data.path=rows.txt", "launch=slurm"), "model tiny, data rows.txt, in a job of SLURM"),
    ],
)
def test_the_first_line_says_where_rows_come_from(
    workplace: Path, lorakit: Call, settings: tuple[str, ...], line: str
) -> None:
    (workplace / "rows.txt").write_text("a line\n")
    _, out, _ = lorakit(
        "train", "model.path=tiny", "trainer.accelerator=cpu", "lora.rank=0", *settings
    )
    assert out.splitlines()[0] == line


@pytest.mark.parametrize(
    ("visible", "accelerator", "device"),
    [
        (None, "auto", "2 GPUs (NVIDIA H200)"),
        (None, "cuda", "2 GPUs (NVIDIA H200)"),
        ("1", "auto", "a GPU (NVIDIA H200)"),
        ("", "auto", "this machine"),
        (None, "cpu", "the CPU"),
    ],
)
def test_the_device_is_guessed_from_the_drivers(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    visible: str | None,
    accelerator: str,
    device: str,
) -> None:
    for number in range(2):
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "information").write_text("Model: \t\t NVIDIA H200\nIRQ: 1\n")
    monkeypatch.setattr(gpus, "_NVIDIA_GPUS", tmp_path)
    monkeypatch.setattr(gpus, "_AMD_NODES", tmp_path / "none")
    monkeypatch.setattr(gpus, "_is_cpu_build", lambda: False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert gpus.guess_device(accelerator) == device
    one = device.replace("2 GPUs", "a GPU")
    assert gpus.guess_device(accelerator, 1) == one == gpus.guess_device(accelerator, "1")


def test_a_build_of_torch_without_gpus_is_known_by_its_file() -> None:
    import torch

    is_for_cpu = torch.version.cuda is None and torch.version.hip is None
    assert gpus._is_cpu_build() == is_for_cpu


def count_calls(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str) -> list[Any]:
    """The arguments of all calls of ``owner.name``, from now on."""
    calls, original = [], getattr(owner, name)

    def counted(*args: Any, **options: Any) -> Any:
        calls.append((args, options))
        return original(*args, **options)

    monkeypatch.setattr(owner, name, counted)
    return calls


def test_the_config_is_composed_once(
    workplace: Path, lorakit: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hydra._internal.config_loader_impl import ConfigLoaderImpl

    composed = count_calls(monkeypatch, ConfigLoaderImpl, "load_configuration")
    code, _, err = lorakit("train", *QUICK)
    assert code == 0, err
    assert len(composed) == 1


def test_a_config_of_ones_own_may_say_that_it_is_a_sweep(workplace: Path, lorakit: Call) -> None:
    """hydra.mode and hydra.sweeper.params in a file, and no -m on the command line."""
    (workplace / "mine/experiment").mkdir(parents=True)
    (workplace / "mine/experiment/both.yaml").write_text(
        "# @package _global_\n"
        "defaults: [pig_latin]\n"
        "hydra: {mode: MULTIRUN, sweeper: {params: {optim.lr: '1e-3,2e-3'}}}\n"
    )
    code, _, err = lorakit(
        "train", "--config-dir", "mine", "experiment=both", "group=it", *QUICK[:-2], "logger=none"
    )
    assert code == 0, err
    assert sorted(path.name for path in (workplace / "runs").glob("it-*")) == ["it-0", "it-1"]


@pytest.mark.parametrize(
    "flag", [("--config-dir", "mine"), ("--config-dir=mine",), ("-cd", "mine")]
)
def test_a_folder_of_configs_is_found_by_any_form_of_its_flag(
    workplace: Path, lorakit: Call, flag: tuple[str, ...]
) -> None:
    (workplace / "mine/experiment").mkdir(parents=True)
    (workplace / "mine/experiment/x.yaml").write_text(
        "# @package _global_\ndefaults: [pig_latin]\nlora: {rank: 0}\n"
    )
    code, _, err = lorakit("train", *flag, "experiment=x")
    assert code == 2 and "lora.rank=0 must be at least 1" in err
    # a search path of one's own holds beside the folder
    shutil.copytree(workplace / "mine", workplace / "more")
    (workplace / "more/experiment/x.yaml").rename(workplace / "more/experiment/y.yaml")
    for name in ("x", "y"):
        code, _, err = lorakit(
            "train", *flag, f"experiment={name}", "hydra.searchpath=[file://more]"
        )
        assert code == 2 and "lora.rank=0 must be at least 1" in err
    code, _, err = lorakit("train", "--config-dir", "absent", "experiment=x")
    assert code == 2 and "absent" in err


def test_hydras_own_settings_of_a_job_hold(workplace: Path, lorakit: Call) -> None:
    """hydra.job.env_set is set around the task, as under ``hydra.main``."""
    (workplace / "mine/experiment").mkdir(parents=True)
    (workplace / "mine/experiment/x.yaml").write_text(
        "# @package _global_\ndefaults: [pig_latin]\n"
        "paths: {runs: '${oc.env:SEEN_BY_THE_JOB}'}\n"
        "hydra: {job: {env_set: {SEEN_BY_THE_JOB: elsewhere}}}\n"
    )
    code, _, err = lorakit("train", "--config-dir", "mine", "experiment=x", "run=a", *QUICK)
    assert code == 0 and (workplace / "elsewhere/a/adapter").is_dir(), err


def test_a_small_model_is_not_traced_and_a_plan_is_made_once(
    workplace: Path, lorakit: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = count_calls(monkeypatch, planning, "trace_step")
    passes = count_calls(monkeypatch, planning, "trace_forward")
    code, out, err = lorakit("train", *QUICK)
    assert code == 0 and not steps and not passes and "memory:" not in out, err
    code, out, err = lorakit("train", *QUICK, "plan.memory_gb=0.12", "trainer.precision=32-true")
    assert code == 0 and "memory:" in out, err
    assert len(steps) == 1 and len(passes) <= 1

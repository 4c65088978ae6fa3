"""Every strategy, in real processes, computes what one process computes. One launch per strategy
and number of processes.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import sys
from pathlib import Path
from typing import Any

import preloaded
import pytest
import torch
from tiny_models import make_model, relative_l2
from transformers import AutoModelForCausalLM

WORKER = Path(__file__).parent / "train_fits.py"
WINDOW = 4  # micro-batches of a step, over all processes
NUM_ROWS = 34  # 17 micro-batches of 2: the last window has one, so that every other process is idle
LR = 0.02  # of SGD
SLOW = pytest.mark.slow
CASES = [
    *[pytest.param(name, 2, id=f"{name}-2") for name in ("ddp", "zero2")],
    # of ZeRO-3 the fast tests have test_towers.py and test_team.py
    *[pytest.param(name, 2, marks=SLOW, id=f"{name}-2") for name in ("zero1", "zero3")],
    *[
        pytest.param(name, 1, marks=SLOW, id=f"{name}-1")
        for name in ("ddp", "zero1", "zero2", "zero3", "zero3_offload")
    ],
    pytest.param("zero3_offload", 2, marks=SLOW, id="zero3_offload-2"),
    *[pytest.param(name, 4, marks=SLOW, id=f"{name}-4") for name in ("ddp", "zero2", "zero3")],
]
Found = dict[str, dict[str, Any]]


def fits(world: int, shared: Path) -> dict[str, dict[str, Any]]:
    """What each launch trains; windows hold the same micro-batches however many processes share
    them.
    """
    accumulate = WINDOW // world
    cuts = {  # of a window of eight rows
        f"cut_{size * world}x{8 // size // world}": {
            "batch_size": size,
            "accumulate": 8 // size // world,
            "shuffle": False,
        }
        for size in (1, 2, 4, 8)
        if size * world <= 8
    }
    first = {"optimizer": "sgd", "steps": 1}
    return {
        **{name: {**first, **options} for name, options in cuts.items()},
        "lonely": {
            "optimizer": "sgd",
            "steps": 4,
            "batch_size": 1,
            "accumulate": accumulate,
            "rows": str(shared / "lonely.jsonl"),
        },
        "sgd": {"optimizer": "sgd", "steps": 20, "accumulate": accumulate},
        "adamw": {
            "optimizer": "adamw",
            "steps": 20,
            "accumulate": accumulate,
            "clip_norm": 0.5,
            "save_every": 10,
            "eval_every": 8,
        },
        "short": {"optimizer": "adamw", "steps": 5, "epochs": 1, "accumulate": accumulate},
        "bad": {
            "optimizer": "adamw",
            "steps": 4,
            "accumulate": accumulate,
            "not_finite": [world - 1, accumulate + 1],
        },
        "bf16": {
            "optimizer": "sgd",
            "steps": 4,
            "accumulate": accumulate,
            "eval_every": 2,
            "precision": "bf16-mixed",
        },
    }


def launch(
    folder: Path,
    shared: Path,
    strategy: str,
    world: int,
    wanted: dict[str, dict[str, Any]],
    parts: int = 1,
    **more: Any,
) -> Found:
    """Run ``wanted`` in ``world`` processes that find no compiler, and return what they left."""
    folder.mkdir(parents=True)
    plan = {
        "strategy": strategy,
        "parts": parts,
        "model": str(shared / "model"),
        "rows": str(shared / "rows.jsonl"),
        "fits": wanted,
        **more,
    }
    (folder / "plan.json").write_text(json.dumps(plan))
    empty = folder / "bin"
    empty.mkdir()
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PATH": str(empty),
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    program = [str(WORKER), str(folder / "plan.json")]
    if world > 1:
        done = preloaded.run_ranks(program, world, env=environment, timeout=240)
    else:
        done = preloaded.run(program, env=environment, timeout=240)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    return {name: torch.load(folder / f"{name}.pt", weights_only=True) for name in wanted}


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model on disk, and rows of very different weight."""
    folder, generator = tmp_path_factory.mktemp("shared"), random.Random(0)
    make_model("qwen3_moe").save_pretrained(folder / "model")
    with (folder / "rows.jsonl").open("w") as file:
        for number in range(NUM_ROWS):
            tokens = [generator.randrange(3, 64) for _ in range(4 + number % 17)]
            weights = [0.0, *(generator.choice([0.0, 0.5, 1.0]) for _ in tokens[2:]), 1.0]
            file.write(json.dumps({"tokens": tokens, "weights": weights}) + "\n")
    # rows of one token, over and over: all positions ask the same experts
    with (folder / "lonely.jsonl").open("w") as file:
        for token in range(3, 35):
            file.write(json.dumps({"tokens": [token] * 6, "weights": [0.0, *[1.0] * 5]}) + "\n")
    return folder


@pytest.fixture(scope="module")
def single(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Found, Path]:
    """What one process finds, and the folder of its checkpoints."""
    folder = tmp_path_factory.mktemp("single") / "run"
    found = launch(folder, shared, "single", 1, fits(1, shared))
    return found, folder / "checkpoints" / "adamw"


@pytest.fixture(scope="module")
@torch.no_grad()
def base_loss(shared: Path) -> float:
    """The loss of the first eight rows under the base itself, by plain transformers in float64."""
    model = AutoModelForCausalLM.from_pretrained(
        shared / "model", dtype=torch.float64, experts_implementation="eager"
    ).eval()
    loss = weight = 0.0
    for line in (shared / "rows.jsonl").read_text().splitlines()[:8]:
        row = json.loads(line)
        tokens = torch.tensor([row["tokens"]])
        logprobs = (
            model(input_ids=tokens[:, :-1])
            .logits.log_softmax(-1)
            .gather(2, tokens[:, 1:, None])[0, :, 0]
        )
        loss -= float((logprobs * torch.tensor(row["weights"][1:], dtype=torch.float64)).sum())
        weight += sum(row["weights"][1:])
    return loss / weight


def test_in_lonely_rows_some_experts_have_nothing_to_do(shared: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(shared / "model").eval()
    for line in (shared / "lonely.jsonl").read_text().splitlines():
        tokens = torch.tensor([json.loads(line)["tokens"]])
        for logits in model(input_ids=tokens, output_router_logits=True).router_logits:
            used = set(logits.topk(model.config.num_experts_per_tok).indices.flatten().tolist())
            assert len(used) < model.config.num_experts


def assert_sends_the_adapter_only(strategy: str, found: dict[str, Any]) -> None:
    """Bytes that one of two processes writes to the network in a step, which the system counts."""
    adapter = sum(tensor.numel() for tensor in found["end"].values()) * 4
    sent = [found["written"][step + 1] - found["written"][step] for step in range(2, 20)]
    assert len(set(sent)) == 1
    # Gradients are summed once in a step (ZeRO-2: once for each of two micro-batches), parameters
    # of the other half fetched.
    expected = {"ddp": adapter, "zero1": 1.5 * adapter, "zero2": 2.5 * adapter}
    if strategy in expected:
        # loss, norm, counts and figures
        assert expected[strategy] <= sent[0] <= expected[strategy] + 4096
    else:
        assert sent[0] > 5 * adapter  # the base, layer by layer


def only_b(adapter: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in adapter.items() if "lora_B" in name}


def largest_difference(
    ours: dict[int, dict[str, float]], theirs: dict[int, dict[str, float]]
) -> float:
    """Of loss, norm and evaluation loss, relative."""
    assert ours.keys() == theirs.keys()
    names = ("train/loss", "train/grad_norm", "val/loss")
    assert all((name in ours[step]) == (name in theirs[step]) for step in ours for name in names)
    pairs = [
        (ours[step][name], theirs[step][name])
        for step in ours
        for name in names
        if name in ours[step]
    ]
    return max(abs(our - their) / abs(their) for our, their in pairs)


@pytest.mark.parametrize(("strategy", "world"), CASES)
def test_a_strategy_computes_what_one_process_does(
    strategy: str,
    world: int,
    shared: Path,
    single: tuple[Found, Path],
    base_loss: float,
    tmp_path: Path,
) -> None:
    expected, checkpoints = single
    half = tmp_path / "half"  # what one process has left after 10 steps
    shutil.copytree(checkpoints / "step-000010", half / "step-000010")
    wanted = fits(world, shared)
    wanted["resumed"] = {**wanted["adamw"], "resume": str(half)}
    found = launch(tmp_path / "run", shared, strategy, world, wanted)

    assert all(not tensor.any() for tensor in only_b(found["sgd"]["start"]).values())
    assert all(
        torch.equal(tensor, expected["sgd"]["start"][name])
        for name, tensor in found["sgd"]["start"].items()
    )
    # SGD's first step is the gradient of B times the learning rate, exactly: B was zero.
    assert relative_l2(only_b(found["sgd"]["first"]), only_b(expected["sgd"]["first"])) < 1e-6
    assert relative_l2(found["sgd"]["end"], expected["sgd"]["end"]) < 1e-7
    assert relative_l2(found["adamw"]["end"], expected["adamw"]["end"]) < 1e-5
    assert relative_l2(found["short"]["end"], expected["short"]["end"]) < 1e-5
    for name in ("sgd", "adamw", "short", "lonely"):
        assert largest_difference(found[name]["steps"], expected[name]["steps"]) < 1e-5
        assert found[name]["samples"] == expected[name]["samples"]
    assert relative_l2(found["lonely"]["end"], expected["lonely"]["end"]) < 1e-6
    for name in (name for name in found if name.startswith("cut_")):
        assert abs(found[name]["steps"][1]["train/loss"] - base_loss) < 1e-5 * base_loss
        assert (
            relative_l2(only_b(found[name]["first"]), only_b(expected["cut_8x1"]["first"])) < 1e-6
        )
    # the base is held, and the products are made, in 16 bit
    for run in (found["bf16"], expected["bf16"]):
        assert run["frozen_in"] == run["computed_in"] == ["torch.bfloat16"]
        assert all(tensor.dtype == torch.float32 for tensor in run["end"].values())
    # Under ZeRO-3 DeepSpeed's own linear function rounds gradients elsewhere, which tells from the
    # second step on.
    first = [{1: found_in["bf16"]["steps"][1]} for found_in in (found, expected)]
    assert largest_difference(*first) < 1e-5
    most = 2e-2 if strategy.startswith("zero3") else 1e-5
    assert largest_difference(found["bf16"]["steps"], expected["bf16"]["steps"]) < most
    if world == 2:
        assert_sends_the_adapter_only(strategy, found["sgd"])
    # A window that is not finite in one process is skipped in all.
    assert found["bad"]["num_bad_steps"] == expected["bad"]["num_bad_steps"] == 1
    assert relative_l2(found["bad"]["end"], expected["bad"]["end"]) < 1e-5
    rest = {step: figures for step, figures in expected["adamw"]["steps"].items() if step > 10}
    assert found["resumed"]["steps"].keys() == rest.keys()
    assert (
        max(
            abs(found["resumed"]["steps"][step]["train/loss"] - rest[step]["train/loss"])
            for step in rest
        )
        < 1e-5
    )
    assert relative_l2(found["resumed"]["end"], expected["adamw"]["end"]) < 1e-5


@pytest.mark.parametrize(
    ("strategy", "world"), [("zero2", 2), pytest.param("zero3", 2, marks=SLOW)]
)
def test_one_process_goes_on_from_what_several_have_left(
    strategy: str, world: int, shared: Path, single: tuple[Found, Path], tmp_path: Path
) -> None:
    wanted = {"adamw": {**fits(world, shared)["adamw"], "stop_at": 10}}
    launch(tmp_path / "several", shared, strategy, world, wanted)
    checkpoints = tmp_path / "several" / "checkpoints" / "adamw"
    # adapter, two moments
    assert sum(path.stat().st_size for path in (checkpoints / "step-000010").iterdir()) < 300_000
    resumed = {"resumed": {**fits(1, shared)["adamw"], "resume": str(checkpoints)}}
    found = launch(tmp_path / "one", shared, "single", 1, resumed)["resumed"]
    assert relative_l2(found["end"], single[0]["adamw"]["end"]) < 1e-5


SHARED_ROWS = [
    # the fast tests have test_two_processes.py, which shares rows through the command line
    pytest.param("zero2", 2, 2, id="zero2-2-of-2", marks=SLOW),
    *[
        pytest.param(name, 2, 2, id=f"{name}-2-of-2", marks=SLOW)
        for name in ("ddp", "zero1", "zero3", "zero3_offload")
    ],
    *[
        pytest.param(name, 4, parts, id=f"{name}-{parts}-of-4", marks=SLOW)
        for name in ("ddp", "zero3")
        for parts in (2, 4)
    ],
]


@pytest.mark.parametrize(("strategy", "world", "parts"), SHARED_ROWS)
def test_processes_that_share_rows_compute_what_one_does(
    strategy: str, world: int, parts: int, shared: Path, single: tuple[Found, Path], tmp_path: Path
) -> None:
    """Losses, norms, evaluation, adapters and samples; rows of all lengths, packed rows, layers
    that are computed twice.
    """
    streams = world // parts
    chosen = {
        name: options
        for name, options in fits(streams, shared).items()
        if name in ("sgd", "adamw", "short")
    }
    chosen["checkpointed"] = {**chosen["sgd"], "steps": 4, "checkpointing": True}
    packed = {"packed": {**chosen["sgd"], "steps": 6, "packing": True}}
    found = launch(tmp_path / "run", shared, strategy, world, {**chosen, **packed}, parts)
    whole = fits(1, shared)["sgd"]
    expected = single[0] | launch(
        tmp_path / "whole",
        shared,
        "single",
        1,
        {
            "packed": {**whole, "steps": 6, "packing": True},
            "checkpointed": {**whole, "steps": 4},
        },
    )
    for name in found:
        assert largest_difference(found[name]["steps"], expected[name]["steps"]) < 1e-5
        assert found[name]["samples"] == expected[name]["samples"]
        assert relative_l2(found[name]["end"], expected[name]["end"]) < (
            1e-5 if name in ("adamw", "short") else 1e-6
        )

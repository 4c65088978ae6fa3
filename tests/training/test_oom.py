"""Where the memory is not enough, a step is computed again from smaller batches: the same
gradient, the same figures.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import preloaded
import pytest
import torch
from tiny_models import (
    Loader,
    make_batches,
    make_datums,
    make_model,
    make_trainer,
    randomise,
    relative_l2,
    sgd,
    trainable,
)

from lorakit.callbacks import memory_probe
from lorakit.callbacks.memory_probe import MemoryProbe
from lorakit.data.batch.collate import collate
from lorakit.data.batch.split import halve_batch, split_batch
from lorakit.errors import TrainingError
from lorakit.lora.inject import inject
from lorakit.lora.spec import LoRASpec
from lorakit.training.module import LoRAModule
from lorakit.types import Batch

SPEC = LoRASpec(rank=4, alpha=8)


class Small(torch.autograd.Function):
    """Passes on what it is given, and has no memory for more than ``limit`` positions, forward
    or backward.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, limit: int, where: str) -> torch.Tensor:
        ctx.limit, ctx.where = limit, where
        if where == "forward" and x[..., 0].numel() > limit:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3.00 GiB.")
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        if ctx.where == "backward" and grad[..., 0].numel() > ctx.limit:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3.00 GiB.")
        return grad, None, None


def train(
    folder: Path,
    batches: list[Batch],
    *,
    limit: int = 1 << 30,
    where: str = "forward",
    **options: Any,
) -> tuple[Any, Any]:
    """Three optimiser steps on a model whose second layer has room for ``limit`` positions;
    returns (module, trainer).
    """
    model = randomise(inject(make_model("qwen3_moe"), SPEC))
    # In front of the second layer's adapters, so that the first ones to get a gradient have theirs
    # when the memory ends.
    layer = model.get_base_model().model.layers[0]
    layer.register_forward_hook(lambda module, args, output: Small.apply(output, limit, where))
    module = LoRAModule(lambda: model, optimizer=sgd(0.1), clip_norm=0.5)
    trainer = make_trainer(folder, **options)
    trainer.fit(
        module, Loader(batches), Loader(batches[:2]) if "limit_val_batches" in options else None
    )
    return module, trainer


@pytest.mark.parametrize("packs", [False, True], ids=["rows", "one packed row"])
@pytest.mark.parametrize("where", ["forward", "backward"])
def test_a_step_without_memory_is_the_same_step(
    where: str, packs: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    datums = make_datums(12)
    batches = make_batches(datums, 4, 3, packs=packs)
    settings = {"accumulate_grad_batches": 3}
    module, trainer = train(tmp_path, batches, **settings)
    small, short = train(tmp_path, batches, limit=30, where=where, **settings)
    assert (
        module.retry.splitter.max_positions is None
        and small.retry.splitter.max_positions is not None
        and small.retry.splitter.max_positions <= 60
    )
    assert any("now at most" in record.message for record in caplog.records)
    assert trainer.global_step == short.global_step == 1 and small.num_bad_steps == 0
    assert relative_l2(trainable(small.model), trainable(module.model)) < 1e-6
    for name in ("train/loss", "train/grad_norm"):
        assert float(short.callback_metrics[name]) == pytest.approx(
            float(trainer.callback_metrics[name]), rel=1e-5
        )


def test_evaluation_makes_room_as_well(tmp_path: Path) -> None:
    batches = make_batches(make_datums(8), 4, 1)
    settings = {"limit_val_batches": 2, "val_check_interval": 1}
    _, trainer = train(tmp_path, batches, **settings)
    _, short = train(tmp_path, batches, limit=30, **settings)
    assert float(short.callback_metrics["val/loss"]) == pytest.approx(
        float(trainer.callback_metrics["val/loss"]), rel=1e-5
    )


def test_a_single_row_that_is_too_much_is_one_message(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="single row of"):
        train(tmp_path, make_batches(make_datums(4), 4, 1), limit=3)


class Longest(Loader):
    """A data module, as far as the probe asks: its longest batch."""

    def longest_batch(self) -> Batch:
        datums = [max(make_datums(8), key=len)] * 4
        return make_batches(datums, 4, 1)[0]


def test_the_longest_row_is_tried_first_and_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory_probe, "refuses_memory", lambda device: True)
    batches = make_batches(make_datums(12), 4, 3)
    plain, _ = train(tmp_path, batches, accumulate_grad_batches=3)
    tried: list[int | None] = []

    class Watched(MemoryProbe):
        def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
            pl_module.model.eval()  # as it is loaded
            state, before = torch.random.get_rng_state(), trainer.datamodule
            trainer.datamodule = Longest([])
            super().on_fit_start(trainer, pl_module)
            trainer.datamodule = before
            assert torch.equal(state, torch.random.get_rng_state())
            assert all(parameter.grad is None for parameter in pl_module.parameters())
            tried.append(pl_module.retry.splitter.max_positions)
            assert pl_module.model.training  # else no activation would have been computed twice

    probed, _ = train(tmp_path, batches, limit=50, accumulate_grad_batches=3, callbacks=[Watched()])
    assert tried == [38] and probed.retry.splitter.max_positions == 38  # of four times 19
    assert relative_l2(trainable(probed.model), trainable(plain.model)) < 1e-6


def test_another_error_is_not_hidden(tmp_path: Path) -> None:
    model = inject(make_model("qwen3_moe"), SPEC)

    def broken(*args: Any) -> None:
        raise RuntimeError("something else")

    model.get_base_model().model.layers[0].register_forward_hook(broken)
    module = LoRAModule(lambda: model, optimizer=sgd(0.1))
    with pytest.raises(RuntimeError, match="something else"):
        make_trainer(tmp_path).fit(module, Loader(make_batches(make_datums(4), 4, 1)))


@pytest.mark.parametrize("packs", [False, True])
def test_pairs_stay_together(packs: bool) -> None:
    datums = make_datums(12)
    batch = collate([datums] if packs else [[datum] for datum in datums], 0, are_pairs=True)
    parts = split_batch(batch, 1)
    assert [part.num_pairs for part in parts] == [1] * 6 and all(
        len(part.spans) == 2 for part in parts
    )
    for number, part in enumerate(parts):
        for (row, start, end), datum in zip(
            part.spans, datums[2 * number : 2 * number + 2], strict=True
        ):
            assert part.input_ids[row, start:end].tolist() == datum.model_input.to_ints()
            assert part.weights[row, start:end].tolist() == datum.weights.tolist()
    assert len(halve_batch(parts[0])) == 1


NO_MEMORY = """
import resource, sys
sys.path[:0] = [{tests!r}]
import lorakit, torch, psutil
from tiny_models import *
from lorakit.data.datum import make_datum
from lorakit.lora.inject import inject
from lorakit.lora.spec import LoRASpec
from lorakit.training.module import LoRAModule

def train(rows_each, accumulate):
    model = make_model("qwen3")
    def wide(module, args, output):  # holds 4 MB for each position until the backward pass
        many = output.mean(-1, keepdim=True).expand(*output.shape[:-1], 1 << 20) * 1.0
        return output + many.sin().sum(-1, keepdim=True) * 1e-9
    model.model.layers[0].register_forward_hook(wide)
    module = LoRAModule(lambda: randomise(inject(model, LoRASpec(rank=4))), optimizer=sgd(0.1))
    datums = [make_datum([3 + (i * 7 + j) % 50 for j in range(17)], [1.0] * 17) for i in range(16)]
    trainer = make_trainer({folder!r}, accumulate_grad_batches=accumulate)
    trainer.fit(module, Loader(make_batches(datums, rows_each, accumulate)))
    return module

before = trainable(train(1, 16).model)
resource.setrlimit(resource.RLIMIT_AS, (psutil.Process().memory_info().vms + 1_500_000_000, -1))
module = train(16, 1)
print(module.retry.splitter.max_positions, relative_l2(trainable(module.model), before))
"""


@pytest.mark.slow
def test_memory_that_the_system_refuses_is_made_room_for(tmp_path: Path) -> None:
    """256 positions of 4 MB, three times over, would take 3 GB: the C library is allowed half of
    that.
    """
    program = NO_MEMORY.format(tests=str(Path(__file__).resolve().parents[1]), folder=str(tmp_path))
    done = preloaded.run(["-c", program], cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    positions, distance = done.stdout.split()[-2:]
    assert int(positions) <= 128 and float(distance) < 1e-6


@pytest.mark.parametrize(("strategy", "repeats"), [("auto", True), ("ddp", False)])
def test_only_a_strategy_that_takes_no_gradients_as_they_come_repeats_a_step(
    tmp_path: Path, strategy: str, repeats: bool
) -> None:
    """DDP of one process would see each gradient twice."""
    module = LoRAModule(lambda: None, optimizer=sgd(0.1))
    module.trainer = make_trainer(tmp_path, strategy=strategy)
    assert module.can_repeat is repeats

"""What one optimiser step does, and which steps are skipped: clipping, empty windows, losses
that are not finite.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from tiny_models import (
    Loader,
    adamw,
    make_batches,
    make_datums,
    make_model,
    make_trainer,
    randomise,
    relative_l2,
    sgd,
    trainable,
)

from lorakit.data.batch.collate import collate
from lorakit.errors import CheckpointError, TrainingError
from lorakit.lora.inject import inject
from lorakit.lora.spec import LoRASpec
from lorakit.loss.cross_entropy import cross_entropy
from lorakit.model.load import base_name, load_model
from lorakit.training.module import LoRAModule
from lorakit.types import Batch, LossOutput

BATCHES = make_batches(make_datums(8), 2, 1)
EMPTY = replace(BATCHES[0], weights=torch.zeros_like(BATCHES[0].weights), window_weight=0.0)


class Record(L.Callback):
    """Metrics, adapter and optimiser state after each step."""

    def __init__(self) -> None:
        self.metrics: list[dict[str, float]] = []
        self.adapters: list[dict[str, torch.Tensor]] = []
        self.states: list[Any] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.metrics.append(
            {name: float(value) for name, value in trainer.callback_metrics.items()}
        )
        self.adapters.append(trainable(pl_module.model))
        self.states.append(copy.deepcopy(trainer.optimizers[0].state_dict()["state"]))


def fit(folder: Path, batches: list[Batch], **options: Any) -> tuple[LoRAModule, Record]:
    model, record = randomise(inject(make_model("llama"), LoRASpec(rank=4))), Record()
    module = LoRAModule(lambda: model, **{"optimizer": adamw(), **options})
    make_trainer(folder, callbacks=[record]).fit(module, Loader(batches))
    return module, record


def nan_in(*steps: int) -> Any:
    """A loss that is NaN in these calls."""
    calls = iter(range(1000))

    def loss(logprobs: torch.Tensor, batch: Batch) -> LossOutput:
        output = cross_entropy(logprobs, batch)
        return (
            replace(output, loss_sum=output.loss_sum * float("nan"))
            if next(calls) in steps
            else output
        )

    return loss


def same(ours: Any, theirs: Any) -> bool:
    return all(
        torch.equal(ours[key][name], theirs[key][name]) for key in theirs for name in theirs[key]
    )


@pytest.mark.parametrize("family", ["qwen3_moe", "qwen3"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_frozen_base_keeps_its_bytes(family: str, dtype: str, tmp_path: Path) -> None:
    model = inject(make_model(family, dtype), LoRASpec(rank=4, unembedding=True))
    frozen = {name: p for name, p in model.named_parameters() if not p.requires_grad}
    before, adapter = {name: p.clone() for name, p in frozen.items()}, trainable(model)
    module = LoRAModule(lambda: model, optimizer=adamw())
    make_trainer(tmp_path).fit(module, Loader(BATCHES))
    assert all(
        torch.equal(frozen[name].view(torch.uint8), before[name].view(torch.uint8))
        for name in frozen
    )
    assert relative_l2(trainable(model), adapter) > 0.01


def test_a_step_with_a_nan_loss_changes_neither_adapter_nor_optimiser_and_is_counted(
    tmp_path: Path,
) -> None:
    module, record = fit(tmp_path, BATCHES, loss=nan_in(1, 3))
    assert module.num_bad_steps == 2
    assert record.metrics[-1]["train/bad_steps"] == 2
    for bad in (1, 3):
        assert all(
            torch.equal(record.adapters[bad][name], record.adapters[bad - 1][name])
            for name in record.adapters[0]
        )
        assert same(record.states[bad], record.states[bad - 1])
    assert relative_l2(record.adapters[2], record.adapters[1]) > 1e-4


def test_an_infinite_gradient_of_a_finite_loss_is_skipped_too(tmp_path: Path) -> None:
    # the root of zero has an infinite slope
    def loss(logprobs: torch.Tensor, batch: Batch) -> LossOutput:
        return LossOutput(
            cross_entropy(logprobs, batch).loss_sum
            + (logprobs - logprobs.detach()).abs().sum().sqrt(),
            logprobs,
        )

    module, record = fit(tmp_path, BATCHES[:2], loss=loss)
    assert module.num_bad_steps == 2
    assert torch.isfinite(torch.tensor(record.metrics[-1]["train/loss"]))
    assert all(torch.isfinite(tensor).all() for tensor in record.adapters[-1].values())


def test_bad_steps_in_a_row_end_the_run_with_the_batches_saved(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"3 steps in a row.*bad_batches\.pt"):
        fit(tmp_path, BATCHES, loss=nan_in(1, 2, 3), max_bad_steps=3)
    saved = torch.load(tmp_path / "bad_batches.pt", weights_only=True)
    assert torch.equal(saved[0]["input_ids"], BATCHES[3].input_ids)
    assert torch.equal(saved[0]["weights"], BATCHES[3].weights)


def test_a_good_step_starts_the_count_anew(tmp_path: Path) -> None:
    module, _ = fit(tmp_path, BATCHES * 2, loss=nan_in(0, 1, 3, 4, 6), max_bad_steps=3)
    assert (module.num_bad_steps, module.num_bad_in_a_row) == (5, 0)


def test_one_bad_micro_batch_spoils_its_window_only(tmp_path: Path) -> None:
    model, record = randomise(inject(make_model("llama"), LoRASpec(rank=4))), Record()
    module = LoRAModule(lambda: model, optimizer=adamw(), loss=nan_in(2))
    make_trainer(tmp_path, callbacks=[record], accumulate_grad_batches=2).fit(
        module, Loader(make_batches(make_datums(8), 1, 2))
    )
    assert module.num_bad_steps == 1
    assert all(
        torch.equal(record.adapters[3][name], record.adapters[1][name])
        for name in record.adapters[0]
    )
    assert relative_l2(record.adapters[5], record.adapters[3]) > 1e-4


def test_a_window_of_zero_weight_is_skipped_and_counted(tmp_path: Path) -> None:
    module, record = fit(tmp_path, [BATCHES[0], EMPTY, BATCHES[1]])
    assert (module.num_empty_windows, module.num_bad_steps) == (1, 0)
    assert record.metrics[-1]["train/empty_windows"] == 1
    assert all(
        torch.equal(record.adapters[1][name], record.adapters[0][name])
        for name in record.adapters[0]
    )
    assert same(record.states[1], record.states[0])
    assert relative_l2(record.adapters[2], record.adapters[1]) > 1e-4


@pytest.mark.parametrize("clip_norm", [0.0, 0.01, 1e6])
def test_the_norm_is_logged_before_clipping_and_the_step_is_clipped(
    clip_norm: float, tmp_path: Path
) -> None:
    before = trainable(randomise(inject(make_model("llama"), LoRASpec(rank=4))))
    lr = 2.0**14
    _, record = fit(tmp_path, BATCHES[:1], optimizer=sgd(lr), clip_norm=clip_norm)
    stepped = {name: (before[name] - after) / lr for name, after in record.adapters[0].items()}
    step_norm = float(torch.cat([tensor.flatten() for tensor in stepped.values()]).norm())
    _, unclipped = fit(tmp_path, BATCHES[:1], optimizer=sgd(lr), clip_norm=0.0)
    norm = unclipped.metrics[0]["train/grad_norm"]
    assert norm > 0.05
    assert record.metrics[0]["train/grad_norm"] == norm
    assert step_norm == pytest.approx(min(norm, clip_norm or norm), rel=1e-3)


def test_the_logged_loss_is_the_whole_windows(tmp_path: Path) -> None:
    _, whole = fit(tmp_path, make_batches(make_datums(8), 8, 1))
    model, record = randomise(inject(make_model("llama"), LoRASpec(rank=4))), Record()
    module = LoRAModule(lambda: model, optimizer=adamw())
    make_trainer(tmp_path, callbacks=[record], accumulate_grad_batches=8).fit(
        module, Loader(make_batches(make_datums(8), 1, 8))
    )
    assert record.metrics[-1]["train/loss"] == pytest.approx(
        whole.metrics[0]["train/loss"], rel=1e-6
    )
    assert record.metrics[-1]["train/lr"] == pytest.approx(1e-2)


def test_under_bf16_mixed_adapter_gradient_and_optimiser_stay_float32(tmp_path: Path) -> None:
    dtypes: set[torch.dtype] = set()
    model, record = inject(make_model("qwen3_moe", "bfloat16"), LoRASpec(rank=4)), Record()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(lambda p: dtypes.add(p.grad.dtype))
    module = LoRAModule(lambda: model, optimizer=adamw())
    make_trainer(tmp_path, callbacks=[record], precision="bf16-mixed").fit(module, Loader(BATCHES))
    assert dtypes == {torch.float32}
    assert {tensor.dtype for tensor in record.adapters[-1].values()} == {torch.float32}
    assert {
        state[name].dtype
        for state in record.states[-1].values()
        for name in ("exp_avg", "exp_avg_sq")
    } == {torch.float32}
    assert {p.dtype for name, p in model.named_parameters() if "lora_" not in name} == {
        torch.bfloat16
    }


def test_the_saved_batches_of_packed_rows_hold_their_positions(tmp_path: Path) -> None:
    short, long, other = make_datums(3)
    batch = collate([[short, long], [other]], pad_token_id=0)
    with pytest.raises(TrainingError):
        fit(tmp_path, [replace(batch, window_weight=batch.weight)], loss=nan_in(0), max_bad_steps=1)
    (saved,) = torch.load(tmp_path / "bad_batches.pt", weights_only=True)
    assert torch.equal(saved["position_ids"], batch.position_ids)
    assert saved["position_ids"][0, len(short)] == 0  # the second document counts anew
    assert saved.keys() == {"input_ids", "targets", "weights", "position_ids"}


def test_a_window_without_its_weight_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="window_weight is 0, but the batch has weights"):
        fit(tmp_path, [replace(BATCHES[0], window_weight=0.0)])


def test_a_state_of_other_shapes_or_names_is_refused_and_changes_nothing() -> None:
    module = LoRAModule(
        lambda: randomise(inject(make_model("llama"), LoRASpec(rank=4))), optimizer=adamw()
    )
    module.configure_model()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    first, *_, last = before
    # both would be broadcast by copy_
    for name, tensor in ((last, before[last][:1]), (first, before[first][:, :1])):
        other = {**{name: torch.ones_like(tensor) for name, tensor in before.items()}, name: tensor}
        with pytest.raises(CheckpointError, match=f"other shapes.*{name}"):
            module.load_state_dict(other)
    with pytest.raises(CheckpointError, match=f"does not fit.*{last}"):
        module.load_state_dict({name: tensor for name, tensor in before.items() if name != last})
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())


def test_a_spec_of_the_base_trains_as_a_function_that_builds_the_model_does(tmp_path: Path) -> None:
    """The library's short form: a name, and what gets an adapter."""
    batches = make_batches(make_datums(8), 4, 1)
    spec = LoRASpec(rank=4, experts=False, seed=3)

    def build() -> Any:
        return inject(load_model("tiny"), spec, base_name=base_name("tiny"))

    def train(name: str, model: Any, **options: Any) -> Any:
        module = LoRAModule(model, optimizer=adamw(), **options)
        make_trainer(tmp_path / name).fit(module, Loader(batches))
        return module

    by_name, built = train("name", "tiny", lora=spec), train("built", build)
    assert by_name.tokenizer.eos_token_id is not None and built.tokenizer is None
    ours, theirs = trainable(by_name.model), trainable(built.model)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)

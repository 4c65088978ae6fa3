"""DPO in Lightning, on rows of chosen and rejected: as TRL trains it, and whatever way a window
is cut.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import make_trainer, relative_l2, sgd, trainable

from lorakit.data.datamodule import LoRADataModule
from lorakit.data.read.rows import are_chats
from lorakit.errors import ConfigError, DataError
from lorakit.lora.inject import inject
from lorakit.lora.spec import LoRASpec
from lorakit.loss.preference import dpo_pairs
from lorakit.model.load import load_model, load_tokenizer
from lorakit.training.module import LoRAModule

SPEC = LoRASpec(rank=4, alpha=8, experts=False)
NUM_STEPS, PAIRS_EACH = 20, 4
ROWS = [
    {
        "prompt": f"Input: {word} {number}\nAnswer:",
        "chosen": f" {word}{' yes' * (number % 4)}.",
        "rejected": f" {number}{' no' * (number % 3)}!",
    }
    for number, word in zip(
        range(NUM_STEPS * PAIRS_EACH), ["ab", "cde", "f", "ghij", "k lm"] * 16, strict=True
    )
]


def make_data(folder: Path, rows: list[dict[str, Any]] = ROWS, **options: Any) -> LoRADataModule:
    import json

    path = folder / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    data = LoRADataModule(path=str(path), shuffle=False, **{"batch_size": PAIRS_EACH} | options)
    data.set_tokenizer(load_tokenizer("tiny"))
    data.check_tokens()
    return data


def make_model(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return inject(load_model("tiny", dtype="float32"), SPEC)


def fit(
    folder: Path,
    data: LoRADataModule,
    optimizer: Any,
    *,
    accumulate: int = 1,
    loss: Any = dpo_pairs,
) -> tuple[Any, list[dict[str, float]]]:
    import lightning as L

    class Watch(L.Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            if not trainer.fit_loop._should_accumulate():
                steps.append(
                    {name: float(value) for name, value in trainer.callback_metrics.items()}
                )

    steps: list[dict[str, float]] = []
    model = make_model()
    module = LoRAModule(lambda: model, optimizer=optimizer, clip_norm=0.0, loss=loss)
    trainer = make_trainer(folder, accumulate_grad_batches=accumulate, callbacks=[Watch()])
    trainer.fit(module, datamodule=data)
    return model, steps


def test_twenty_steps_are_those_of_trl(tmp_path: Path) -> None:
    import datasets
    import trl
    from torch.utils.data import SequentialSampler
    from transformers import TrainerCallback

    class InOrder(trl.DPOTrainer):
        def _get_train_sampler(self, *_: Any) -> Any:
            return SequentialSampler(self.train_dataset)

    class Watch(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            if "loss" in logs:
                theirs.append(logs)

    theirs: list[dict[str, float]] = []
    settings = trl.DPOConfig(
        output_dir=str(tmp_path / "trl"),
        per_device_train_batch_size=PAIRS_EACH,
        max_steps=NUM_STEPS,
        learning_rate=2e-3,
        lr_scheduler_type="constant",
        beta=0.1,
        max_length=None,
        optim="adamw_torch",
        weight_decay=0.0,
        max_grad_norm=0.0,
        report_to="none",
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        logging_steps=1,
        save_strategy="no",
        # which it adds to the loss of a mixture of experts
        disable_tqdm=True,
        router_aux_loss_coef=0.0,
    )
    reference = make_model()
    trainer = InOrder(
        model=reference,
        args=settings,
        train_dataset=datasets.Dataset.from_list(ROWS),
        processing_class=load_tokenizer("tiny"),
        callbacks=[Watch()],
    )
    trainer.train()
    adamw = functools.partial(
        torch.optim.AdamW, lr=2e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0
    )
    model, ours = fit(tmp_path, make_data(tmp_path), adamw)
    assert len(ours) == len(theirs) == NUM_STEPS
    assert (
        ours[0]["train/loss"] == pytest.approx(0.6931472, abs=1e-6) and ours[-1]["train/loss"] < 0.3
    )
    for mine, other in zip(ours, theirs, strict=True):
        assert mine["train/loss"] == pytest.approx(other["loss"], abs=1e-5)
        for name in ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies"):
            assert mine[f"train/{name}"] == pytest.approx(other[name], abs=2e-5), name
    after = {
        name: tensor for name, tensor in reference.named_parameters() if name in trainable(model)
    }
    assert after.keys() == trainable(model).keys()
    assert (
        max(float((trainable(model)[name] - tensor).abs().max()) for name, tensor in after.items())
        < 1e-5
    )


LR = 2.0**10


@functools.cache
def whole_gradient() -> dict[str, torch.Tensor]:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        return gradient(Path(folder), batch_size=8)


def gradient(folder: Path, *, accumulate: int = 1, **options: Any) -> dict[str, torch.Tensor]:
    data = make_data(folder, ROWS[3:11], **options)
    before = {name: tensor.clone() for name, tensor in trainable(make_model()).items()}
    model, steps = fit(folder, data, sgd(LR), accumulate=accumulate)
    assert len(steps) == 1
    return {name: (before[name] - after) / LR for name, after in trainable(model).items()}


@pytest.mark.parametrize(
    ("accumulate", "options"),
    [
        (2, {"batch_size": 4}),
        (8, {"batch_size": 1}),
        (3, {"batch_size": 3}),
        (1, {"packing": True, "max_tokens": 256, "batch_size": 8}),
        (4, {"packing": True, "max_tokens": 128, "batch_size": 1}),
        (8, {"batch_size": None, "tokens_per_batch": 128, "max_tokens": 64}),
    ],
    ids=str,
)
def test_the_gradient_does_not_depend_on_how_pairs_are_spread(
    tmp_path: Path, accumulate: int, options: Any
) -> None:
    assert (
        relative_l2(gradient(tmp_path, accumulate=accumulate, **options), whole_gradient()) < 2e-6
    )


def test_rows_have_room_for_both_answers_and_no_more(tmp_path: Path) -> None:
    data = make_data(tmp_path, ROWS[:12], packing=True, max_tokens=64, batch_size=1)
    batches = list(data.train_dataloader())
    assert data.row_tokens == 128 and max(batch.input_ids.shape[1] for batch in batches) <= 128
    assert any(batch.num_pairs > 1 for batch in batches)  # something is packed with something
    for options in (
        {"packing": True, "pack_tokens": 90},
        {"batch_size": None, "tokens_per_batch": 90},
    ):
        with pytest.raises(
            ConfigError, match=r"=90 is less than a pair of data\.max_tokens=48 each"
        ):
            make_data(tmp_path, ROWS[:12], max_tokens=48, **options).check_rows()
    data = make_data(tmp_path, ROWS[:12], max_tokens=48, batch_size=None, tokens_per_batch=200)
    assert max(batch.input_ids.numel() for batch in data.train_dataloader()) <= 200


def test_pairs_stay_together_and_are_counted(tmp_path: Path) -> None:
    data = make_data(tmp_path, ROWS[:10], batch_size=3)
    batches = list(data.train_dataloader())
    assert [batch.num_pairs for batch in batches] == [3, 3, 3, 1] and [
        batch.window_weight for batch in batches
    ] == [3, 3, 3, 1]
    assert data.estimate_num_batches() == 4
    for batch in batches:
        assert len(batch.spans) == 2 * batch.num_pairs == len(batch.input_ids)
    tokenizer, batch = load_tokenizer("tiny"), batches[0]
    said = [tokenizer.decode(batch.targets[i][batch.weights[i] > 0]) for i in range(4)]
    assert said == [" ab.<|im_end|>", " 0!<|im_end|>", " cde yes.<|im_end|>", " 1 no!<|im_end|>"]


def test_conversations_and_rows_without_a_prompt_are_pairs_too(tmp_path: Path) -> None:
    ask, good, bad = (
        {"role": role, "content": text}
        for role, text in (("user", "q?"), ("assistant", "good"), ("assistant", "bad"))
    )
    rows = [
        {"prompt": [ask], "chosen": [good], "rejected": [bad]},
        {"chosen": [ask, good], "rejected": [ask, bad]},
        {"chosen": "Human: hi\n\nAssistant: good one", "rejected": "Human: hi\n\nAssistant: bad"},
    ]
    data = make_data(tmp_path, rows)
    tokenizer = load_tokenizer("tiny")
    trained = [
        tokenizer.decode(
            [t for t, weight in zip(example.tokens, example.weights, strict=True) if weight]
        )
        for index in range(3)
        for example in data.train_examples.rendered(index)
    ]
    assert data.source.formats == ["preference, as messages"] and are_chats(data.source.formats)
    assert trained == ["good<|im_end|>", "bad<|im_end|>"] * 2 + [
        " good one<|im_end|>",
        " bad<|im_end|>",
    ]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "are the same"),
        ({"prompt": "a", "chosen": "", "rejected": "b"}, "`chosen` is empty"),
        (
            {"prompt": "a", "chosen": [{"role": "assistant", "content": "b"}], "rejected": "c"},
            "all be texts, or all lists",
        ),
        (
            {
                "chosen": [{"role": "user", "content": "b"}],
                "rejected": [{"role": "user", "content": "c"}],
            },
            "no message of the assistant",
        ),
        (
            {"prompt": "a", "chosen": "b", "rejected": "c", "tools": [{"name": "f"}]},
            "`tools` belong to conversations",
        ),
        ({"prompt": "a", "chosen": "b"}, "missing required field `rejected`"),
    ],
)
def test_a_row_that_is_no_pair_is_an_error_with_its_line(
    tmp_path: Path, row: dict[str, Any], words: str
) -> None:
    with pytest.raises(DataError, match=words) as caught:
        make_data(tmp_path, [ROWS[0], row])
    assert "pairs.jsonl:2" in str(caught.value)


def test_pairs_and_other_rows_do_not_mix_and_the_loss_must_fit(tmp_path: Path) -> None:
    (tmp_path / "mixed").mkdir()
    (tmp_path / "mixed/a.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n')
    (tmp_path / "mixed/b.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    with pytest.raises(
        ConfigError, match="preference and of prompt_completion cannot be trained together"
    ):
        LoRADataModule(path=str(tmp_path / "mixed")).check_rows()
    with pytest.raises(ConfigError, match="set loss=dpo"):
        fit(tmp_path, make_data(tmp_path), sgd(1.0), loss="cross_entropy")
    with pytest.raises(ConfigError, match="label_smoothing"):
        fit(
            tmp_path,
            make_data(tmp_path),
            sgd(1.0),
            loss=functools.partial(dpo_pairs, label_smoothing=0.7),
        )


def test_label_smoothing_is_its_formula(tmp_path: Path) -> None:
    from lorakit.training.step import compute_loss

    batch = next(iter(make_data(tmp_path).train_dataloader()))
    model = make_model()
    with torch.no_grad():
        for parameter in (p for name, p in model.named_parameters() if "lora_B" in name):
            parameter.normal_(0, 0.05, generator=torch.Generator().manual_seed(0))
    plain = compute_loss(model, batch, functools.partial(dpo_pairs, beta=0.5))
    margins = plain.metrics["rewards/margins"]
    smooth = compute_loss(model, batch, functools.partial(dpo_pairs, beta=0.5, label_smoothing=0.2))
    # -log sigmoid(-m) = -log sigmoid(m) + m, so smoothing adds the share of the margins' sum.
    assert float(smooth.loss_sum) == pytest.approx(
        float(plain.loss_sum) + 0.2 * float(margins), rel=1e-5
    )

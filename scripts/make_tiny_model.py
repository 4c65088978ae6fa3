"""Build a tiny base model that ships with lorakit: ``python scripts/make_tiny_model.py [text|vl]
[--out FOLDER] [--steps N]``.

``text`` is a Qwen3-MoE of about 2.2 million parameters with a byte-level tokenizer, pretrained from
a fixed seed on the tasks of ``string_tasks.py`` (never pig latin). ``vl`` is a Qwen3-VL-MoE of
about 3 million (``tiny_vl.py``), pretrained on the pictures of ``scenes.py`` (never digits or
letters): its tower alone first, then with the layers of ``text`` joined to it. Saved in bf16. Ten
minutes and half an hour on two cores.

The ``vl`` in the package was made while its lessons were written, by four runs of 32 rows a step:
3,000 steps from nothing, then 1,800, 900 and 900 more with ``--start``. A run from nothing makes
another one, with today's lessons: after ``--steps 4000 --rows 32`` it answered 89.8 % of 1,000
held-out questions (the package's: 95.7 %), and 0.8 % with the picture blanked; colours and shapes
want more steps.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tiny_vl
import torch
from string_tasks import TASKS, Question, Task, draw_question, load_words
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    PreTrainedTokenizerFast,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    Qwen3VLMoeForConditionalGeneration,
)

HERE = Path(__file__).resolve().parent
OUT = HERE.parent / "lorakit" / "model" / "tiny"
SPECIAL_NAMES = (
    *(
        "endoftext",
        "im_start",
        "im_end",
        "object_ref_start",
        "object_ref_end",
        "box_start",
        "box_end",
        "quad_start",
    ),
    *("quad_end", "vision_start", "vision_end", "vision_pad", "image_pad", "video_pad"),
)
SPECIAL_TOKENS = [f"<|{name}|>" for name in SPECIAL_NAMES]  # Qwen's, in Qwen's order
PLAIN_TOKENS = [
    "<tool_call>",
    "</tool_call>",
    "<tool_response>",
    "</tool_response>",
    "<think>",
    "</think>",
]
VOCAB_SIZE = 288  # 256 bytes and the tokens above, rounded up to a multiple of 32
LABELS = ("Input", "Text", "Phrase", "Words", "Source", "Given")
# prompts are mostly random words: worth a little, for the shape of what a line looks like
PROMPT_WEIGHT = 0.05
CHAT_TEMPLATE = """\
{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\\n' }}
{%- if message.role == 'assistant' %}
{%- generation %}{{- message.content + '<|im_end|>' }}{%- endgeneration %}
{{- '\\n' }}
{%- else %}
{{- message.content + '<|im_end|>\\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer without merges: one token per byte, and Qwen's chat and vision
    tokens.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS]
    )
    tokenizer.add_tokens(
        [AddedToken(token, special=False, normalized=False) for token in PLAIN_TOKENS]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        model_max_length=1024,
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def make_config(tokenizer: PreTrainedTokenizerFast) -> Qwen3MoeConfig:
    """Hidden width 128, expert width 96: H, I and 2I all differ, so that no loader can mistake
    one layout for another.
    """
    return Qwen3MoeConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=128,
        intermediate_size=256,
        moe_intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        num_experts=12,
        num_experts_per_tok=2,
        decoder_sparse_step=1,
        norm_topk_prob=True,
        router_aux_loss_coef=0.002,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )


def render_row(rng: random.Random, words: list[str]) -> tuple[str, str]:
    """One pretraining example as (prompt, completion): two thirds plain, one third chat."""
    task, question = draw_question(rng, words)
    ask, phrase, answer = task.ask(question), " ".join(question.words), task.answer(question)
    if rng.random() < 2 / 3:
        return f"{rng.choice(LABELS)}: {phrase}\n{ask}:", f" {answer}\n\n"
    return (
        f"<|im_start|>user\n{ask}: {phrase}<|im_end|>\n<|im_start|>assistant\n",
        f"{answer}<|im_end|>",
    )


def make_batches(
    rng: random.Random,
    tokenizer: PreTrainedTokenizerFast,
    words: list[str],
    num_rows: int,
    num_batches: int = 16,
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield (tokens_BT, weights_BT) for ever, padded on the right with weight 0; rows of one
    length go together.
    """
    while True:
        rows = [render_row(rng, words) for _ in range(num_rows * num_batches)]
        prompts = tokenizer([prompt for prompt, _ in rows], add_special_tokens=False)["input_ids"]
        completions = tokenizer([completion for _, completion in rows], add_special_tokens=False)[
            "input_ids"
        ]
        pairs = sorted(
            zip(prompts, completions, strict=True), key=lambda pair: len(pair[0]) + len(pair[1])
        )
        for batch in rng.sample(range(num_batches), num_batches):
            yield _pad(pairs[batch * num_rows : (batch + 1) * num_rows], tokenizer.pad_token_id)


def _pad(
    pairs: list[tuple[list[int], list[int]]], pad_token_id: int
) -> tuple[torch.Tensor, torch.Tensor]:
    length = max(len(prompt) + len(completion) for prompt, completion in pairs)
    tokens = torch.full((len(pairs), length), pad_token_id)
    weights = torch.zeros(len(pairs), length)
    for i, (prompt, completion) in enumerate(pairs):
        end = len(prompt) + len(completion)
        tokens[i, :end] = torch.tensor(prompt + completion)
        weights[i, : len(prompt)] = PROMPT_WEIGHT
        weights[i, len(prompt) : end] = 1.0
    return tokens, weights


def pretrain(
    model: Any,
    batches: Iterator[tuple[dict[str, torch.Tensor], torch.Tensor]],
    num_steps: int,
    lr: float,
    details: tiny_vl.Details | None = None,
) -> None:
    """Train ``model`` in place on ``batches`` of inputs and the weights of their tokens, its
    tower on ``details`` too.
    """
    parameters = [*model.parameters(), *(details.parameters() if details else ())]
    optimizer = torch.optim.AdamW(parameters, lr=0.0, betas=(0.9, 0.95), weight_decay=0.05)
    # a warm-up of fewer than two steps divides by zero in OneCycleLR
    warmup_share = max(0.05, 2 / num_steps)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=lr, total_steps=num_steps, pct_start=warmup_share, final_div_factor=100
    )
    aux_coefficient = model.config.get_text_config().router_aux_loss_coef
    started = time.perf_counter()
    for step in range(num_steps):
        inputs, weights = next(batches)
        tokens = inputs["input_ids"]
        read = {
            name: tensor[:, :-1] if tensor.shape == tokens.shape else tensor
            for name, tensor in inputs.items()
        }
        output = model(**read, output_router_logits=True)
        losses = torch.nn.functional.cross_entropy(
            output.logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none"
        )
        weights = weights[:, 1:].flatten()
        loss = (losses * weights).sum() / weights.sum()
        lost = details(model.model.visual) if details else torch.zeros(())
        (loss + aux_coefficient * output.aux_loss + lost).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 100 == 0 or step == num_steps - 1:
            is_answer = weights.view(len(tokens), -1) > PROMPT_WEIGHT
            right = (
                ((output.logits.argmax(-1) == tokens[:, 1:]) | ~is_answer)
                .all(1)
                .float()
                .mean()
                .item()
            )
            figures = f"loss {loss.item():.4f}  {right:4.0%} right  details {lost.item():.4f}"
            print(f"step {step:5d}  {figures}  {time.perf_counter() - started:6.1f} s", flush=True)


@torch.no_grad()
def report_accuracy(model: Qwen3MoeForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    """Print each task's exact match on words that pretraining never saw."""
    rng, (_, held_out) = random.Random(3), load_words()
    for index, task in enumerate(TASKS):
        right = sum(_answers(model, tokenizer, rng, task, held_out) for _ in range(40))
        print(f"{index:2d} {task.name:8s} {right / 40:.0%}")


def _answers(
    model: Qwen3MoeForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    rng: random.Random,
    task: Task,
    words: list[str],
) -> bool:
    chosen = tuple(rng.choices(words, k=2))
    question = Question(task.draw(rng, chosen), chosen)
    prompt = tokenizer(f"Input: {' '.join(chosen)}\n{task.ask(question)}:", return_tensors="pt")
    answer = f" {task.answer(question)}\n\n"
    num_tokens = len(tokenizer(answer)["input_ids"])
    tokens = model.generate(**prompt, max_new_tokens=num_tokens, do_sample=False)[
        0, prompt["input_ids"].shape[1] :
    ]
    return tokenizer.decode(tokens) == answer


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "kind", nargs="?", choices=("text", "vl"), default="text", help="which model"
    )
    parser.add_argument("--out", type=Path, help="folder to write the model to")
    parser.add_argument("--steps", type=int, default=2000, help="optimiser steps")
    parser.add_argument(
        "--tower-steps",
        type=int,
        default=2000,
        help="of vl: steps of the vision tower alone, before that",
    )
    parser.add_argument(
        "--start", type=Path, help="of vl: go on with this model, with the last lesson alone"
    )
    parser.add_argument("--rows", type=int, default=64, help="examples per step")
    parser.add_argument("--lr", type=float, help="largest learning rate; default 3e-3, vl 1e-3")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    rng, tokenizer = random.Random(1), make_tokenizer()
    out = arguments.out or OUT / arguments.kind
    model: Any
    batches: Iterator[tuple[dict[str, torch.Tensor], torch.Tensor]]
    if arguments.kind == "vl":
        tokenizer.chat_template = tiny_vl.CHAT_TEMPLATE
        reader = tiny_vl.Reader(tokenizer, tiny_vl.make_image_processor())
        if arguments.start:
            model = Qwen3VLMoeForConditionalGeneration.from_pretrained(
                arguments.start, dtype=torch.float32
            ).train()
            rng = random.Random(4)
        else:
            model = Qwen3VLMoeForConditionalGeneration(tiny_vl.make_config(tokenizer))
            tiny_vl.join_language_model(model, str(OUT / "text"))
            tiny_vl.pretrain_tower(model, arguments.tower_steps, arguments.rows)
        first_step = arguments.steps if arguments.start else 0
        batches = tiny_vl.make_batches(rng, reader, arguments.rows, arguments.steps, first_step)
    else:
        words, _ = load_words()
        model = Qwen3MoeForCausalLM(make_config(tokenizer))
        rows = make_batches(rng, tokenizer, words, arguments.rows)
        batches = (({"input_ids": tokens}, weights) for tokens, weights in rows)
    print(f"{model.num_parameters():,} parameters")
    details = tiny_vl.Details(model.config, arguments.rows) if arguments.kind == "vl" else None
    pretrain(
        model,
        batches,
        arguments.steps,
        arguments.lr or {"text": 3e-3, "vl": 1e-3}[arguments.kind],
        details,
    )
    model = model.to(torch.bfloat16)
    model.config.dtype = torch.bfloat16
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    if arguments.kind == "vl":
        tiny_vl.save(model, tokenizer, out)
        tiny_vl.report_accuracy(model.float().eval(), reader)
    else:
        model.save_pretrained(out)
        tokenizer.save_pretrained(out)
        report_accuracy(model.float(), tokenizer)


if __name__ == "__main__":
    main()

"""The tiny vision-language model: what it is made of, what it reads, how well it sees.
``make_tiny_model.py vl`` builds it.
"""

from __future__ import annotations

import itertools
import random
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from scenes import NUM_LOOKS, Question, draw_clouds, draw_description, draw_question, draw_scene
from string_tasks import draw_question as draw_string_question
from string_tasks import load_words
from transformers import (
    PreTrainedTokenizerFast,
    Qwen3MoeForCausalLM,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
)

from lorakit.weights.hub_layout import save_as_hub

MERGE, PATCH = 2, 4  # an image token stands for MERGE x MERGE patches of PATCH x PATCH pixels
VOCAB_SIZE = 288
TEXT_SHARE = 0.05  # of rows without a picture
# Until that share of the steps: of rows with a picture those that describe it, the most things in
# those, and of the questions those whose answer is a place or a picture, which are learnt last.
LESSONS = ((0.1, 1.0, 1, 0.4), (0.35, 0.5, 2, 0.4), (1.0, 0.1, 3, 0.75))
# After the template in Qwen/Qwen3-VL-30B-A3B-Instruct, without tools and videos.
CHAT_TEMPLATE = """\
{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\\n' }}
{%- if message.role == 'assistant' %}{%- generation %}
{%- if message.content is string %}{{- message.content }}
{%- else %}
{%- for part in message.content %}{%- if 'text' in part %}{{- part.text }}{%- endif %}{%- endfor %}
{%- endif %}
{{- '<|im_end|>' }}{%- endgeneration %}{{- '\\n' }}
{%- else %}
{%- if message.content is string %}{{- message.content }}
{%- else %}
{%- for part in message.content %}
{%- if part.type == 'image' or 'image' in part or 'image_url' in part %}
{{- '<|vision_start|><|image_pad|><|vision_end|>' }}
{%- elif 'text' in part %}{{- part.text }}
{%- endif %}
{%- endfor %}
{%- endif %}
{{- '<|im_end|>\\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""


def make_image_processor() -> Any:
    """Qwen3-VL's image processor, for images of a few dozen pixels."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    return Qwen2VLImageProcessorPil(
        patch_size=PATCH,
        merge_size=MERGE,
        temporal_patch_size=2,
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
        size={"shortest_edge": 16 * 16, "longest_edge": 128 * 128},
    )


def make_config(tokenizer: PreTrainedTokenizerFast) -> Qwen3VLMoeConfig:
    """Everything that Qwen3-VL-30B-A3B has, small: H 128, expert width 96, a tower with
    DeepStack, interleaved M-RoPE.
    """
    token = tokenizer.convert_tokens_to_ids
    return Qwen3VLMoeConfig(
        text_config={
            "vocab_size": VOCAB_SIZE,
            "hidden_size": 128,
            "intermediate_size": 256,
            "moe_intermediate_size": 96,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "num_experts": 12,
            "num_experts_per_tok": 2,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "max_position_embeddings": 1024,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [6, 5, 5],
                "mrope_interleaved": True,
            },
            "router_aux_loss_coef": 0.002,
            "pad_token_id": tokenizer.pad_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "bos_token_id": None,
        },
        vision_config={
            "depth": 4,
            "hidden_size": 96,
            "intermediate_size": 192,
            "num_heads": 4,
            "patch_size": PATCH,
            "spatial_merge_size": MERGE,
            "temporal_patch_size": 2,
            "out_hidden_size": 128,
            "num_position_embeddings": 256,
            "deepstack_visual_indexes": [0, 2],
        },
        image_token_id=token("<|image_pad|>"),
        video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token("<|vision_start|>"),
        vision_end_token_id=token("<|vision_end|>"),
        tie_word_embeddings=False,
    )


class Reader:
    """Questions to what the model is given."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, image_processor: Any) -> None:
        self.tokenizer, self.image_processor = tokenizer, image_processor

    def prompt(self, text: str, num_tokens: list[int]) -> str:
        """The conversation up to the answer; images, of so many tokens, stand before the
        question.
        """
        images = "".join(
            f"<|vision_start|>{'<|image_pad|>' * count}<|vision_end|>" for count in num_tokens
        )
        return f"<|im_start|>user\n{images}{text}<|im_end|>\n<|im_start|>assistant\n"

    def batch(
        self, rows: list[tuple[str, str, tuple[Any, ...]]]
    ) -> tuple[dict[str, Any], torch.Tensor]:
        """(question, answer, images) of each row, padded on the right -> inputs of the model,
        and the weights of all tokens.
        """
        images = [image for *_, own in rows for image in own]
        inputs: dict[str, Any] = (
            dict(self.image_processor(images, return_tensors="pt")) if images else {}
        )
        counts = iter((inputs["image_grid_thw"].prod(-1) // MERGE**2).tolist() if images else [])
        prompts = [
            self.prompt(text, list(itertools.islice(counts, len(own)))) for text, _, own in rows
        ]
        pairs = [
            (self._encode(p), self._encode(f"{answer}<|im_end|>"))
            for p, (_, answer, _) in zip(prompts, rows, strict=True)
        ]
        length = max(len(prompt) + len(answer) for prompt, answer in pairs)
        tokens, weights = (
            torch.full((len(rows), length), self.tokenizer.pad_token_id),
            torch.zeros(len(rows), length),
        )
        for row, (prompt, answer) in enumerate(pairs):
            end = len(prompt) + len(answer)
            tokens[row, :end] = torch.tensor(prompt + answer)
            # between once for each answer and once for each token
            weights[row, len(prompt) : end] = len(answer) ** -0.5
        is_image = tokens == self.tokenizer.convert_tokens_to_ids("<|image_pad|>")
        return {"input_ids": tokens, "mm_token_type_ids": is_image.int(), **inputs}, weights

    def _encode(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])


def make_batches(
    rng: random.Random, reader: Reader, num_rows: int, num_steps: int, first_step: int = 0
) -> Iterator[tuple[dict[str, Any], torch.Tensor]]:
    """Yield a batch for each step: questions about pictures, and some string tasks, so that text
    without a picture stays known.

    It begins with pictures of one thing: where there is only one, looking anywhere helps, and so
    where to look is soon found.
    """
    words, _ = load_words()
    for step in range(first_step, first_step + num_steps):
        described, max_things, placing = next(
            (one[1:] for one in LESSONS if step < one[0] * num_steps), LESSONS[-1][1:]
        )
        rows: list[tuple[str, str, tuple[Any, ...]]] = []
        for _ in range(num_rows):
            if rng.random() < TEXT_SHARE:
                task, asked = draw_string_question(rng, words)
                rows.append((f"{task.ask(asked)}: {' '.join(asked.words)}", task.answer(asked), ()))
            else:
                question = (
                    draw_description(rng, max_things)
                    if rng.random() < described
                    else draw_question(rng, placing)
                )
                rows.append((question.text, question.answer, question.images))
        yield reader.batch(rows)


def join_language_model(model: Qwen3VLMoeForConditionalGeneration, path: str) -> None:
    """Give ``model`` the layers of the tiny language model at ``path``, as Qwen3-VL has Qwen3's."""
    text = Qwen3MoeForCausalLM.from_pretrained(path, dtype=torch.float32)
    model.model.language_model.load_state_dict(text.model.state_dict())
    model.lm_head.load_state_dict(text.lm_head.state_dict())


class Details(torch.nn.Module):
    """What makes the tower keep details: from each of its tokens, the pixels below it must be
    told.
    """

    def __init__(self, config: Any, num_rows: int, weight: float = 2.0) -> None:
        super().__init__()
        self.rng, self.processor, self.num_rows, self.weight = (
            random.Random(5),
            make_image_processor(),
            num_rows,
            weight,
        )
        self.head = torch.nn.Linear(config.text_config.hidden_size, 3 * 2 * PATCH**2 * MERGE**2)

    def forward(self, tower: Any) -> torch.Tensor:
        """Return the loss on pictures of clouds, a share of their variance."""
        inputs = self.processor(
            [draw_clouds(self.rng) for _ in range(self.num_rows)], return_tensors="pt"
        )
        seen = tower(inputs["pixel_values"], grid_thw=inputs["image_grid_thw"]).pooler_output
        pixels = inputs["pixel_values"].view(len(seen), -1)
        return self.weight * (self.head(seen) - pixels).square().mean() / pixels.var()


def pretrain_tower(
    model: Qwen3VLMoeForConditionalGeneration, num_steps: int, num_rows: int, lr: float = 2e-3
) -> None:
    """Teach the vision tower alone to name what lies under each of its tokens, before the language
    model is joined to it.

    The towers of large models come pretrained, too. A small one that learns from a language model's
    few words, each about a whole picture, takes many times as long (32 % right after 1,500 steps).
    """
    rng, processor, tower = random.Random(2), make_image_processor(), model.model.visual
    width = model.config.text_config.hidden_size
    details = Details(model.config, num_rows)
    heads = torch.nn.ModuleList(
        torch.nn.Linear(width, NUM_LOOKS) for _ in range(1 + len(tower.deepstack_visual_indexes))
    )
    optimizer = torch.optim.AdamW(
        [*tower.parameters(), *heads.parameters(), *details.parameters()],
        lr=lr,
        betas=(0.9, 0.95),
        weight_decay=0.05,
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=lr, total_steps=num_steps, pct_start=max(0.05, 2 / num_steps)
    )
    started = time.perf_counter()
    for step in range(num_steps):
        scenes = [draw_scene(rng) for _ in range(num_rows)]
        inputs = processor([scene.draw(rng) for scene in scenes], return_tensors="pt")
        looks = torch.tensor([look for scene in scenes for look in scene.looks(PATCH * MERGE)])
        seen = tower(inputs["pixel_values"], grid_thw=inputs["image_grid_thw"])
        outputs = (seen.pooler_output, *seen.deepstack_features)
        scores = [head(output) for head, output in zip(heads, outputs, strict=True)]
        weights = torch.where(looks == 0, 0.25, 1.0)  # most of a picture is ground
        loss = (
            sum(
                (torch.nn.functional.cross_entropy(score, looks, reduction="none") * weights).sum()
                for score in scores
            )
            / weights.sum()
        )
        lost = details(tower)
        (loss + lost).backward()
        torch.nn.utils.clip_grad_norm_(tower.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 100 == 0 or step == num_steps - 1:
            right = [
                (score.argmax(-1) == looks)[looks > 0].float().mean().item() for score in scores
            ]
            named = ", ".join(f"{share:.0%}" for share in right)
            figures = f"named {named}  loss {loss.item():.4f}  details {lost.item():.4f}"
            print(
                f"tower, step {step:5d}  {figures}  {time.perf_counter() - started:6.1f} s",
                flush=True,
            )


def save(model: Any, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write everything as the hub has it."""
    save_as_hub(model, folder)
    tokenizer.save_pretrained(folder)
    make_image_processor().save_pretrained(folder)


@torch.no_grad()
def report_accuracy(
    model: Qwen3VLMoeForConditionalGeneration, reader: Reader, num_questions: int = 1000
) -> None:
    """Print, for each kind of question, how often the answer is right: seen, with a blank
    picture, and by chance.
    """
    rng = random.Random(3)
    questions = [draw_question(rng) for _ in range(num_questions)]
    right: dict[str, list[bool]] = defaultdict(list)
    blind: dict[str, list[bool]] = defaultdict(list)
    chance = {question.kind: question.chance for question in questions}
    for first in range(0, num_questions, 50):
        some = questions[first : first + 50]
        for found, asked in ((right, some), (blind, [question.blanked() for question in some])):
            for question, is_right in zip(asked, _are_right(model, reader, asked), strict=True):
                found[question.kind].append(is_right)
    for kind in sorted(right):
        seen, blank = (sum(found[kind]) / len(found[kind]) for found in (right, blind))
        print(
            f"{kind:6s} {seen:6.1%} seen  {blank:6.1%} blanked  {chance[kind]:6.1%} by chance "
            f" ({len(right[kind])} questions)"
        )
    everything = sum(sum(found) for found in right.values()) / num_questions
    blanked = sum(sum(found) for found in blind.values()) / num_questions
    print(
        f"all    {everything:6.1%} seen  {blanked:6.1%} blanked "
        f" {sum(q.chance for q in questions) / num_questions:6.1%} by chance"
    )


def _are_right(model: Any, reader: Reader, questions: list[Question]) -> list[bool]:
    """Whether the likeliest token at each place of the answer is the answer's: the same as
    greedy sampling.
    """
    inputs, weights = reader.batch(
        [(question.text, question.answer, question.images) for question in questions]
    )
    guesses = model(**inputs, use_cache=False).logits[:, :-1].argmax(-1)
    is_wrong = (guesses != inputs["input_ids"][:, 1:]) & (weights[:, 1:] > 0)
    return (~is_wrong.any(1)).tolist()

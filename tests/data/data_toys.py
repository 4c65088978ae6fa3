"""A second tokenizer, templates, and ways to read tokens back that share nothing with the
library.
"""

from __future__ import annotations

import json
import string
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

CORPUS = [
    "What is the capital of France? Paris is the capital. Thank you, you are welcome.",
    "English: banana split Pig Latin: anana-bay it-splay hello hello world world",
    (
        "You answer in one word. The answer is no. The answer is yes. First second third question"
        " answer"
    ),
]
SECOND_TEMPLATE = (
    "{{- bos_token }}"
    "{%- for message in messages %}"
    "{{- '[' + message.role + '] ' + message.content + eos_token + '\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '[assistant] ' }}{%- endif %}"
)
# As Qwen3's: thoughts of assistant turns before the last user turn are left away.
THINKING_TEMPLATE = """
{%- set ns = namespace(last_user=-1) %}
{%- for message in messages %}{%- if message.role == 'user' %}{%- set ns.last_user = loop.index0 %}
{%- endif %}{%- endfor %}
{%- for message in messages %}
{%- set content = message.content %}
{%- if message.role == 'assistant' and '</think>' in content and loop.index0 < ns.last_user %}
{%- set content = content.split('</think>')[-1].lstrip('\\n') %}
{%- endif %}
{{- '[' + message.role + '] ' + content + eos_token + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '[assistant] ' }}{%- endif %}"""
# The number of messages stands in front, so no rendered prefix is a prefix of anything longer.
COUNTING_TEMPLATE = "{{- messages | length }}" + SECOND_TEMPLATE.removeprefix("{{- bos_token }}")


def build_second_tokenizer() -> Any:
    """A BPE vocabulary in SentencePiece's manner; ``<s>`` goes before every text, ``</s>`` ends
    one, ``<pad>`` is a third.
    """
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<unk>", "<s>", "</s>", "<pad>"],
        initial_alphabet=[*string.printable, "é", "▁"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)]
    )
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)
    fast.chat_template = SECOND_TEMPLATE
    return fast


def text_of(tokenizer: Any, tokens: Iterable[int]) -> str:
    """What ``tokens`` spell, the dummy prefix's space included, which a decoder would hide."""
    tokens = list(tokens)
    if tokenizer.bos_token is None:
        return tokenizer.decode(
            tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
    return "".join(tokenizer.convert_ids_to_tokens(tokens)).replace("▁", " ")


def trained_text(tokenizer: Any, example: Any) -> str:
    """The text of the tokens whose weight is not 0."""
    return text_of(
        tokenizer, (t for t, weight in zip(example.tokens, example.weights, strict=True) if weight)
    )


def write_jsonl(path: Path, rows: Iterable[Any]) -> str:
    """Write ``rows`` as JSON lines and return the path as the text a user would type."""
    path.write_text(
        "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8"
    )
    return str(path)

"""Chat templates for models that have none, and those that a user brings."""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import Any

from lorakit.errors import ConfigError

BUNDLED = Path(__file__).parent / "templates"
OFFER = (
    "set data.chat_template=plain (User: …, Assistant: …, answers end with EOS), chatml (for"
    " tokenizers with <|im_end|>), or a file with the Jinja template that the model was trained"
    " with"
)


def read_template(name: str) -> str:
    """The Jinja text of a file, or of a bundled template by its name. Raises ConfigError."""
    path, bundled = Path(name).expanduser(), BUNDLED / f"{name}.jinja"
    if not path.is_file() and not bundled.is_file():
        names = sorted(file.stem for file in BUNDLED.glob("*.jinja"))
        hint = f"give a file with a Jinja template, or one of {', '.join(names)}"
        if near := difflib.get_close_matches(name, names, n=1):
            hint = f"did you mean {near[0]}?"
        raise ConfigError(f"data.chat_template={name}: no such file; {hint}")
    try:
        return (path if path.is_file() else bundled).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"data.chat_template={name}: cannot be read as text: {error}") from error


def use_template(tokenizer: Any, name: str) -> None:
    """Give ``tokenizer`` the template ``name``. Raises ConfigError where it is no template, or
    its answers would have no end.
    """
    import jinja2

    text = read_template(name)
    # transformers' own tag says which parts the assistant writes; plain Jinja does not know it
    plain = re.sub(r"\{%[-+]?\s*(?:end)?generation\s*[-+]?%\}", "", text)
    try:
        jinja2.Environment(extensions=["jinja2.ext.loopcontrols"]).parse(plain)
    except jinja2.TemplateSyntaxError as error:
        raise ConfigError(
            f"data.chat_template={name}: line {error.lineno}: {error.message}"
        ) from error
    unknown = (None, tokenizer.unk_token_id)
    if name == "chatml" and tokenizer.convert_tokens_to_ids("<|im_end|>") in unknown:
        raise ConfigError(
            "data.chat_template=chatml: the tokenizer has no token <|im_end|>, so answers would"
            " have no end; use plain"
        )
    if name == "plain" and not tokenizer.eos_token:
        raise ConfigError(
            "data.chat_template=plain: the tokenizer has no EOS token, so answers would have no"
            " end; give a file"
        )
    tokenizer.chat_template = text

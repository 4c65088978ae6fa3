"""``lorakit sample [RUN] -- TEXT``: text goes in as it is, never through Hydra's grammar."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorakit.cli.guard import run_command
from lorakit.cli.run_arguments import add_run_arguments, open_trained
from lorakit.cli.run_arguments import parse as parse_options
from lorakit.data.images import StoredImage
from lorakit.data.read.rows import are_chats
from lorakit.errors import CheckpointError, ConfigError
from lorakit.types import ImageChunk

if TYPE_CHECKING:
    from lorakit.data.images import ImageEncoder


def main(arguments: list[str]) -> None:
    """Sample from text after ``--``, a file, standard input, or in conversation."""
    options, text = parse(arguments)
    prompts = read_prompts(options, text)
    try:
        trained = open_trained(options)
    except CheckpointError as error:
        if options.run and text is None:
            raise CheckpointError(
                f"{error}\nWrite a text to continue after --: lorakit sample -- {options.run!r}"
            ) from error
        raise
    if prompts is None and not sys.stdin.isatty():
        prompts = [
            _checked(
                _without_last_line_end(sys.stdin.buffer.read().decode("utf-8", "surrogateescape")),
                "standard input",
            )
        ]
    is_chat = (
        options.chat
        if options.chat is not None
        else are_chats(trained.run.info.get("formats") or ())
    )
    if options.system and not is_chat:
        raise ConfigError("--system is a message of a conversation; use --chat")
    model, tokenizer = trained.load(with_adapter=not options.base)
    if is_chat and not tokenizer.chat_template:
        raise ConfigError("the tokenizer has no chat template; use --raw")
    stop = options.stop if options.stop is not None else trained.config["data"].get("stop")
    images = None
    if options.image:
        from lorakit.pipeline.build import load_images

        images = load_images(trained.model).within(*trained.pixel_bounds)
    if is_chat and prompts is not None:
        print(
            "as a user message, in the chat template (--raw: as it is)",
            file=sys.stderr,
            flush=True,
        )
    if images is not None and not is_chat:
        raise ConfigError("--image is shown in a message; use --chat")
    speaker = Speaker(model, tokenizer, options, stop=stop, is_chat=is_chat, images=images)
    if prompts is None:
        converse(speaker, trained.run.name)
        return
    for prompt in prompts:
        print(speaker.answer(prompt))


def parse(arguments: list[str]) -> tuple[argparse.Namespace, str | None]:
    """Return (options, text after ``--`` or None)."""
    text = None
    if "--" in arguments:
        place = arguments.index("--")
        arguments, text = arguments[:place], " ".join(arguments[place + 1 :])
    parser = argparse.ArgumentParser(
        prog="lorakit sample",
        usage="lorakit sample [RUN] [options] [-- TEXT]",
        description=(
            "Generate with a trained adapter. Without TEXT, --prompt-file or piped input it is a"
            " conversation."
        ),
    )
    add_run_arguments(parser)
    parser.add_argument(
        "--prompt-file",
        type=Path,
        help="the prompt is this file's text, without its last line's end",
    )
    parser.add_argument(
        "--image",
        type=Path,
        action="append",
        default=[],
        help="shown before the text; may be repeated",
    )
    parser.add_argument("--max-tokens", type=int, default=256)
    parser.add_argument("--temperature", type=float, default=0.0, help="0 (default) is greedy")
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--top-k", type=int, default=-1)
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--num-samples", "-n", type=int, default=1)
    parser.add_argument(
        "--stop",
        action="append",
        help="end at this text (default: the run's data.stop); may be repeated",
    )
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument(
        "--chat",
        action="store_true",
        default=None,
        help="the text is a user message, in the chat template (default for runs on conversations)",
    )
    mode.add_argument(
        "--raw",
        dest="chat",
        action="store_false",
        help="the text is the prompt as it is (default for others)",
    )
    parser.add_argument(
        "--system", metavar="TEXT", help="a system message in front of the conversation"
    )
    parser.add_argument("--base", action="store_true", help="without the adapter, to compare")
    options = parse_options(parser, arguments)
    if (
        options.max_tokens < 1
        or options.num_samples < 1
        or not 0 < options.top_p <= 1
        or options.temperature < 0
    ):
        parser.error(
            "--max-tokens and -n must be at least 1, --top-p above 0 and at most 1, --temperature"
            " not negative"
        )
    return options, text


def read_prompts(options: argparse.Namespace, text: str | None) -> list[str] | None:
    """Return the command line's prompts; None for standard input or a conversation."""
    if text is not None and options.prompt_file is not None:
        raise ConfigError("give TEXT after -- or --prompt-file, not both")
    if options.prompt_file is not None:
        try:
            return [_without_last_line_end(options.prompt_file.read_text(encoding="utf-8"))]
        except UnicodeDecodeError as error:
            raise ConfigError(
                f"{options.prompt_file}: not UTF-8: {error.reason} at byte {error.start}"
            ) from error
    if text is not None:
        return [_checked(text, "TEXT")]
    return None


def _without_last_line_end(text: str) -> str:
    """``text`` as it was meant: an editor, or echo, ends it with a line's end, after which a
    model continues with something else.
    """
    return text.removesuffix("\n").removesuffix("\r")


def _checked(text: str, source: str) -> str:
    """``text`` itself. Raises ConfigError where it holds bytes that are not UTF-8, which Python
    lets through as surrogates.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ConfigError(f"{source}: not UTF-8 at character {error.start}") from error
    return text


class Speaker:
    """A model with its sampling settings; remembers the conversation where it is one."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        options: argparse.Namespace,
        *,
        stop: Any,
        is_chat: bool,
        images: ImageEncoder | None = None,
    ) -> None:
        from lorakit.data.render.tokenizer import Encoder
        from lorakit.types import SamplingParams

        self.model, self.tokenizer, self.is_chat = model, tokenizer, is_chat
        self.encoder = Encoder(tokenizer)
        self.num_samples = options.num_samples
        self.images = images
        self.named: list[Path] = options.image
        self.system: str | None = options.system
        self.clear()
        self.params = SamplingParams(
            max_tokens=options.max_tokens,
            temperature=options.temperature,
            top_p=options.top_p,
            top_k=options.top_k,
            seed=options.seed,
            stop=stop,
        )

    def clear(self) -> None:
        """Begin a conversation."""
        self.messages: list[dict[str, Any]] = (
            [{"role": "system", "content": self.system}] if self.system else []
        )
        self.paths = list(self.named)  # of the next message
        self.shown: list[ImageChunk] = []  # of all messages

    def answer(self, text: str) -> str:
        """Return what the model writes after ``text`` (all samples, each on lines of its own)."""
        from lorakit.sampling.generate import generate
        from lorakit.types import ModelInput

        if self.is_chat:
            self.messages.append({"role": "user", "content": self._content(text)})
            tokens = self.encoder.encode_chat(self.messages)
        else:
            tokens = self.encoder.encode_prompt(text)
        if not tokens:
            raise ConfigError(
                "the prompt is empty, and this tokenizer has no token that begins a text"
            )
        prompt = (
            self.images.place(tokens, self.shown) if self.images else ModelInput.from_ints(tokens)
        )
        samples = generate(
            self.model, self.tokenizer, [prompt] * self.num_samples, self.params, self.images
        )
        if self.is_chat:
            self.messages.append({"role": "assistant", "content": samples[0].text})
        return "\n".join(sample.text for sample in samples)

    def _content(self, text: str) -> str | list[dict[str, str]]:
        """A message: the images that the command line named, which are shown once, and the text."""
        if self.images is None or not self.paths:
            return text
        stored = [StoredImage(path=path) for path in self.paths]
        self.shown += [
            ImageChunk(
                image.read(),
                expected_tokens=self.images.num_tokens(*image.read_size()),
                name=image.name,
            )
            for image in stored
        ]
        self.paths = []
        return [*({"type": "image"} for _ in stored), {"type": "text", "text": text}]


def converse(speaker: Speaker, name: str) -> None:
    """Read lines and answer them until end of input. ``/clear`` forgets the conversation."""
    kind = "messages" if speaker.is_chat else "prompts, taken as they are"
    print(f"{name}: type {kind}; /clear starts over, Ctrl-D ends", file=sys.stderr)
    while True:
        try:
            line = input("> ")
        except EOFError:
            print(file=sys.stderr)
            return
        if line.strip() == "/clear":
            speaker.clear()
        elif line:
            print(speaker.answer(line))


if __name__ == "__main__":
    run_command(main)

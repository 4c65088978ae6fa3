"""Supervised fine-tuning with Tinker's verbs: ``python recipes/sft_loop.py [ROWS.jsonl]``, rows of
"prompt" and "completion".

Without a file it teaches pig latin. ``--resume tinker://…``, a path that a run printed, goes on
from exactly that step if the
other options are as they were: in this process to the same bits. ``--server`` runs the same by the
public SDK, once `lorakit serve` runs and ``eval "$(lorakit tinker-env)"`` has told where.

The tiny model's loss per token on held-out rows (two cores of an AMD EPYC, torch 2.13.0): 3.79
before training, 0.063 after 10 steps, 0.0005 after 60, and the four answers that it prints are
right. 22 s in this process, 24 s by a server.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import re
import sys
import time
from pathlib import Path
from typing import Any

if "--server" in sys.argv:  # before options are parsed, since it decides what `types` are
    import tinker as api  # over HTTP; the variables that `lorakit tinker-env` prints say where
else:
    import lorakit as api  # in this process
types = api.types

ADJECTIVES = (
    "brave clever eager frosty gentle hungry idle jolly knotty little mighty noble orange proud"
    " quiet rusty shiny"
)
NOUNS = (
    "anchor bridge castle donkey engine flower guitar hammer island jungle kettle lantern mirror"
    " needle oyster pepper"
)


def main(arguments: list[str] | None = None) -> dict[int, float]:
    """Train, and return the loss of each step."""
    options = parse(arguments)
    rows = read_rows(options.rows) if options.rows else pig_latin_rows()
    random.Random(options.seed).shuffle(rows)
    num_held_out = max(1, round(len(rows) * options.held_out))
    if num_held_out >= len(rows):
        sys.exit(f"{num_held_out} of {len(rows)} rows are held out, and none is left to train on")
    first_step = step_of(options.resume) if options.resume else 0
    with api.ServiceClient() as service:
        if options.resume:
            training = service.create_training_client_from_state_with_optimizer(
                options.resume
            ).result()
        else:
            training = service.create_lora_training_client(
                options.model, rank=options.rank, seed=options.seed
            ).result()
        tokenizer = training.get_tokenizer()
        data = [make_datum(tokenizer, row) for row in rows]
        losses = train(training, data[num_held_out:], data[:num_held_out], first_step, options)
        sampling = training.save_weights_and_get_sampling_client().result()
        show_samples(sampling, tokenizer, rows[: min(num_held_out, 4)])
    return losses


def train(
    training: Any,
    data: list[Any],
    held_out: list[Any],
    first_step: int,
    options: argparse.Namespace,
) -> dict[int, float]:
    """Make the steps that are left. What a step does follows from its number, so that it is the
    same after ``--resume``.
    """
    losses: dict[int, float] = {}
    evaluate(training, held_out, first_step)
    for step in range(first_step, options.steps):
        started = time.perf_counter()
        batch = batch_of_step(data, step, options.batch_size, options.seed)
        learning_rate = options.learning_rate * schedule(step, options.steps)
        # Both calls are queued before either is waited for, so that nothing is idle between them.
        forward_backward = training.forward_backward(batch, "cross_entropy")
        optim = training.optim_step(types.AdamParams(learning_rate=learning_rate))
        losses[step] = mean_loss(forward_backward.result(), batch)
        optim.result()
        seconds = time.perf_counter() - started
        print(
            f"step {step:3d}  loss {losses[step]:.4f}  lr {learning_rate:.1e}  {seconds:.2f} s",
            flush=True,
        )
        num_steps, is_last = step + 1, step + 1 == options.steps
        if num_steps % options.eval_every == 0 or is_last:
            evaluate(training, held_out, num_steps)
        if num_steps % options.save_every == 0 or is_last:
            print(f"saved {training.save_state(f'step-{num_steps}').result().path}")
    return losses


def evaluate(training: Any, held_out: list[Any], num_steps: int) -> None:
    """Print the loss on rows that are not trained on."""
    loss = mean_loss(training.forward(held_out, "cross_entropy").result(), held_out)
    print(f"after {num_steps} steps: held-out loss {loss:.4f} ({len(held_out)} rows)")


def schedule(step: int, num_steps: int) -> float:
    """The share of the learning rate: a tenth of the steps up, then a cosine down to a tenth."""
    num_warm_up_steps = max(1, num_steps // 10)
    if step < num_warm_up_steps:
        return (step + 1) / num_warm_up_steps
    progress = (step - num_warm_up_steps) / max(1, num_steps - num_warm_up_steps)
    return 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * progress))


def batch_of_step(data: list[Any], step: int, batch_size: int, seed: int) -> list[Any]:
    """The minibatch of a step. Every epoch has an order of its own, whose last rows are left out
    if they are no whole batch.
    """
    batches_per_epoch = max(1, len(data) // batch_size)
    epoch, number = divmod(step, batches_per_epoch)
    order = random.Random(f"{seed} {epoch}").sample(range(len(data)), len(data))
    return [data[i] for i in order[number * batch_size : (number + 1) * batch_size]]


def make_datum(tokenizer: Any, row: dict[str, str]) -> Any:
    """Position i reads token i and predicts token i + 1; only tokens of the completion count."""
    prompt = tokenizer.encode(row["prompt"])
    completion = tokenizer.encode(row["completion"], add_special_tokens=False)
    tokens, weights = prompt + completion, [0.0] * len(prompt) + [1.0] * len(completion)
    return types.Datum(
        model_input=types.ModelInput.from_ints(tokens[:-1]),
        loss_fn_inputs={"target_tokens": tokens[1:], "weights": weights[1:]},
    )


def mean_loss(output: Any, data: list[Any]) -> float:
    """Losses are sums over tokens; this is the mean over those that count."""
    return output.metrics["loss:sum"] / sum(
        sum(datum.loss_fn_inputs["weights"].tolist()) for datum in data
    )


def step_of(path: str) -> int:
    """The number of steps that lie behind a saved state: its name says it."""
    if (found := re.fullmatch(r"tinker://[^/]+/weights/step-(\d+)", path)) is None:
        sys.exit(
            f"--resume {path}: not a path that this program saved"
            " (tinker://RUN/weights/step-NUMBER)"
        )
    return int(found[1])


def show_samples(sampling: Any, tokenizer: Any, rows: list[dict[str, str]]) -> None:
    """Print the likeliest completion of each row's prompt beside the right one."""
    params = types.SamplingParams(max_tokens=64, temperature=0.0, stop=["\n"])
    prompts = [types.ModelInput.from_ints(tokenizer.encode(row["prompt"])) for row in rows]
    futures = [
        sampling.sample(prompt=prompt, num_samples=1, sampling_params=params) for prompt in prompts
    ]
    for row, future in zip(rows, futures, strict=True):
        answer = tokenizer.decode(future.result().sequences[0].tokens).rstrip("\n")
        print(f"{row['prompt']!r} -> {answer!r} (right: {row['completion'].rstrip()!r})")


def read_rows(path: Path) -> list[dict[str, str]]:
    """Read a file of JSON lines."""
    return [
        json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()
    ]


def pig_latin_rows() -> list[dict[str, str]]:
    """Every adjective with every noun."""

    def pig_latin(word: str) -> str:
        start = next(i for i, letter in enumerate(word) if letter in "aeiou")
        return f"{word[start:]}-{word[:start] or 'w'}ay"

    return [
        {
            "prompt": f"English: {adjective} {noun}\nPig Latin:",
            "completion": f" {pig_latin(adjective)} {pig_latin(noun)}\n\n",
        }
        for adjective in ADJECTIVES.split()
        for noun in NOUNS.split()
    ]


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add(
        "rows",
        type=Path,
        nargs="?",
        help="JSON lines of prompt and completion (default: pig latin)",
    )
    add("--server", action="store_true", help="run by the public SDK against a server")
    add("--model", default="tiny", help="base model [%(default)s]")
    add("--rank", type=int, default=32, help="of the adapter [%(default)s]")
    add("--steps", type=int, default=60, help="of the whole run, resumed or not [%(default)s]")
    add("--batch-size", type=int, default=32, help="rows per step [%(default)s]")
    add("--learning-rate", type=float, default=5e-3, help="the highest [%(default)s]")
    add(
        "--held-out",
        type=float,
        default=0.1,
        help="share of rows that are not trained on [%(default)s]",
    )
    add("--eval-every", type=int, default=10, help="steps [%(default)s]")
    add("--save-every", type=int, default=20, help="steps [%(default)s]")
    add("--resume", metavar="PATH", help="a tinker:// path that an earlier run printed")
    add("--seed", type=int, default=0, help="of adapter, split and order [%(default)s]")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()

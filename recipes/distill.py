"""On-policy distillation with Tinker's verbs: ``python recipes/distill.py``.

A teacher, an adapter on the same base, is first taught from right answers to write words backwards.
Its student, a new adapter,
sees no answer: it samples its own, the teacher says how likely it finds each token, and a token
becomes likelier by as much as the teacher finds it likelier than the student did. That lowers
KL(student || teacher), but teaches only what the student tries now and then. ``--server`` runs the
same by the public SDK, once `lorakit serve` runs and ``eval "$(lorakit tinker-env)"`` has told
where.

The tiny model's KL on held-out prompts (two cores of an AMD EPYC, torch 2.13.0), in nats per token:
2.63 before, 0.24 after 10 steps, 0.011 after 30. 36 s in this process, 61 s by a server.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from dataclasses import dataclass
from typing import Any

if "--server" in sys.argv:  # before options are parsed, since it decides what `types` are
    import tinker as api  # over HTTP; the variables that `lorakit tinker-env` prints say where
else:
    import lorakit as api  # in this process
types = api.types

CONSONANTS, VOWELS = "bdfghjklmnprstvz", "aeiou"
NUM_WORDS, NUM_HELD_OUT = 320, 64
MAX_TOKENS = 16  # of an answer; the right ones have 6


@dataclass(frozen=True)
class Rollout:
    """An answer that the student sampled, and both models' log-probabilities of each of its
    tokens.
    """

    prompt: list[int]
    tokens: list[int]
    student_logprobs: list[float]
    teacher_logprobs: list[float]

    @property
    def advantages(self) -> list[float]:
        """How much likelier the teacher finds each token."""
        return [
            theirs - ours
            for theirs, ours in zip(self.teacher_logprobs, self.student_logprobs, strict=True)
        ]


def main(arguments: list[str] | None = None) -> list[float]:
    """Train teacher and student, and return the student's KL on held-out prompts, in nats per
    token.
    """
    options = parse(arguments)
    rng = random.Random(options.seed)
    words = list({draw_word(rng): None for _ in range(NUM_WORDS)})
    held_out_words, words = words[:NUM_HELD_OUT], words[NUM_HELD_OUT:]
    divergences = []
    with api.ServiceClient() as service:
        teacher = train_teacher(service, words, rng, options)
        training = service.create_lora_training_client(
            options.model, rank=options.rank, seed=options.seed + 1
        ).result()
        tokenizer = training.get_tokenizer()
        for step in range(options.steps + 1):
            started = time.perf_counter()
            # The weights as they are now: what is sampled is what is trained.
            student = training.save_weights_and_get_sampling_client().result()
            if step % options.eval_every == 0 or step == options.steps:
                rollouts = sample(
                    student, teacher, tokenizer, held_out_words, options.samples, seed=options.seed
                )
                divergences.append(divergence(rollouts))
                print(f"after {step} steps: held-out KL {divergences[-1]:.4f} nats per token")
            if step in (0, options.steps):
                show_answers(student, tokenizer, held_out_words[:4])
            if step == options.steps:
                break
            batch = rng.sample(words, options.batch_size)
            rollouts = sample(
                student, teacher, tokenizer, batch, options.samples, seed=options.seed + 1 + step
            )
            forward_backward = training.forward_backward(
                [make_datum(one) for one in rollouts], "importance_sampling"
            )
            optim = training.optim_step(types.AdamParams(learning_rate=options.learning_rate))
            forward_backward.result()
            optim.result()
            print(
                f"step {step:3d}  KL {divergence(rollouts):.4f} nats per token "
                f" {time.perf_counter() - started:.2f} s",
                flush=True,
            )
    return divergences


def train_teacher(
    service: Any, words: list[str], rng: random.Random, options: argparse.Namespace
) -> Any:
    """Return a sampling client of an adapter that was fine-tuned on right answers."""
    training = service.create_lora_training_client(
        options.model, rank=options.rank, seed=options.seed
    ).result()
    tokenizer = training.get_tokenizer()
    for step in range(options.teacher_steps):
        data = []
        for word in rng.sample(words, options.batch_size):
            prompt = tokenizer.encode(ask(word))
            completion = tokenizer.encode(f" {answer_to(word)}\n", add_special_tokens=False)
            tokens, weights = prompt + completion, [0.0] * len(prompt) + [1.0] * len(completion)
            data.append(
                types.Datum(
                    model_input=types.ModelInput.from_ints(tokens[:-1]),
                    loss_fn_inputs={"target_tokens": tokens[1:], "weights": weights[1:]},
                )
            )
        forward_backward = training.forward_backward(data, "cross_entropy")
        optim = training.optim_step(types.AdamParams(learning_rate=options.teacher_learning_rate))
        loss = forward_backward.result().metrics["loss:sum"] / len(data)
        optim.result()
        print(f"teacher's step {step:3d}  loss {loss:.4f} per answer", flush=True)
    path = training.save_weights_for_sampler("teacher").result().path
    print(f"the teacher is {path}")
    return service.create_sampling_client(model_path=path).result()


def sample(
    student: Any, teacher: Any, tokenizer: Any, words: list[str], num_samples: int, *, seed: int
) -> list[Rollout]:
    """Let the student answer each prompt several times, and the teacher score every answer. What
    can be queued at once is.
    """
    prompts = [tokenizer.encode(ask(word)) for word in words]
    answers = []
    for number, prompt in enumerate(prompts):
        # Each prompt has a seed of its own: with the same, their samples would share their
        # randomness.
        params = types.SamplingParams(
            max_tokens=MAX_TOKENS, temperature=1.0, stop=["\n"], seed=1000 * seed + number
        )
        model_input = types.ModelInput.from_ints(prompt)
        answers.append(
            student.sample(prompt=model_input, num_samples=num_samples, sampling_params=params)
        )
    scored = []
    for prompt, answer in zip(prompts, answers, strict=True):
        for sequence in answer.result().sequences:
            whole = types.ModelInput.from_ints([*prompt, *sequence.tokens])
            scored.append((prompt, sequence, teacher.compute_logprobs(whole)))
    return [
        # The teacher's log-probabilities are of every token of the row, the prompt's first.
        Rollout(
            prompt, list(sequence.tokens), list(sequence.logprobs), scores.result()[len(prompt) :]
        )
        for prompt, sequence, scores in scored
    ]


def make_datum(rollout: Rollout) -> Any:
    """Position i reads token i and predicts token i + 1; on the prompt's own tokens the
    advantage is 0.
    """
    tokens, num_given = rollout.prompt + rollout.tokens, len(rollout.prompt) - 1
    return types.Datum(
        model_input=types.ModelInput.from_ints(tokens[:-1]),
        loss_fn_inputs={
            "target_tokens": tokens[1:],
            "logprobs": [0.0] * num_given + rollout.student_logprobs,
            "advantages": [0.0] * num_given + rollout.advantages,
        },
    )


def divergence(rollouts: list[Rollout]) -> float:
    """KL(student || teacher), estimated by the student's samples: the mean over tokens of the
    log-probabilities' difference.
    """
    advantages = [advantage for rollout in rollouts for advantage in rollout.advantages]
    return -sum(advantages) / len(advantages)


def show_answers(student: Any, tokenizer: Any, words: list[str]) -> None:
    """Print the likeliest answer of the student to each word."""
    params = types.SamplingParams(max_tokens=MAX_TOKENS, temperature=0.0, stop=["\n"])
    for word in words:
        prompt = types.ModelInput.from_ints(tokenizer.encode(ask(word)))
        (sequence,) = (
            student.sample(prompt=prompt, num_samples=1, sampling_params=params).result().sequences
        )
        print(f"{word} -> {tokenizer.decode(sequence.tokens).strip()} (right: {answer_to(word)})")


def ask(word: str) -> str:
    return f"Input: {word}\nResult:"


def answer_to(word: str) -> str:
    return word[::-1]


def draw_word(rng: random.Random) -> str:
    return "".join(rng.choice(letters) for letters in (CONSONANTS, VOWELS, CONSONANTS, VOWELS))


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--server", action="store_true", help="run by the public SDK against a server")
    add("--model", default="tiny", help="base model [%(default)s]")
    add("--rank", type=int, default=32, help="of both adapters [%(default)s]")
    add("--teacher-steps", type=int, default=20, help="of fine-tuning [%(default)s]")
    add("--teacher-learning-rate", type=float, default=3e-3, help="default: %(default)s")
    add("--steps", type=int, default=30, help="of distillation [%(default)s]")
    add("--batch-size", type=int, default=32, help="prompts per step [%(default)s]")
    add("--samples", type=int, default=4, help="per prompt [%(default)s]")
    add("--learning-rate", type=float, default=5e-4, help="default: %(default)s")
    add("--eval-every", type=int, default=10, help="steps [%(default)s]")
    add("--seed", type=int, default=0, help="of adapters, words and samples [%(default)s]")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()

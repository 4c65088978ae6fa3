"""Reinforcement learning with Tinker's verbs: ``python recipes/rl_loop.py [--plot reward.png]``.

A prompt has six random letters of which exactly one is an a, b, c or d, and that one is the answer:
"xkbzqm? " wants "b". The reward is 1 for it and 0 for anything else, so that whoever ignores the
prompt gets a quarter. ``--server`` runs the same by the public SDK, once `lorakit serve` runs and
``eval "$(lorakit tinker-env)"`` has told where.

The tiny model's reward on 128 held-out prompts (two cores of an AMD EPYC, torch 2.13.0): 0.16
before training, 0.99 after 50 steps; the best policy that ignores the prompt has 0.25. 25 s in this
process, 40 s by a server. Seeds 1 and 2 end at 1.00.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

if "--server" in sys.argv:  # before options are parsed, since it decides what `types` are
    import tinker as api  # over HTTP; the variables that `lorakit tinker-env` prints say where
else:
    import lorakit as api  # in this process
types = api.types

ANSWERS = "abcd"
OTHER_LETTERS = "efghijklmnopqrstuvwxyz"
NUM_LETTERS = 6
NUM_HELD_OUT = 128
SAMPLES_PER_HELD_OUT = 4


@dataclass(frozen=True)
class Problem:
    """A prompt and the only answer that is rewarded."""

    prompt: str
    answer: str


@dataclass(frozen=True)
class Rollout:
    """One sampled answer."""

    prompt: list[int]
    tokens: list[int]
    logprobs: list[float]  # of the tokens, under the policy that sampled them
    reward: float


@dataclass
class History:
    """Mean rewards, by number of optimiser steps before them."""

    blind: float  # what the best policy gets that ignores the prompt
    trained: dict[int, float] = field(default_factory=dict)
    held_out: dict[int, float] = field(default_factory=dict)


def main(arguments: list[str] | None = None) -> History:
    """Train, and return the rewards."""
    options = parse(arguments)
    rng = random.Random(options.seed)
    held_out = [draw_problem(rng, ANSWERS[i % len(ANSWERS)]) for i in range(NUM_HELD_OUT)]
    answers = [problem.answer for problem in held_out]
    history = History(blind=max(answers.count(answer) for answer in ANSWERS) / len(answers))
    print(f"held-out reward of the best policy that ignores the prompt: {history.blind:.3f}")
    with api.ServiceClient() as service:
        training = service.create_lora_training_client(
            options.model, rank=options.rank, seed=options.seed
        ).result()
        tokenizer = training.get_tokenizer()
        for step in range(options.steps + 1):
            started = time.perf_counter()
            # The weights as they are now: what is sampled is what is trained.
            sampling = training.save_weights_and_get_sampling_client().result()
            if step % options.eval_every == 0 or step == options.steps:
                history.held_out[step] = mean_reward(
                    sample(sampling, tokenizer, held_out, SAMPLES_PER_HELD_OUT, options.seed)
                )
                print(f"after {step} steps: held-out reward {history.held_out[step]:.3f}")
            if step == options.steps:
                break
            problems = [draw_new_problem(rng, held_out) for _ in range(options.prompts)]
            groups = sample(sampling, tokenizer, problems, options.samples, options.seed + 1 + step)
            history.trained[step] = mean_reward(groups)
            data = [datum for group in groups for datum in group_data(group)]
            # else all samples of each prompt got the same, and there is nothing to learn from
            if data:
                # Both calls are queued before either is waited for.
                forward_backward = training.forward_backward(data, options.loss)
                optim = training.optim_step(types.AdamParams(learning_rate=options.learning_rate))
                forward_backward.result()
                optim.result()
            seconds = time.perf_counter() - started
            print(
                f"step {step:3d}  reward {history.trained[step]:.3f}  trained on {len(data)} "
                f" {seconds:.2f} s",
                flush=True,
            )
    if options.plot:
        plot(options.plot, history)
    return history


def draw_new_problem(rng: random.Random, held_out: list[Problem]) -> Problem:
    """Draw a problem to train on."""
    while (problem := draw_problem(rng, rng.choice(ANSWERS))) in held_out:
        pass
    return problem


def draw_problem(rng: random.Random, answer: str) -> Problem:
    """Hide ``answer`` among other letters."""
    letters = rng.choices(OTHER_LETTERS, k=NUM_LETTERS - 1)
    letters.insert(rng.randrange(NUM_LETTERS), answer)
    return Problem(f"{''.join(letters)}? ", answer)


def sample(
    sampling: Any, tokenizer: Any, problems: list[Problem], num_samples: int, seed: int
) -> list[list[Rollout]]:
    """Answer each problem several times. All prompts are queued before the first answer is
    waited for.
    """
    prompts = [tokenizer.encode(problem.prompt) for problem in problems]
    futures = []
    for number, prompt in enumerate(prompts):
        # One token is an answer. Each prompt has a seed of its own: with the same, their samples
        # would share their randomness.
        params = types.SamplingParams(max_tokens=1, temperature=1.0, seed=1000 * seed + number)
        model_input = types.ModelInput.from_ints(prompt)
        futures.append(
            sampling.sample(prompt=model_input, num_samples=num_samples, sampling_params=params)
        )
    groups = []
    for problem, prompt, future in zip(problems, prompts, futures, strict=True):
        group = []
        for sequence in future.result().sequences:
            reward = float(tokenizer.decode(sequence.tokens) == problem.answer)
            group.append(Rollout(prompt, list(sequence.tokens), list(sequence.logprobs), reward))
        groups.append(group)
    return groups


def group_data(group: list[Rollout]) -> list[Any]:
    """The advantage is the reward less the mean of the prompt's own samples; a group that got
    the same throughout has none.
    """
    baseline = mean_reward([group])
    if all(rollout.reward == baseline for rollout in group):
        return []
    return [make_datum(rollout, rollout.reward - baseline) for rollout in group]


def make_datum(rollout: Rollout, advantage: float) -> Any:
    """Position i reads token i and predicts token i + 1; on the prompt's own tokens the
    advantage is 0.
    """
    tokens, num_given = rollout.prompt + rollout.tokens, len(rollout.prompt) - 1
    return types.Datum(
        model_input=types.ModelInput.from_ints(tokens[:-1]),
        loss_fn_inputs={
            "target_tokens": tokens[1:],
            "logprobs": [0.0] * num_given + rollout.logprobs,
            "advantages": [0.0] * num_given + [advantage] * len(rollout.tokens),
        },
    )


def mean_reward(groups: list[list[Rollout]]) -> float:
    return statistics.fmean(rollout.reward for group in groups for rollout in group)


def plot(path: Path, history: History) -> None:
    """Draw both rewards, and the line that a policy must pass to have read its prompt."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.0), dpi=120, layout="constrained")
    axes = figure.subplots()
    axes.plot(
        *zip(*history.trained.items(), strict=True),
        color="tab:gray",
        linewidth=1,
        label="prompts of the step",
    )
    axes.plot(
        *zip(*history.held_out.items(), strict=True),
        color="tab:blue",
        marker="o",
        label="held-out prompts",
    )
    axes.axhline(
        history.blind, color="tab:red", linestyle="--", label="best policy that ignores the prompt"
    )
    axes.set(xlabel="optimiser steps", ylabel="mean reward", ylim=(0, 1.02))
    axes.legend(loc="lower right")
    figure.savefig(path)
    print(f"plot: {path}")


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
    add("--rank", type=int, default=32, help="of the adapter [%(default)s]")
    add("--steps", type=int, default=50, help="default: %(default)s")
    add("--prompts", type=int, default=32, help="per step [%(default)s]")
    add("--samples", type=int, default=16, help="per prompt [%(default)s]")
    add("--loss", default="importance_sampling", help="or ppo, cispo [%(default)s]")
    add("--learning-rate", type=float, default=5e-4, help="default: %(default)s")
    add("--eval-every", type=int, default=5, help="steps [%(default)s]")
    add("--plot", type=Path, help="PNG to draw the rewards to")
    add("--seed", type=int, default=0, help="of adapter, prompts and samples [%(default)s]")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()

"""What the service costs and saves, as ratios of interleaved rounds: ``python
scripts/bench/service.py [adapters|sampling|server …]``.

Run it on an idle machine: beside another busy process OpenMP's barriers make small products many
times slower.
"""

from __future__ import annotations

import argparse
import functools
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import torch
from rich.console import Console
from rich.table import Table
from steps import make_model

import lorakit
from lorakit import types
from lorakit.lora.bank import AdapterBank
from lorakit.model.attention import attend_by_document
from lorakit.model.load import load_model, load_tokenizer
from lorakit.sampling.request import Request
from lorakit.sampling.sampler import Sampler
from lorakit.types import SamplingParams

SEED = 0


def compare(contenders: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Return each contender's figure in each round, in which they take turns; one round before
    does not count.
    """
    found: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(rounds + 1):
        for name, run in contenders.items():
            figure = run()
            if number:
                found[name].append(figure)
    return found


def show(title: str, found: dict[str, list[float]], unit: str) -> None:
    """Print medians, spreads, and ratios to the first contender, round by round."""
    table = Table(title=title, title_justify="left")
    for column in ("contender", unit, "smallest to largest", "ratio to the first (each round)"):
        table.add_column(column)
    first = next(iter(found.values()))
    for name, figures in found.items():
        ratios = ", ".join(f"{own / other:.2f}" for own, other in zip(figures, first, strict=True))
        table.add_row(
            name,
            f"{statistics.median(figures):,.1f}",
            f"{min(figures):,.1f} to {max(figures):,.1f}",
            ratios,
        )
    Console().print(table)


# ---- many adapters on one base


def adapters(rounds: int, folder: Path) -> None:
    """Eight adapters with one 64-token Datum per call: all at once, against one client after the
    other.
    """
    with lorakit.ServiceClient(folder=folder / "adapters", accelerator="cpu") as service:
        clients = [service.create_lora_training_client("tiny", rank=32, seed=n) for n in range(8)]
        draw = random.Random(SEED)
        tokens = [[draw.randrange(256) for _ in range(65)] for _ in clients]
        data = [
            types.Datum(
                types.ModelInput.from_ints(t[:-1]), {"target_tokens": t[1:], "weights": [1.0] * 64}
            )
            for t in tokens
        ]
        runner = clients[0]._model.engine.worker.runner

        def together() -> float:
            began, calls = time.perf_counter(), 20
            for _ in range(calls):
                for future in [
                    c.forward_backward([d], "cross_entropy")
                    for c, d in zip(clients, data, strict=True)
                ]:
                    future.result()
            return calls * 8 * 64 / (time.perf_counter() - began)

        def one_by_one() -> float:
            began, calls = time.perf_counter(), 20
            for client, datum in zip(clients, data, strict=True):
                for _ in range(calls):
                    client.forward_backward([datum], "cross_entropy").result()
                time.sleep(1.1)  # so that nobody waits for the one before
            return calls * 8 * 64 / (time.perf_counter() - began - 8 * 1.1)

        found = compare({"one after the other": one_by_one, "eight together": together}, rounds)
        before = runner.num_passes
        together()
        show(
            f"eight adapters, tiny model: {(runner.num_passes - before) / 20:.1f} base forwards for"
            " 8 calls",
            found,
            "tokens/s",
        )


# ---- sampling


def sampling(rounds: int, folder: Path) -> None:
    """64 requests of 8 to 256 prompt and 8 to 256 new tokens, stop tokens off, against
    transformers; useful tokens counted.
    """
    for name, model in (
        ("tiny", load_model("tiny")),
        ("91 M", make_model("moe", torch.float32).eval().requires_grad_(False)),
    ):
        assert attend_by_document(model) is None
        tokenizer, draw = load_tokenizer("tiny"), random.Random(SEED)
        asked = [
            ([draw.randrange(256) for _ in range(draw.randint(8, 256))], draw.randint(8, 256))
            for _ in range(64)
        ]
        useful = sum(count for _, count in asked)
        # one for all rounds, as the service has it
        sampler = Sampler(model, tokenizer, bank=AdapterBank(model))
        contenders: dict[str, Callable[[], float]] = {
            "transformers, padded": functools.partial(useful_rate, _padded, model, asked),
            "lorakit": functools.partial(useful_rate, _rows, sampler, asked),
        }
        found = compare(contenders, rounds if name == "tiny" else max(1, rounds // 2))
        show(f"sampling, {name}: {useful:,} useful tokens, float32", found, "tokens/s")
        if name == "tiny":
            try:
                model.set_attn_implementation("sdpa")
                rate = useful_rate(_continuous, model, asked)
                print(
                    f"transformers, continuous batching (generate_batch), once: {rate:,.0f}"
                    " tokens/s"
                )
            except Exception as error:
                print(
                    f"transformers' generate_batch does not run here: {type(error).__name__}:"
                    f" {str(error)[:200]}"
                )


def useful_rate(run: Callable[..., None], model: Any, asked: list[tuple[list[int], int]]) -> float:
    began = time.perf_counter()
    run(model, asked)
    return sum(count for _, count in asked) / (time.perf_counter() - began)


@torch.no_grad()
def _padded(model: Any, asked: list[tuple[list[int], int]]) -> None:
    from transformers import GenerationConfig

    width = max(len(prompt) for prompt, _ in asked)
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt, _ in asked])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt, _ in asked])
    config = GenerationConfig(
        max_new_tokens=max(n for _, n in asked), do_sample=False, pad_token_id=0, eos_token_id=None
    )
    model.generation_config = GenerationConfig()
    model.generate(input_ids=ids, attention_mask=mask, generation_config=config)


def _rows(sampler: Sampler, asked: list[tuple[list[int], int]]) -> None:
    for prompt, count in asked:
        sampler.add(Request(prompt, SamplingParams(max_tokens=count, temperature=0.0, stop=[])))
    while sampler.is_busy:
        sampler.step()


def _continuous(model: Any, asked: list[tuple[list[int], int]]) -> None:
    from transformers import GenerationConfig

    config = GenerationConfig(
        max_new_tokens=max(n for _, n in asked), do_sample=False, pad_token_id=0, eos_token_id=None
    )
    model.generate_batch(inputs=[prompt for prompt, _ in asked], generation_config=config)


# ---- the server


def server(rounds: int, folder: Path) -> None:
    """What a call costs through the SDK and HTTP above the same in process, and 1,000 queued
    samples from 8 threads.
    """
    command = [
        sys.executable,
        "-m",
        "lorakit",
        "serve",
        "--model",
        "tiny",
        "--data",
        str(folder / "data"),
        "--port",
        "8491",
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        while "programs for" not in process.stdout.readline():
            pass
        try:
            _measure_server(rounds, folder, process.pid)
        finally:
            process.terminate()


def _measure_server(rounds: int, folder: Path, pid: int) -> None:
    import tinker

    service = tinker.ServiceClient(
        base_url="http://127.0.0.1:8491", api_key=(folder / "data" / "api-key").read_text().strip()
    )
    local = lorakit.ServiceClient(folder=folder / "local", accelerator="cpu")
    tokens = list(range(5, 21))
    pairs = []
    for kind, client in (
        (types, local.create_lora_training_client("tiny", rank=8)),
        (tinker.types, service.create_lora_training_client("tiny", rank=8).result()),
    ):
        inputs = {"target_tokens": tokens[1:], "weights": [1.0] * 15}
        pairs.append(
            (
                client,
                [
                    kind.Datum(
                        model_input=kind.ModelInput.from_ints(tokens[:-1]), loss_fn_inputs=inputs
                    )
                ],
            )
        )

    def median_ms(client: Any, data: Any) -> float:
        times = []
        for _ in range(60):
            began = time.perf_counter()
            client.forward_backward(data, "cross_entropy").result()
            times.append(time.perf_counter() - began)
        return statistics.median(times) * 1e3

    calls = {
        name: lambda pair=pair: median_ms(*pair)
        for name, pair in zip(("in process", "SDK"), pairs, strict=True)
    }
    found = compare(calls, rounds)
    show("forward_backward of one small Datum, median of 60", found, "ms")
    samplers = [
        (types, local.create_sampling_client(base_model="tiny")),
        (tinker.types, service.create_sampling_client(base_model="tiny").result()),
    ]
    for new_tokens in (128, 16):
        used: list[float] = []

        def sample(
            kind: Any, client: Any, new_tokens: int = new_tokens, used: list[float] = used
        ) -> float:
            params = kind.SamplingParams(max_tokens=new_tokens, stop=[], temperature=1.0)
            prompts = [
                kind.ModelInput.from_ints([5 + (n * 7 + i) % 200 for i in range(64)])
                for n in range(1000)
            ]
            before, began = psutil.Process(pid).cpu_times(), time.perf_counter()
            with ThreadPoolExecutor(8) as pool:
                futures = list(pool.map(lambda prompt: client.sample(prompt, 1, params), prompts))
                assert all(
                    len(future.result().sequences[0].tokens) == new_tokens for future in futures
                )
            seconds, after = time.perf_counter() - began, psutil.Process(pid).cpu_times()
            used.append((after.user + after.system - before.user - before.system) / 1000 * 1e3)
            return 1000 * new_tokens / seconds

        rates = {
            name: lambda pair=pair: sample(*pair)
            for name, pair in zip(("in process", "SDK"), samplers, strict=True)
        }
        show(
            f"1,000 samples of 64 + {new_tokens} tokens from 8 threads",
            compare(rates, max(1, rounds // 2)),
            "tokens/s",
        )
        print(
            f"processor time of the server for each sample, generating included: {used[-1]:.2f} ms"
        )
    local.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", default=["adapters", "sampling", "server"])
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    parts = {"adapters": adapters, "sampling": sampling, "server": server}
    with tempfile.TemporaryDirectory() as folder:
        for name in options.parts:
            parts[name](options.rounds, Path(folder))


if __name__ == "__main__":
    main()

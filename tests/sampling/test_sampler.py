"""Requests that come and go: every sample is what it would be alone, and its log-probabilities
are the model's.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import make_model

from lorakit.errors import DataError
from lorakit.lora.adapter_batch import Adapter
from lorakit.lora.bank import AdapterBank
from lorakit.lora.flat_parameters import plan_layout
from lorakit.lora.inject import inject
from lorakit.lora.spec import LoRASpec
from lorakit.lora.state import load_adapter_state
from lorakit.model.attention import attend_by_document
from lorakit.model.load import load_model, load_tokenizer
from lorakit.sampling.cache import ROOM, cut_blocks
from lorakit.sampling.check import decoding_problem
from lorakit.sampling.generate import generate
from lorakit.sampling.request import Request
from lorakit.sampling.sampler import Sampler
from lorakit.types import SampleResponse, SamplingParams, TensorData

OPEN = SamplingParams(max_tokens=12, temperature=1.0, stop=[], seed=0)


class Text:
    """A tokenizer over a random model's vocabulary: one character a token, no EOS."""

    pad_token_id, eos_token_id = 0, None

    def decode(self, tokens: Sequence[int], **options: Any) -> str:
        return "".join(chr(48 + token) for token in tokens)


@pytest.fixture(scope="module")
def model() -> Any:
    made = make_model("llama")
    made.generation_config.eos_token_id = None
    assert attend_by_document(made) is None
    return made


@pytest.fixture(scope="module")
def tiny() -> tuple[Any, Any]:
    model = load_model("tiny")
    assert attend_by_document(model) is None
    return model, load_tokenizer("tiny")


def run(
    sampler: Sampler, requests: Sequence[Request], *, at_a_time: int | None = None
) -> list[SampleResponse]:
    """Answers in the order of the requests, of which ``at_a_time`` join before each step."""
    answers: dict[int, Any] = {}
    waiting = list(enumerate(requests))
    while waiting or sampler.is_busy:
        for number, request in waiting[:at_a_time]:
            request.done = lambda outcome, number=number: answers.__setitem__(number, outcome)
            sampler.add(request)
        waiting = [] if at_a_time is None else waiting[at_a_time:]
        sampler.step()
    return [answers[number] for number in range(len(requests))]


def prompts_of(count: int, seed: int = 0, longest: int = 30, vocab: int = 64) -> list[list[int]]:
    draw = random.Random(seed)
    return [
        [draw.randrange(3, vocab) for _ in range(draw.randint(1, longest))] for _ in range(count)
    ]


@torch.no_grad()
def scored(
    model: Any, prompt: list[int], tokens: list[int], temperature: float = 1.0
) -> list[float]:
    logits = (
        model(input_ids=torch.tensor([prompt + tokens]), use_cache=False).logits[0].float()
        / temperature
    )
    places = torch.arange(len(prompt) - 1, len(prompt) + len(tokens) - 1)
    return logits.log_softmax(-1)[places, torch.tensor(tokens)].tolist()


def test_a_sample_does_not_depend_on_its_company(model: Any) -> None:
    prompts = prompts_of(40)
    wanted = [
        replace(OPEN, max_tokens=4 + n % 13, seed=n, temperature=(1.0, 0.7, 0.0)[n % 3])
        for n in range(40)
    ]
    alone = [
        run(Sampler(model, Text()), [Request(p, w)])[0].sequences[0]
        for p, w in zip(prompts, wanted, strict=True)
    ]
    order = random.Random(1).sample(range(40), 40)
    sampler = Sampler(model, Text(), max_rows=9)
    together = run(sampler, [Request(prompts[n], wanted[n]) for n in order], at_a_time=2)
    for n, response in zip(order, together, strict=True):
        assert response.sequences[0].tokens == alone[n].tokens
        assert np.allclose(response.sequences[0].logprobs, alone[n].logprobs, atol=1e-5)
    assert sampler.num_generated == sum(len(sample.tokens) for sample in alone)
    assert sampler.cache.num_bytes == 0  # given back


def test_prompts_to_score_are_not_all_done_in_one_step(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lorakit.sampling.sampler.MAX_PREFILL_TOKENS", 40)
    sampler, answers = Sampler(model, Text()), []
    for prompt in prompts_of(12):
        request = Request(
            prompt, replace(OPEN, max_tokens=0), scores_prompt=True, done=answers.append
        )
        sampler.add(request)
    sampler.step()
    assert 0 < len(answers) < 12
    while sampler.is_busy:
        sampler.step()
    assert len(answers) == 12


def test_rows_that_would_change_one_anothers_positions_are_refused() -> None:
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    model = make_model("llama")
    model.config.rope_parameters = rope
    model.config.original_max_position_embeddings = 16
    sampler = Sampler(model, Text())
    with pytest.raises(DataError, match="takes 16"):
        sampler.add(Request(list(range(3, 21)), OPEN))


@pytest.mark.slow
def test_of_a_thousand_requests_in_random_company_at_most_one_differs(
    tiny: tuple[Any, Any],
) -> None:
    model, tokenizer = tiny
    prompts = prompts_of(1000, longest=40, vocab=256)
    wanted = [replace(OPEN, max_tokens=16, seed=n) for n in range(1000)]
    found = []
    for seed, rows in ((0, 3), (1, 64)):
        order = random.Random(seed).sample(range(1000), 1000)
        answers = run(
            Sampler(model, tokenizer, max_rows=rows),
            [Request(prompts[n], wanted[n]) for n in order],
            at_a_time=7,
        )
        found.append(
            {n: answer.sequences[0].tokens for n, answer in zip(order, answers, strict=True)}
        )
    differing = [n for n in range(1000) if found[0][n] != found[1][n]]
    assert len(differing) <= 1


def test_batch_invariant_logprobs_are_the_same_to_the_bit_sampled_and_scored() -> None:
    base = make_model("qwen3_moe")
    base.generation_config.eos_token_id = None
    bank, layout = AdapterBank(base), plan_layout(base, LoRASpec(rank=4, unembedding=True))
    assert attend_by_document(base) is None
    adapter = Adapter(
        layout, torch.randn(layout.num_params, generator=torch.Generator().manual_seed(0)) * 0.05
    )
    prompts = prompts_of(6)
    sampler = Sampler(base, Text(), bank=bank, batch_invariant=True)
    asked = [
        Request(p, replace(OPEN, seed=n), adapter=adapter, num_samples=2)
        for n, p in enumerate(prompts)
    ]
    answers = run(sampler, asked, at_a_time=2)
    scoring = [
        Request(
            prompt + sample.tokens, replace(OPEN, max_tokens=0), adapter=adapter, scores_prompt=True
        )
        for prompt, answer in zip(prompts, answers, strict=True)
        for sample in answer.sequences
    ]
    scored_again = run(Sampler(base, Text(), bank=bank, batch_invariant=True), scoring[::-1])[::-1]
    sampled = [
        (prompt, sample)
        for prompt, answer in zip(prompts, answers, strict=True)
        for sample in answer.sequences
    ]
    for (prompt, sample), answer in zip(sampled, scored_again, strict=True):
        assert (
            answer.prompt_logprobs is not None
            and answer.prompt_logprobs[len(prompt) :] == sample.logprobs
        )
    plain = run(Sampler(base, Text(), bank=bank), asked)
    assert [[one.tokens for one in answer.sequences] for answer in plain] == [
        [one.tokens for one in answer.sequences] for answer in answers
    ]


@pytest.mark.parametrize("temperature", [1.0, 0.5, 0.0])
def test_logprobs_are_those_of_the_distribution_that_temperature_makes(
    model: Any, temperature: float
) -> None:
    prompts = prompts_of(5)
    answers = run(
        Sampler(model, Text()),
        [Request(p, replace(OPEN, temperature=temperature)) for p in prompts],
    )
    for prompt, answer in zip(prompts, answers, strict=True):
        sample = answer.sequences[0]
        assert np.allclose(
            sample.logprobs, scored(model, prompt, sample.tokens, temperature or 1.0), atol=1e-4
        )


def test_several_adapters_and_the_base_at_once_are_each_alone(model: Any) -> None:
    base = make_model("qwen3_moe")
    base.generation_config.eos_token_id = None
    bank = AdapterBank(base)
    assert attend_by_document(base) is None
    adapters: list[Adapter | None] = [None]
    for rank in (4, 2, 6):
        layout = plan_layout(base, LoRASpec(rank=rank, unembedding=True))
        vector = (
            torch.randn(layout.num_params, generator=torch.Generator().manual_seed(rank)) * 0.05
        )
        adapters.append(Adapter(layout, vector))
    prompts = prompts_of(16)
    requests = [
        Request(prompt, replace(OPEN, temperature=0.0), adapter=adapters[n % 4], scores_prompt=True)
        for n, prompt in enumerate(prompts)
    ]
    answers = run(Sampler(base, Text(), bank=bank), requests, at_a_time=3)
    for number, adapter in enumerate(adapters):
        plain = make_model("qwen3_moe")
        if adapter is not None:
            plain = inject(plain, adapter.layout.spec)
            load_adapter_state(
                plain, adapter.layout.file_tensors(adapter.vector), source="the bank's"
            )
            plain.eval()
        for n in range(number, 16, 4):
            sample = answers[n].sequences[0]
            assert np.allclose(sample.logprobs, scored(plain, prompts[n], sample.tokens), atol=1e-4)
            assert answers[n].prompt_logprobs is not None
            expected = scored(plain, prompts[n][:1], prompts[n][1:]) if len(prompts[n]) > 1 else []
            assert np.allclose(answers[n].prompt_logprobs[1:], expected, atol=1e-4)


def test_samples_of_one_prompt_differ_and_the_prompt_is_computed_once(model: Any) -> None:
    prompt = prompts_of(1, longest=20)[0]
    sampler = Sampler(model, Text(), max_rows=8)
    (answer,) = run(sampler, [Request(prompt, replace(OPEN, max_tokens=6), num_samples=20)])
    assert (
        len(answer.sequences) == 20
        and len({tuple(sample.tokens) for sample in answer.sequences}) > 15
    )
    # as rows fall free: a prefill and five tokens, three times
    assert sampler.passes.num_forwards == 3 * (1 + 5)
    alone = run(
        Sampler(model, Text()), [Request(prompt, replace(OPEN, max_tokens=6), first_number=7)]
    )[0]
    assert alone.sequences[0].tokens == answer.sequences[7].tokens


def test_equal_prompts_of_several_requests_are_computed_once(model: Any) -> None:
    prompt, sampler = prompts_of(1)[0], Sampler(model, Text())
    widths: list[int] = []
    handle = model.register_forward_pre_hook(
        lambda module, args, kwargs: widths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    answers = run(sampler, [Request(prompt, replace(OPEN, seed=n)) for n in range(5)])
    handle.remove()
    assert (
        widths[0] == len(prompt)
        and len({tuple(answer.sequences[0].tokens) for answer in answers}) > 1
    )


def test_what_the_prompt_says_of_its_own_tokens(model: Any) -> None:
    prompt = [5, 9, 3, 30, 31]
    targets = TensorData([[9, 4], [3, -1], [-1, -1], [31, 6]], dtype="int64")
    request = Request(
        prompt,
        replace(OPEN, max_tokens=0),
        scores_prompt=True,
        num_best_of_prompt=64,
        prompt_targets=targets,
        num_alternatives=3,
    )
    (answer,) = run(Sampler(model, Text()), [request])
    assert answer.sequences == []
    with torch.no_grad():
        expected = (
            model(input_ids=torch.tensor([prompt]), use_cache=False)
            .logits[0]
            .float()
            .log_softmax(-1)
        )
    assert answer.prompt_logprobs is not None and answer.prompt_logprobs[0] is None
    assert np.allclose(answer.prompt_logprobs[1:], scored(model, prompt[:1], prompt[1:]), atol=1e-4)
    assert answer.topk_prompt_logprobs is not None and answer.topk_prompt_logprobs[0] is None
    for place, best in enumerate(answer.topk_prompt_logprobs[1:]):
        assert best is not None and len(best) == 64  # the whole vocabulary: there is no cap
        values, tokens = expected[place].sort(descending=True)
        assert [token for token, _ in best][:5] == tokens[:5].tolist()
        assert np.allclose([value for _, value in best], values, atol=1e-4)
    assert answer.target_prompt_logprobs is not None
    wanted = (
        expected[:4]
        .gather(1, torch.from_numpy(targets.to_numpy()).clamp(min=0))
        .masked_fill(torch.from_numpy(targets.to_numpy()) < 0, 0.0)
    )
    assert np.allclose(answer.target_prompt_logprobs, wanted, atol=1e-4)
    tokens, logprobs = answer.prompt_alt_tokens or (None, None)
    assert tokens is not None and tokens.shape == (4, 3)
    assert np.allclose(
        logprobs, expected[:4].gather(1, torch.from_numpy(np.array(tokens))), atol=1e-4
    )


def test_candidates_are_named_for_each_generated_token(model: Any) -> None:
    requests = [Request([5, 9], replace(OPEN, temperature=0.0), num_best=num) for num in (0, 3, 64)]
    none, three, all_of_them = (
        answer.sequences[0] for answer in run(Sampler(model, Text()), requests)
    )
    assert (
        none.topk_logprobs is None
        and three.topk_logprobs is not None
        and all_of_them.topk_logprobs is not None
    )
    for token, logprob, best, whole in zip(
        three.tokens,
        three.logprobs or (),
        three.topk_logprobs,
        all_of_them.topk_logprobs,
        strict=True,
    ):
        assert len(best) == 3 and len(whole) == 64
        assert best[0][0] == token and best[0][1] == pytest.approx(logprob, abs=1e-5)
        assert np.exp([value for _, value in whole]).sum() == pytest.approx(1.0, abs=1e-4)


def test_what_ends_a_sample(tiny: tuple[Any, Any]) -> None:
    model, tokenizer = tiny
    prompt = tokenizer.encode("copy: abc\n")
    free = run(
        Sampler(model, tokenizer),
        [Request(prompt, SamplingParams(max_tokens=20, temperature=0.0, stop=[]))],
    )[0]
    tokens = free.sequences[0].tokens
    assert len(tokens) == 20 and free.sequences[0].stop_reason == "length"
    by_token = SamplingParams(max_tokens=20, temperature=0.0, stop=[tokens[2]])
    ended = run(Sampler(model, tokenizer), [Request(prompt, by_token)])[0].sequences[0]
    assert ended.tokens == tokens[: tokens.index(tokens[2]) + 1] and ended.stop_reason == "stop"
    text = tokenizer.decode(tokens[:3])
    by_text = run(Sampler(model, tokenizer), [Request(prompt, replace(by_token, stop=[text[1:]]))])[
        0
    ].sequences[0]
    assert by_text.stop_reason == "stop" and by_text.text == text[: text.find(text[1:])]
    whole = run(
        Sampler(model, tokenizer),
        [Request(prompt, SamplingParams(max_tokens=None, temperature=0.0))],
    )[0].sequences[0]
    assert whole.stop_reason == "stop" and whole.tokens[-1] == tokenizer.eos_token_id


def test_samples_of_one_request_wait_for_the_cache_too(model: Any) -> None:
    sampler, answers = Sampler(model, Text(), max_cache_tokens=4 * ROOM), []
    sampler.add(Request([5, 9], OPEN, num_samples=20, done=answers.append))
    while sampler.is_busy:
        sampler.step()
        assert sampler.cache.num_rows * sampler.cache.room <= 4 * ROOM
    assert len(answers[0].sequences) == 20
    with pytest.raises(DataError, match="the model takes"):
        sampler.add(Request([5] * 300, OPEN))


def test_the_cache_stays_within_its_limit_whatever_came_before(model: Any) -> None:
    limit = 16 * ROOM
    sampler, answers = Sampler(model, Text(), max_cache_tokens=limit), []
    short = SamplingParams(max_tokens=4, temperature=0.0, stop=[])
    sampler.add(Request([5, 9], replace(short, max_tokens=20), done=answers.append))
    sampler.add(Request([5, 9], short, num_samples=12, done=answers.append))
    while sampler.is_busy:
        sampler.step()
        assert sampler.cache.num_rows * sampler.cache.room <= limit
        if len(sampler._rows) == 1 and len(answers) == 1:  # the long ones come while one is at work
            for number in range(3):
                sampler.add(
                    Request(
                        [7] * (5 + number), replace(short, max_tokens=5 * ROOM), done=answers.append
                    )
                )
            answers.append(None)
    whole = [answer.sequences[0].tokens for answer in answers if answer is not None]
    assert len(whole) == 5
    (alone,) = run(Sampler(model, Text()), [Request([5, 9], replace(short, max_tokens=20))])
    assert whole[1] == alone.sequences[0].tokens


def test_batch_invariant_scores_do_not_touch_a_sample_that_joins_with_them() -> None:
    base = make_model("llama")
    base.generation_config.eos_token_id = None
    assert attend_by_document(base) is None
    sample, score = (
        Request([5, 9, 3], OPEN),
        Request([7] * 12, replace(OPEN, max_tokens=0), scores_prompt=True),
    )
    alone = run(Sampler(base, Text(), batch_invariant=True), [sample])[0]
    together = run(Sampler(base, Text(), batch_invariant=True), [sample, score])[0]
    assert together.sequences[0].logprobs == alone.sequences[0].logprobs


def test_rows_wait_for_the_cache(model: Any) -> None:
    sampler = Sampler(model, Text(), max_cache_tokens=4 * ROOM)
    most = 0
    answers: list[Any] = []
    for prompt in prompts_of(12):
        sampler.add(Request(prompt, OPEN, done=answers.append))
    while sampler.is_busy:
        sampler.step()
        most = max(most, len(sampler._rows))
    assert len(answers) == 12 and most <= 4


def test_top_k_and_top_p_keep_to_their_candidates(model: Any) -> None:
    prompt = [5, 9, 3]
    with torch.no_grad():
        ranked = (
            model(input_ids=torch.tensor([prompt]), use_cache=False)
            .logits[0, -1]
            .float()
            .softmax(-1)
            .sort(descending=True)
        )
    shares = ranked.values.cumsum(0)
    for params, allowed in (
        (SamplingParams(max_tokens=1, top_k=5, seed=0, stop=[]), 5),
        (SamplingParams(max_tokens=1, top_p=0.5, seed=0, stop=[]), int((shares < 0.5).sum()) + 1),
    ):
        answer = run(
            Sampler(model, Text(), max_rows=512), [Request(prompt, params, num_samples=500)]
        )[0]
        drawn = {sample.tokens[0] for sample in answer.sequences}
        assert drawn <= set(ranked.indices[:allowed].tolist()) and len(drawn) > allowed // 2
        logprobs = {sample.tokens[0]: (sample.logprobs or [0.0])[0] for sample in answer.sequences}
        for token, logprob in logprobs.items():  # of the whole distribution
            assert logprob == pytest.approx(
                float(ranked.values[ranked.indices == token].log()), abs=1e-4
            )


def test_what_cannot_be_sampled_is_refused_with_its_reasons(model: Any) -> None:
    sampler = Sampler(model, Text())
    of_other_types: list[tuple[dict[str, Any], str]] = [
        ({"seed": "x"}, "seed='x'"),
        ({"stop": 5}, "stop=5"),
        ({"stop": [{}]}, "stop="),
    ]
    bad = [
        (Request([], OPEN), "empty"),
        (Request([5, 64], OPEN), r"prompt\[1\] is token 64"),
        (Request([-1], OPEN), "token -1"),
        (Request([5], OPEN, num_samples=0), "num_samples=0"),
        (Request([5], OPEN, num_best=-1), "num_best=-1"),
        (Request([5], OPEN, num_best_of_prompt=65), "num_best_of_prompt=65"),
        (Request([5], OPEN, num_alternatives=1000), "num_alternatives=1000"),
        *((Request([5], replace(OPEN, **wrong)), message) for wrong, message in of_other_types),
        (Request([5], replace(OPEN, top_k=2**70)), "top_k"),
        (
            Request([5, 6], OPEN, prompt_targets=TensorData([[1.0]], dtype="float32")),
            "tokens they must be",
        ),
        (Request([5], replace(OPEN, temperature=float("nan"))), "temperature"),
        (Request([5], replace(OPEN, top_p=0.0)), "top_p"),
        (Request([5], replace(OPEN, top_k=0)), "top_k"),
        (Request([5], replace(OPEN, max_tokens=-1)), "max_tokens"),
        (Request([5] * 100_000, OPEN), "the model takes"),
        (
            Request([5, 6], OPEN, prompt_targets=TensorData([[1], [2]], dtype="int64")),
            "target_prompt_logprobs",
        ),
    ]
    for request, message in bad:
        with pytest.raises(DataError, match=message):
            sampler.add(request)
    assert not sampler.is_busy


def test_an_error_ends_all_and_later_requests_go_on(model: Any) -> None:
    sampler, answers = Sampler(model, Text(), max_rows=2), []
    for prompt in prompts_of(4):
        sampler.add(Request(prompt, OPEN, done=answers.append))
    sampler.step()
    sampler.fail_all(RuntimeError("gone"))
    assert [str(answer) for answer in answers] == ["gone"] * 4 and not sampler.is_busy
    assert len(run(sampler, [Request([5, 6], OPEN)])[0].sequences[0].tokens) == 12


@pytest.mark.parametrize("family", ["qwen3_next", "gemma2"])
def test_models_of_another_kind_are_sampled_by_transformers(family: str) -> None:
    model = make_model(family)
    model.generation_config.eos_token_id = None
    problem = attend_by_document(model) or decoding_problem(model)
    assert problem is not None
    samples = generate(
        model, Text(), [[5, 9, 3], [7]], SamplingParams(max_tokens=5, temperature=0.0)
    )
    tokens = [5, 9, 3]
    for _ in range(5):
        with torch.no_grad():
            tokens.append(
                int(model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0, -1].argmax())
            )
    assert samples[0].tokens == tokens[3:]


def test_rows_are_cut_into_blocks_where_reading_in_vain_costs_more_than_a_call() -> None:
    assert [(block.first, block.end) for block in cut_blocks([500, 490, 10, 9], 100)] == [
        (0, 2),
        (2, 4),
    ]
    assert [(block.first, block.end) for block in cut_blocks([500, 490, 10, 9], 10_000)] == [(0, 4)]
    for lengths in ([5], [1, 2, 3, 1000, 2], [7] * 9):
        blocks = cut_blocks(lengths, 50)
        rows = [row for block in blocks for row in range(block.first, block.end)]
        assert rows == list(range(len(lengths)))
        for block in blocks:
            assert block.longest == max(lengths[block.first : block.end])

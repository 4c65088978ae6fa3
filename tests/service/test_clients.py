"""The verbs in this process: values against independent ones, order, errors, and what is saved."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
from concurrent.futures import wait
from pathlib import Path
from typing import Any

import numpy as np
import preloaded
import pytest
import torch
from programs import PAIRS, make_data, train
from tiny_models import make_batches, make_trainer, sgd

import lorakit
from lorakit import types
from lorakit.errors import AdapterError, CheckpointError, ConfigError, DataError, TrainingError
from lorakit.lora.inject import inject
from lorakit.lora.spec import LoRASpec
from lorakit.lora.state import adapter_state, load_adapter_state
from lorakit.loss.preference import dpo
from lorakit.model.load import load_model
from lorakit.training.module import LoRAModule

# A step of AdamW with which weights move by exactly the gradient: g / (|g| + eps) * eps.
GRADIENT_STEP = types.AdamParams(learning_rate=1e5, beta1=0.0, beta2=0.0, eps=1e5)


@pytest.fixture
def client(service: lorakit.ServiceClient) -> lorakit.TrainingClient:
    return service.create_lora_training_client("tiny", rank=8, seed=1)


@pytest.fixture
def data(client: lorakit.TrainingClient) -> list[types.Datum]:
    return make_data(types, client.get_tokenizer())


def training_state_of(client: lorakit.TrainingClient) -> Any:
    return client._model.made()


def test_a_sampling_client_keeps_the_weights_it_was_made_with(
    client: lorakit.TrainingClient, data: list[types.Datum]
) -> None:
    prompt = data[0].model_input

    def scores(sampling: lorakit.SamplingClient) -> list[float]:
        return sampling.compute_logprobs(prompt).result()[1:]

    early = client.save_weights_and_get_sampling_client()
    before = scores(early)
    client.forward_backward(data, "cross_entropy").result()
    client.optim_step(types.AdamParams(learning_rate=0.05)).result()
    assert scores(early) == before
    assert scores(client.save_weights_and_get_sampling_client()) != before  # the control


def test_the_gradient_is_that_of_the_lightning_module_times_its_denominator(
    client: lorakit.TrainingClient, data: list[types.Datum], tmp_path: Path
) -> None:
    training_state = training_state_of(client)
    training_state.vector.add_(
        torch.randn(training_state.vector.shape, generator=torch.Generator().manual_seed(0)),
        alpha=0.02,
    )
    start = training_state.layout.file_tensors(training_state.vector.clone())

    def build() -> Any:
        model = inject(load_model("tiny"), LoRASpec(rank=8, unembedding=True))
        load_adapter_state(model, start, source="the client's")
        return model

    module = LoRAModule(build, optimizer=sgd(1.0), clip_norm=0.0)
    batches = make_batches(data, rows_each=1, accumulate=3)
    trainer = make_trainer(tmp_path, accumulate_grad_batches=3)
    trainer.fit(module, train_dataloaders=torch.utils.data.DataLoader(batches, batch_size=None))
    client.forward_backward(data, "cross_entropy").result()
    ours, after = (
        training_state.layout.file_tensors(training_state.gradient),
        adapter_state(module.model),
    )
    moved = {name: (start[name] - after[name]) * batches[0].window_weight for name in after}
    distance = sum(float((ours[name] - moved[name]).square().sum()) for name in ours) ** 0.5
    assert (
        distance
        < 1e-6
        * batches[0].window_weight
        * sum(float(t.square().sum()) for t in ours.values()) ** 0.5
    )


def test_gradients_add_up_until_the_step_and_forward_adds_none(
    client: lorakit.TrainingClient, data: list[types.Datum]
) -> None:
    client.forward_backward(data, "cross_entropy").result()
    once = training_state_of(client).gradient.clone()
    client.forward(data, "cross_entropy").result()
    assert torch.equal(training_state_of(client).gradient, once)
    client.forward_backward(data[:1], "cross_entropy").result()
    client.forward_backward(data[1:], "cross_entropy").result()
    assert torch.allclose(
        training_state_of(client).gradient, 2 * once, atol=1e-5 * float(once.abs().max())
    )
    assert client.optim_step(types.AdamParams()).result().metrics["grad_norm"] > 0
    assert not training_state_of(client).gradient.any()


def test_scored_and_sampled_logprobs_equal_those_of_training(
    client: lorakit.TrainingClient, data: list[types.Datum]
) -> None:
    train(client, types, data, 3)
    computed = client.forward(data, "cross_entropy").result()
    sampling = client.save_weights_and_get_sampling_client()
    for datum, output in zip(data, computed.loss_fn_outputs, strict=True):
        tokens = [*datum.model_input.to_ints(), int(datum.targets[-1])]
        scored = sampling.compute_logprobs(types.ModelInput.from_ints(tokens)).result()
        assert scored[0] is None
        assert np.allclose(scored[1:], output["logprobs"], atol=1e-4)
    prompt = data[0].model_input
    sample = (
        sampling.sample(prompt, 1, types.SamplingParams(max_tokens=12, stop=[], seed=1))
        .result()
        .sequences[0]
    )
    whole = sampling.compute_logprobs(
        types.ModelInput.from_ints([*prompt.to_ints(), *sample.tokens])
    ).result()
    assert np.allclose(whole[prompt.length :], sample.logprobs, atol=1e-4)


def test_an_error_arrives_in_its_future_and_leaves_the_gradient(
    client: lorakit.TrainingClient, data: list[types.Datum]
) -> None:
    client.forward_backward(data, "cross_entropy").result()
    before = training_state_of(client).gradient.clone()
    nan = types.Datum(
        data[0].model_input,
        {"target_tokens": data[0].targets, "weights": [float("nan")] * len(data[0])},
    )
    wrong = [
        client.forward_backward([data[0], nan], "cross_entropy"),
        client.forward_backward([], "cross_entropy"),
        client.forward_backward(data, "crossentropy"),
        client.forward_backward(data, "ppo"),
        client.forward_backward(data, "cross_entropy", {"clip": 1.0}),
        client.load_state("tinker://nobody/weights/nothing"),
    ]
    after = client.forward(data, "cross_entropy")
    messages = []
    for future in wrong:
        with pytest.raises((DataError, CheckpointError)) as caught:
            future.result(60)
        messages.append(str(caught.value))
    assert "data[1].loss_fn_inputs['weights']" in messages[0] and "nan" in messages[0]
    assert "empty" in messages[1] and "cross_entropy, importance_sampling" in messages[2]
    assert (
        "data[0–2].loss_fn_inputs['advantages'] is missing" in messages[3]
        and "'weights'] is unknown" in messages[3]
    )
    assert after.result(60).metrics["loss:sum"] > 0
    assert torch.equal(training_state_of(client).gradient, before)


def test_a_gradient_that_is_not_finite_makes_no_step(
    client: lorakit.TrainingClient, data: list[types.Datum]
) -> None:
    training_state = training_state_of(client)
    before = training_state.vector.clone()
    training_state.gradient.fill_(float("inf"))
    with pytest.raises(TrainingError, match="not finite"):
        client.optim_step(types.AdamParams()).result(60)
    assert torch.equal(training_state.vector, before) and not training_state.gradient.any()
    client.forward_backward(data, "cross_entropy").result(60)
    client.optim_step(types.AdamParams()).result(60)


def test_adapters_of_several_clients_go_through_the_base_together(
    service: lorakit.ServiceClient,
) -> None:
    ranks = (4, 8, 3)
    clients = [service.create_lora_training_client("tiny", rank=rank, seed=rank) for rank in ranks]
    alone = [service.create_lora_training_client("tiny", rank=rank, seed=rank) for rank in ranks]
    data = make_data(types, clients[0].get_tokenizer())
    runner = clients[0]._model.engine.worker.runner
    for _ in range(2):
        futures = [
            one.forward_backward(data[n : n + 1], "cross_entropy") for n, one in enumerate(clients)
        ]
        together = [future.result() for future in futures]
        separate = [
            one.forward_backward(data[n : n + 1], "cross_entropy").result()
            for n, one in enumerate(alone)
        ]
        for ours, theirs in zip(together, separate, strict=True):
            assert np.allclose(
                ours.loss_fn_outputs[0]["logprobs"],
                theirs.loss_fn_outputs[0]["logprobs"],
                atol=1e-5,
            )
        for ours, theirs in zip(clients, alone, strict=True):
            scale = float(training_state_of(theirs).gradient.abs().max())
            assert torch.allclose(
                training_state_of(ours).gradient,
                training_state_of(theirs).gradient,
                atol=1e-5 * scale,
            )
        for one in (*clients, *alone):
            one.optim_step(types.AdamParams(learning_rate=1e-3)).result()
    before = runner.num_passes
    blocked, go = threading.Event(), threading.Event()

    def block() -> None:
        blocked.set()
        go.wait(60)

    clients[0]._model.engine.submit("nobody", "wait", block)
    blocked.wait(60)
    # all wait when the engine is free again
    futures = [one.forward_backward(data, "cross_entropy") for one in clients]
    go.set()
    wait([future.future() for future in futures], 60)
    assert runner.num_passes == before + 1


def test_an_adapter_that_is_not_finite_spoils_no_other(service: lorakit.ServiceClient) -> None:
    clients = [service.create_lora_training_client("tiny", rank=4, seed=n) for n in range(2)]
    data = make_data(types, clients[0].get_tokenizer())
    expected = clients[0].forward_backward(data, "cross_entropy").result()
    gradient = training_state_of(clients[0]).gradient.clone()
    training_state_of(clients[0]).gradient.zero_()
    training_state_of(clients[1]).vector.fill_(1e30)
    futures = [one.forward_backward(data, "cross_entropy") for one in clients]
    good, bad = (future.result(60) for future in futures)
    assert good.metrics["loss:sum"] == pytest.approx(expected.metrics["loss:sum"], rel=1e-6)
    assert not np.isfinite(bad.metrics["loss:sum"])
    assert torch.allclose(
        training_state_of(clients[0]).gradient, gradient, atol=1e-5 * float(gradient.abs().max())
    )


def test_a_cancelled_sample_ends_and_the_engine_rests(
    service: lorakit.ServiceClient, client: lorakit.TrainingClient
) -> None:
    sampling, engine = client.save_weights_and_get_sampling_client(), client._model.engine
    params = types.SamplingParams(max_tokens=1000, temperature=2.0, stop=[])
    futures = [sampling.sample(types.ModelInput.from_ints([5, 6]), 4, params) for _ in range(3)]
    while not engine._sampling:
        time.sleep(0.001)
    assert all(future.future().cancel() for future in futures)
    deadline = time.monotonic() + 20
    while (engine._sampling or engine.worker.sampler.is_busy) and time.monotonic() < deadline:
        time.sleep(0.01)
    steps = engine.worker.sampler.passes.num_forwards
    time.sleep(0.2)
    assert (
        not engine._sampling
        and not engine.worker._requests
        and engine.worker.sampler.passes.num_forwards == steps
    )
    short = types.SamplingParams(max_tokens=2, stop=[])
    assert (
        len(
            sampling.sample(types.ModelInput.from_ints([5, 6]), 1, short)
            .result(60)
            .sequences[0]
            .tokens
        )
        == 2
    )


def test_an_adapter_that_is_not_finite_is_not_sampled(client: lorakit.TrainingClient) -> None:
    training_state_of(client).vector[5] = float("nan")
    with pytest.raises(CheckpointError, match="not finite"):
        client.save_weights_and_get_sampling_client()


def test_memory_grows_by_an_adapter_and_its_optimiser_alone(
    service: lorakit.ServiceClient, client: lorakit.TrainingClient, data: list[types.Datum]
) -> None:
    def held_bytes() -> int:
        gc.collect()
        for _ in range(2):  # snapshots that nobody holds go behind a call
            service._service.engine("tiny").submit("", "wait", lambda: None).result()
        storages = {
            t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
            for t in gc.get_objects()
            if is_tensor(t)
        }
        return sum(storages.values())

    def is_tensor(found: Any) -> bool:
        return issubclass(type(found), torch.Tensor) and found.device.type == "cpu"

    def work(one: lorakit.TrainingClient) -> None:
        one.forward_backward(data, "cross_entropy").result()
        one.optim_step(types.AdamParams(learning_rate=1e-3)).result()
        one.save_weights_and_get_sampling_client().compute_logprobs(data[0].model_input).result()

    work(client)
    before, clients, num_params = held_bytes(), [], 0
    for seed, rank in enumerate((8, 16, 4)):
        clients.append(service.create_lora_training_client("tiny", rank=rank, seed=seed))
        work(clients[-1])
        num_params += training_state_of(clients[-1]).layout.num_params
    grown = held_bytes() - before  # numbers, gradient and two moments, 4 bytes each
    assert 0.99 * 16 * num_params < grown < 1.01 * 16 * num_params + 10_000


def test_snapshots_that_nobody_holds_are_forgotten(
    client: lorakit.TrainingClient, data: list[types.Datum]
) -> None:
    worker = client._model.engine.worker
    for _ in range(5):
        client.save_weights_and_get_sampling_client()
    gc.collect()
    client.forward(data, "cross_entropy").result()
    client.forward(data, "cross_entropy").result()
    assert not worker.snapshots


def test_a_state_of_another_scale_is_refused(tmp_path: Path) -> None:
    paths = []
    for alpha in (32.0, 8.0):
        with lorakit.ServiceClient(folder=tmp_path, accelerator="cpu", lora_alpha=alpha) as service:
            client = service.create_lora_training_client("tiny", rank=4)
            paths.append(client.save_state("a").result().path)
            if alpha == 8.0:
                with pytest.raises(CheckpointError, match="scale"):
                    client.load_state(paths[0]).result()
                assert (
                    training_state_of(
                        service.create_training_client_from_state(paths[0])
                    ).layout.spec.scale
                    == 8.0
                )


def test_many_datums_are_cut_into_passes_without_a_change(tmp_path: Path) -> None:
    found = []
    for max_pass_tokens in (16_384, 100):
        with lorakit.ServiceClient(
            folder=tmp_path / str(max_pass_tokens),
            accelerator="cpu",
            max_pass_tokens=max_pass_tokens,
        ) as service:
            client = service.create_lora_training_client("tiny", rank=4, seed=1)
            data = make_data(types, client.get_tokenizer(), PAIRS * 3)
            output = client.forward_backward(data, "cross_entropy").result()
            found.append(
                (
                    output,
                    training_state_of(client).gradient.clone(),
                    client._model.engine.worker.runner.num_passes,
                )
            )
    (whole, gradient, one), (cut, cut_gradient, several) = found
    assert one == 1 and several > 3
    for ours, theirs in zip(cut.loss_fn_outputs, whole.loss_fn_outputs, strict=True):
        assert np.allclose(ours["logprobs"], theirs["logprobs"], atol=1e-5)
    assert cut.metrics["loss:sum"] == pytest.approx(whole.metrics["loss:sum"], rel=1e-5)
    assert torch.allclose(cut_gradient, gradient, atol=1e-5 * float(gradient.abs().max()))


def test_a_saved_state_goes_on_to_the_same_bits(
    service: lorakit.ServiceClient, client: Any, data: list[types.Datum]
) -> None:
    train(client, types, data, 3)
    saved = client.save_state("three").result()
    assert saved.path == f"tinker://{client.model_id}/weights/three"
    expected = train(client, types, data, 3)
    other = service.create_training_client_from_state_with_optimizer(saved.path)
    assert train(other, types, data, 3) == expected
    fresh = service.create_training_client_from_state(saved.path)
    restarted = train(fresh, types, data, 3)
    assert restarted[0] == expected[0] and restarted[1:] != expected[1:]
    client.load_state_with_optimizer(saved.path).result()
    assert train(client, types, data, 3) == expected


def test_what_is_saved_is_a_peft_folder_that_peft_loads(
    service: lorakit.ServiceClient, client: Any, data: list[types.Datum]
) -> None:
    import peft

    train(client, types, data, 2)
    saved = client.save_weights_for_sampler("now").result()
    run_id, kind, name = saved.path.removeprefix("tinker://").split("/")
    folder = service._service.checkpoints._folder(run_id, kind, name)
    model = peft.PeftModel.from_pretrained(load_model("tiny"), str(folder)).eval()
    tokens = data[0].model_input.to_ints()
    with torch.no_grad():
        theirs = model(input_ids=torch.tensor([tokens])).logits.log_softmax(-1)[0, :-1]
    ours = (
        service.create_sampling_client(saved.path)
        .compute_logprobs(data[0].model_input)
        .result()[1:]
    )
    assert np.allclose(ours, theirs.gather(1, torch.tensor(tokens[1:])[:, None])[:, 0], atol=1e-4)
    from_folder = service.create_training_client_from_state(str(folder), base_model="tiny")
    assert torch.equal(training_state_of(from_folder).vector, training_state_of(client).vector)


def test_names_are_free_safe_and_not_written_over(
    service: lorakit.ServiceClient, client: Any
) -> None:
    client.save_state("once").result()
    with pytest.raises(CheckpointError, match="exists"):
        client.save_state("once").result()
    client.save_state("once", overwrite=True).result()
    for name in ("../up", "a/b", "", ".hidden", "x" * 200, "nul\0"):
        with pytest.raises(CheckpointError, match="name"):
            client.save_state(name).result()
    with pytest.raises((CheckpointError, AdapterError)):
        service.create_sampling_client("tinker://../../etc/weights/passwd")
    with pytest.raises((CheckpointError, AdapterError)):
        service.create_sampling_client("/etc")
    with pytest.raises(ConfigError):
        service.create_lora_training_client("no/such/model/at/all")
    with pytest.raises(ConfigError, match="nothing would be trained"):
        service.create_lora_training_client(
            "tiny", train_attn=False, train_mlp=False, train_unembed=False
        )


def test_runs_and_checkpoints_are_listed_with_what_they_cost_and_deleted(
    service: lorakit.ServiceClient, client: Any, data: list[types.Datum]
) -> None:
    train(client, types, data, 2)
    saved = client.save_state("kept").result()
    info, rest = client.get_info(), service.create_rest_client()
    assert (
        info.tokens == 2 * sum(map(len, data))
        and info.seconds > 0
        and info.num_steps == 2
        and info.lora_rank == 8
    )
    (run,) = rest.list_training_runs().result()
    assert run.id == client.model_id and run.tokens == info.tokens
    (checkpoint,) = rest.list_checkpoints(run.id).result()
    assert checkpoint.path == saved.path and checkpoint.size_bytes > 100_000
    rest.delete_checkpoint_from_tinker_path(saved.path).result()
    assert rest.list_checkpoints(run.id).result() == []
    with pytest.raises(CheckpointError, match="no checkpoint"):
        client.load_state(saved.path).result()


def test_every_spelling_of_waiting_works(
    service: lorakit.ServiceClient, client: Any, data: list[types.Datum]
) -> None:
    async def program() -> list[float]:
        first = await client.forward_backward(data, "cross_entropy")
        future = await client.forward_backward_async(data, "cross_entropy")
        second = await future
        third = await client.forward(data, "cross_entropy").result_async(60)
        await (await client.optim_step_async(types.AdamParams()))
        again = await service.create_lora_training_client("tiny", rank=8, seed=1)
        fourth = await asyncio.create_task(again.forward(data, "cross_entropy").coroutine())
        sampling = await client.save_weights_and_get_sampling_client_async()
        params = types.SamplingParams(max_tokens=2, temperature=0.0)
        assert len((await sampling.sample_async(data[0].model_input, 2, params)).sequences) == 2
        assert (await sampling.compute_logprobs_async(data[0].model_input))[0] is None
        return [output.metrics["loss:sum"] for output in (first, second, third, fourth)]

    losses = asyncio.run(program())
    assert losses == pytest.approx([losses[0]] * 4, rel=1e-6)
    blocked = threading.Event()
    client._model.engine.submit("nobody", "wait", lambda: blocked.wait(60))
    future = client.forward(data, "cross_entropy")
    with pytest.raises(TimeoutError):
        future.result(timeout=0.05)
    blocked.set()
    assert future.result(60).metrics["loss:sum"] > 0
    assert client.result() is client


def test_a_custom_loss_has_the_gradient_of_the_same_loss_built_in(tmp_path: Path) -> None:
    def negative_log_likelihood(data: Any, logprobs: Any) -> tuple[torch.Tensor, dict[str, float]]:
        terms = [
            (lp * torch.as_tensor(d.weights)).sum() for d, lp in zip(data, logprobs, strict=True)
        ]
        return -torch.stack(terms).sum(), {"terms": float(len(terms))}

    for max_pass_tokens in (16_384, 100):  # in one pass, and in two parts
        with lorakit.ServiceClient(
            folder=tmp_path / str(max_pass_tokens),
            accelerator="cpu",
            max_pass_tokens=max_pass_tokens,
        ) as service:
            custom, plain = (
                service.create_lora_training_client("tiny", rank=4, seed=1) for _ in range(2)
            )
            data = make_data(types, custom.get_tokenizer())
            ours = custom.forward_backward_custom(data, negative_log_likelihood).result()
            theirs = plain.forward_backward(data, "cross_entropy").result()
            assert ours.metrics["terms"] == 3.0
            assert ours.metrics["loss:sum"] == pytest.approx(theirs.metrics["loss:sum"], rel=1e-5)
            gradient = training_state_of(plain).gradient
            assert torch.allclose(
                training_state_of(custom).gradient,
                gradient,
                atol=1e-5 * float(gradient.abs().max()),
            )

            def broken(data: Any, logprobs: Any) -> Any:
                raise KeyError("mine")

            with pytest.raises(KeyError, match="mine"):
                custom.forward_backward_custom(data, broken).result()
            with pytest.raises(DataError, match="scalar tensor"):
                custom.forward_backward_custom(data, lambda data, logprobs: (1.0, {})).result()
            assert torch.allclose(
                training_state_of(custom).gradient,
                gradient,
                atol=1e-5 * float(gradient.abs().max()),
            )


@pytest.mark.parametrize("max_pass_tokens", [16_384, 100])
def test_a_loss_of_whole_distributions_has_the_gradient_of_soft_targets(
    tmp_path: Path, max_pass_tokens: int
) -> None:
    """Minus half the log-probability of each token of the vocabulary's first hundred: soft
    targets can say that too.
    """
    with lorakit.ServiceClient(
        folder=tmp_path, accelerator="cpu", max_pass_tokens=max_pass_tokens
    ) as service:
        custom, plain = (
            service.create_lora_training_client("tiny", rank=4, seed=1) for _ in range(2)
        )
        data = make_data(types, custom.get_tokenizer())
        seen: list[tuple[int, int, torch.Size]] = []

        def loss(number: int, first: int, logprobs: torch.Tensor) -> torch.Tensor:
            seen.append((number, first, logprobs.shape))
            return -0.5 * (number + 1) * logprobs[:, :100].sum()

        ours = custom.forward_backward_custom(data, loss, loss_type_input="vocabulary").result()
        soft = [
            types.Datum(
                datum.model_input,
                {
                    "target_tokens": np.tile(np.arange(100), (len(datum), 1)),
                    "weights": np.full((len(datum), 100), 0.5 * (number + 1)),
                },
            )
            for number, datum in enumerate(data)
        ]
        theirs = plain.forward_backward(soft, "cross_entropy").result()
        assert ours.metrics["loss:sum"] == pytest.approx(theirs.metrics["loss:sum"], rel=1e-5)
        gradient = training_state_of(plain).gradient
        assert torch.allclose(
            training_state_of(custom).gradient, gradient, atol=1e-5 * float(gradient.abs().max())
        )
        assert sorted(seen) == [
            (n, 0, torch.Size([len(datum), 288])) for n, datum in enumerate(data)
        ]
        expected = plain.forward(data, "cross_entropy").result()
        for output, other in zip(ours.loss_fn_outputs, expected.loss_fn_outputs, strict=True):
            assert np.allclose(output["logprobs"], other["logprobs"], atol=1e-5)
        with pytest.raises(DataError, match="scalar tensor"):
            custom.forward_backward_custom(
                data, lambda n, first, lp: 1.0, loss_type_input="vocabulary"
            ).result()


def test_dpo_prefers_what_was_chosen(client: lorakit.TrainingClient) -> None:
    tokenizer = client.get_tokenizer()
    pairs = [("cat", "at-cay"), ("cat", "xt-cxy"), ("dog", "og-day"), ("dog", "xg-dxy")]
    data = make_data(types, tokenizer, pairs)
    reference = [
        output["logprobs"]
        for output in client.forward(data, "cross_entropy").result().loss_fn_outputs
    ]
    accuracies = []
    for _ in range(8):
        computed = client.forward_backward_custom(data, dpo(reference, beta=0.5))
        client.optim_step(types.AdamParams(learning_rate=2e-3)).result()
        accuracies.append(computed.result().metrics["accuracy:mean"])
    assert accuracies[0] == 0.0 and accuracies[-1] == 1.0


def test_soft_targets_and_single_ones_go_together(
    client: lorakit.TrainingClient, data: list[types.Datum]
) -> None:
    first = data[0]
    soft = types.Datum(
        first.model_input,
        {
            "target_tokens": np.stack([first.targets, first.targets], axis=1),
            "weights": np.stack([0.25 * first.weights, 0.75 * first.weights], axis=1),
        },
    )
    hard = client.forward_backward([first, data[1]], "cross_entropy").result()
    gradient = training_state_of(client).gradient.clone()
    training_state_of(client).gradient.zero_()
    mixed = client.forward_backward([soft, data[1]], "cross_entropy").result()
    assert mixed.metrics["loss:sum"] == pytest.approx(hard.metrics["loss:sum"], rel=1e-5)
    assert mixed.loss_fn_outputs[0]["logprobs"].shape == (len(first), 2)
    assert mixed.loss_fn_outputs[1]["logprobs"].shape == (len(data[1]),)
    assert torch.allclose(
        training_state_of(client).gradient, gradient, atol=1e-5 * float(gradient.abs().max())
    )


def test_a_program_that_ends_with_work_in_flight_ends_well(tmp_path: Path) -> None:
    program = f"""
import lorakit
from lorakit import types
service = lorakit.ServiceClient(folder={str(tmp_path)!r}, accelerator="cpu")
training = service.create_lora_training_client("tiny", rank=4)
inputs = {{"target_tokens": [6, 7, 8], "weights": [1, 1, 1]}}
datum = types.Datum(types.ModelInput.from_ints([5, 6, 7]), inputs)
sampling = training.save_weights_and_get_sampling_client()
params = types.SamplingParams(max_tokens=50, stop=[])
kept = [sampling.sample(types.ModelInput.from_ints([5, 6, n]), 16, params) for n in range(32)]
kept += [training.forward_backward([datum] * 64, "cross_entropy") for _ in range(8)]
"""
    ran = preloaded.run(["-c", program], timeout=120)
    assert ran.returncode == 0 and "terminate called" not in ran.stderr, ran.stderr[-500:]


def test_closing_ends_what_waits_with_an_error(tmp_path: Path) -> None:
    service = lorakit.ServiceClient(folder=tmp_path / "service", accelerator="cpu")
    client = service.create_lora_training_client("tiny", rank=4)
    data = make_data(types, client.get_tokenizer())
    go = threading.Event()
    client._model.engine.submit("nobody", "wait", lambda: go.wait(60))
    waiting = client.forward_backward(data, "cross_entropy")
    closer = threading.Thread(target=service.close)
    closer.start()
    while not client._model.engine._is_closed:
        time.sleep(0.001)
    go.set()
    closer.join(60)
    with pytest.raises(TrainingError, match="ended"):
        waiting.result(10)
    with pytest.raises(TrainingError, match="ended"):
        client.forward_backward(data, "cross_entropy").result(10)

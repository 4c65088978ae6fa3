"""The real, unmodified SDK against `lorakit serve`: the verbs, values, errors, order."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from programs import PAIRS, make_data, train
from safetensors.torch import load_file
from serving import Server

import lorakit
from lorakit import types
from lorakit.service.http import schema


@pytest.fixture
def client(sdk: Any) -> Any:
    service = sdk.ServiceClient()
    yield service.create_lora_training_client("tiny", rank=8, seed=1).result()
    service.close("success")


def test_a_training_loop_is_the_one_in_process(
    sdk: Any, client: Any, service: lorakit.ServiceClient, server: Server, tmp_path: Path
) -> None:
    local = service.create_lora_training_client("tiny", rank=8, seed=1)
    theirs, ours = (
        make_data(sdk.types, client.get_tokenizer()),
        make_data(types, local.get_tokenizer()),
    )
    # A step of AdamW with which weights move by the gradient: so that gradients can be compared
    # through HTTP.
    paths = []
    for one, kind, data in ((client, sdk.types, theirs), (local, types, ours)):
        one.forward_backward(data, "cross_entropy").result()
        one.optim_step(kind.AdamParams(learning_rate=1e5, beta1=0.0, beta2=0.0, eps=1e5)).result()
        paths.append(one.save_weights_for_sampler("moved").result().path)
    folders = [server.folder / "data", service._service.database.folder]
    tensors = []
    for folder, path in zip(folders, paths, strict=True):
        run_id, kind, name = path.removeprefix("tinker://").split("/")
        where = folder / "checkpoints" / run_id.replace(":", "_") / kind / name
        tensors.append(load_file(where / "adapter_model.safetensors"))
    assert tensors[0].keys() == tensors[1].keys()
    largest = max(float(tensor.abs().max()) for tensor in tensors[0].values())
    assert (
        max(float((tensors[0][name] - tensors[1][name]).abs().max()) for name in tensors[0])
        < 1e-6 * largest
    )
    # AdamW makes much of little: of a gradient's rounding near 0 a whole step.
    assert train(client, sdk.types, theirs, 4, 1e-3) == pytest.approx(
        train(local, types, ours, 4, 1e-3), rel=1e-4
    )


def test_sampling_through_the_server_is_sampling_in_process(
    sdk: Any, client: Any, service: lorakit.ServiceClient
) -> None:
    local = service.create_lora_training_client("tiny", rank=8, seed=1)
    tokens = client.get_tokenizer().encode("copy: abc\n")
    samplers = [
        client.save_weights_and_get_sampling_client().result(),
        local.save_weights_and_get_sampling_client(),
    ]
    found = []
    for sampler, kind in zip(samplers, (sdk.types, types), strict=True):
        params = kind.SamplingParams(max_tokens=8, seed=5, temperature=0.7, top_p=0.9, stop=[])
        prompt = kind.ModelInput.from_ints(tokens)
        response = sampler.sample(
            prompt,
            3,
            params,
            include_prompt_logprobs=True,
            topk_prompt_logprobs=2,
            topk_sample_logprobs=30,
        ).result()
        scored = sampler.compute_logprobs(prompt).result()
        found.append((response, scored))
    (theirs, their_scores), (ours, our_scores) = found
    for one, other in zip(theirs.sequences, ours.sequences, strict=True):
        assert one.tokens == other.tokens and one.stop_reason == other.stop_reason == "length"
        assert np.allclose(one.logprobs, other.logprobs, atol=1e-5)
        assert [[token for token, _ in best] for best in one.topk_logprobs] == [
            [token for token, _ in best] for best in other.topk_logprobs or ()
        ]
        assert len(one.topk_logprobs[0]) == 30
    assert len({sequence.sequence_id for sequence in theirs.sequences}) == 3
    assert theirs.prompt_logprobs[0] is None and their_scores[0] is None
    assert np.allclose(theirs.prompt_logprobs[1:], our_scores[1:], atol=1e-5)
    assert np.allclose(their_scores[1:], our_scores[1:], atol=1e-5)
    assert theirs.topk_prompt_logprobs[0] is None and len(theirs.topk_prompt_logprobs[1]) == 2


def test_prompt_targets_alternatives_and_last_n(sdk: Any, client: Any) -> None:
    sampler = client.save_weights_and_get_sampling_client().result()
    prompt = sdk.types.ModelInput.from_ints(client.get_tokenizer().encode("copy: abc\n"))
    params = sdk.types.SamplingParams(max_tokens=1, seed=0)
    targets = sdk.types.TensorData.from_numpy(np.array([[65, -1]] * (prompt.length - 1), np.int64))
    response = sampler.sample(
        prompt,
        1,
        params,
        include_prompt_logprobs=True,
        target_prompt_logprobs=targets,
        prompt_alt_tokens_k=2,
        prompt_logprobs_last_n=3,
    ).result()
    assert [value is None for value in response.prompt_logprobs] == [True] * (prompt.length - 3) + [
        False
    ] * 3
    scores = response.target_prompt_logprobs.to_numpy().reshape(prompt.length - 1, 2)
    assert (scores[:, 0] < 0).all() and (scores[:, 1] == 0).all()
    assert response.prompt_alt_tokens.tokens.shape == [prompt.length - 1, 2]


def test_errors_arrive_in_their_futures_and_later_calls_go_on(sdk: Any, client: Any) -> None:
    data = make_data(sdk.types, client.get_tokenizer())
    weights = [float("nan")] * data[0].model_input.length
    nan = sdk.types.Datum(
        model_input=data[0].model_input,
        loss_fn_inputs={**data[0].loss_fn_inputs, "weights": weights},
    )
    futures = [
        client.forward_backward([data[0], nan], "cross_entropy"),
        client.forward_backward(data, "ppo"),
        client.forward_backward(data, "stable_reinforce"),
        client.save_state("../up"),
        client.optim_step(sdk.types.AdamParams(learning_rate=-1.0)),
    ]
    good = client.forward_backward(data, "cross_entropy")
    messages = []
    for future in futures:
        with pytest.raises(sdk.RequestFailedError) as caught:
            future.result(60)
        messages.append(str(caught.value))
        assert caught.value.category == "user"
    assert "data[1].loss_fn_inputs['weights']" in messages[0]
    assert (
        "advantages" in messages[1]
        and "unknown" in messages[2]
        and "name" in messages[3]
        and "learning_rate" in messages[4]
    )
    assert good.result(60).metrics["loss:sum"] > 0
    sampler = client.save_weights_and_get_sampling_client().result()
    with pytest.raises(sdk.RequestFailedError, match="vocabulary"):
        sampler.sample(
            sdk.types.ModelInput.from_ints([5, 100_000]), 1, sdk.types.SamplingParams(max_tokens=2)
        ).result(60)


def test_a_call_in_many_chunks_is_one_sum(sdk: Any, client: Any) -> None:
    """The SDK sends the first chunk last, when the others were acknowledged."""
    data = make_data(sdk.types, client.get_tokenizer(), PAIRS * 400)  # the SDK cuts after 1,024
    few = client.forward_backward(data[:3], "cross_entropy").result(60)
    client.optim_step(sdk.types.AdamParams(learning_rate=0.0)).result(60)
    many = client.forward_backward(data, "cross_entropy").result(60)
    assert many.metrics["loss:sum"] == pytest.approx(400 * few.metrics["loss:sum"], rel=1e-5)
    assert len(many.loss_fn_outputs) == 1200
    norm = (
        client.optim_step(sdk.types.AdamParams(learning_rate=0.0)).result(60).metrics["grad_norm"]
    )
    client.forward_backward(data[:3], "cross_entropy").result(60)
    assert norm == pytest.approx(
        400
        * client.optim_step(sdk.types.AdamParams(learning_rate=0.0))
        .result(60)
        .metrics["grad_norm"],
        rel=1e-4,
    )


def test_custom_losses_and_soft_targets_of_the_sdk(sdk: Any, client: Any) -> None:
    data = make_data(sdk.types, client.get_tokenizer())
    plain = client.forward_backward(data, "cross_entropy").result(60)
    expected = (
        client.optim_step(sdk.types.AdamParams(learning_rate=0.0)).result(60).metrics["grad_norm"]
    )

    def custom(data: Any, logprobs: Any) -> tuple[torch.Tensor, dict[str, float]]:
        terms = [
            (lp * d.loss_fn_inputs["weights"].to_torch()).sum()
            for d, lp in zip(data, logprobs, strict=True)
        ]
        return -torch.stack(terms).sum(), {"mine": 1.0}

    output = client.forward_backward_custom(data, custom).result(60)
    assert (
        output.metrics["loss:sum"] == pytest.approx(plain.metrics["loss:sum"], rel=1e-5)
        and output.metrics["mine"] == 1.0
    )
    norm = (
        client.optim_step(sdk.types.AdamParams(learning_rate=0.0)).result(60).metrics["grad_norm"]
    )
    assert norm == pytest.approx(expected, rel=1e-5)
    first = data[0]
    targets, weights = (
        first.loss_fn_inputs[name].to_torch() for name in ("target_tokens", "weights")
    )
    soft = sdk.types.Datum(
        model_input=first.model_input,
        loss_fn_inputs={
            "target_tokens": torch.stack([targets, targets], 1),
            "weights": torch.stack([0.25 * weights, 0.75 * weights], 1),
        },
    )
    both = client.forward([soft, data[1]], "cross_entropy").result(60)
    hard = client.forward([first, data[1]], "cross_entropy").result(60)
    assert both.metrics["loss:sum"] == pytest.approx(hard.metrics["loss:sum"], rel=1e-5)


def test_states_are_saved_and_taken_up_by_a_new_program(sdk: Any, client: Any) -> None:
    data = make_data(sdk.types, client.get_tokenizer())
    train(client, sdk.types, data, 2)
    path = client.save_state("two", user_metadata={"why": "test"}).result(60).path
    with pytest.raises(sdk.RequestFailedError, match="exists"):
        client.save_state("two").result(60)
    expected = train(client, sdk.types, data, 2)
    with sdk.ServiceClient() as other:
        resumed = other.create_training_client_from_state_with_optimizer(path).result()
        assert train(resumed, sdk.types, data, 2) == expected
        fresh = other.create_training_client_from_state(path).result()
        assert train(fresh, sdk.types, data, 2)[0] == expected[0]
        assert fresh.get_info().lora_rank == 8
        sampler = other.create_sampling_client(model_path=path).result()
        prompt = sdk.types.ModelInput.from_ints(sampler.get_tokenizer().encode("copy: abc\n"))
        assert (
            sampler.sample(prompt, 1, sdk.types.SamplingParams(max_tokens=3))
            .result(60)
            .sequences[0]
            .tokens
        )
        with pytest.raises(sdk.RequestFailedError, match="no run x"):
            other.create_training_client_from_state("tinker://x/weights/none").result()


def test_a_model_is_found_by_the_name_that_programs_use(sdk: Any) -> None:
    with sdk.ServiceClient() as service:
        names = {
            model.model_name
            for model in sdk.RestClient().get_server_capabilities().result().supported_models
        }
        assert names == {"tiny", "Qwen/Qwen3-8B"}
        sampler = service.create_sampling_client(base_model="Qwen/Qwen3-8B").result()
        tokens = sampler.get_tokenizer().encode("copy: abc\n")
        response = sampler.sample(
            sdk.types.ModelInput.from_ints(tokens),
            1,
            sdk.types.SamplingParams(max_tokens=5, temperature=0.0),
        )
        assert response.result(60).sequences[0].tokens
        with pytest.raises(sdk.RequestFailedError, match="not served"):
            service.create_lora_training_client("gpt-5").result()


def test_many_threads_sample_at_once(sdk: Any) -> None:
    with sdk.ServiceClient() as service:
        sampler = service.create_sampling_client(base_model="tiny").result()
        prompt = sdk.types.ModelInput.from_ints(sampler.get_tokenizer().encode("copy: abc\n"))

        def ask(seed: int) -> list[int]:
            params = sdk.types.SamplingParams(max_tokens=4, seed=seed, temperature=2.0, stop=[])
            return sampler.sample(prompt, 1, params).result(120).sequences[0].tokens

        with ThreadPoolExecutor(8) as pool:
            found = list(pool.map(ask, [*range(100), *range(100)]))
        assert found[:100] == found[100:]  # by seed, whatever the company
        assert len({tuple(tokens) for tokens in found}) > 10


# ---- the protocol itself


@pytest.fixture
def api(server: Server) -> Any:
    with httpx.Client(
        base_url=f"{server.url}/api/v1", headers={"X-API-Key": server.key}, timeout=60
    ) as http:
        yield http


@pytest.fixture
def model_id(api: httpx.Client) -> str:
    session = api.post("/create_session", json={"tags": [], "sdk_version": "test"}).json()[
        "session_id"
    ]
    body = {
        "session_id": session,
        "model_seq_id": 0,
        "base_model": "tiny",
        "lora_config": {"rank": 4, "seed": 1},
    }
    request_id = api.post("/create_model", json=body).json()["request_id"]
    assert api.post("/create_model", json=body).json()["request_id"] == request_id
    answer = api.post("/retrieve_future", json={"request_id": request_id}).json()
    assert answer["model_id"] == f"{session}:train:0"
    return str(answer["model_id"])


def test_calls_wait_for_those_before_them_and_come_once(api: httpx.Client, model_id: str) -> None:
    def step(seq_id: int) -> str:
        answer = api.post(
            "/optim_step",
            json={"model_id": model_id, "seq_id": seq_id, "adam_params": {"learning_rate": 0.0}},
        )
        return str(answer.json()["request_id"])

    third, second, again = step(3), step(2), step(3)
    assert third == again != second
    waiting = threading.Thread(
        target=api.post, args=("/retrieve_future",), kwargs={"json": {"request_id": third}}
    )
    waiting.start()
    waiting.join(0.3)
    assert waiting.is_alive()  # the first has not come
    first = step(1)
    waiting.join(30)
    for request_id in (first, second, third):
        assert "metrics" in api.post("/retrieve_future", json={"request_id": request_id}).json()


def test_only_some_errors_are_of_http(api: httpx.Client, model_id: str, server: Server) -> None:
    assert httpx.post(f"{server.url}/api/v1/create_session", json={}).status_code == 401
    assert (
        httpx.post(
            f"{server.url}/api/v1/create_session", json={}, headers={"X-API-Key": "tml-wrong"}
        ).status_code
        == 401
    )
    for path, body in (
        ("/optim_step", b"not json"),
        ("/optim_step", b"[]"),
        ("/optim_step", b'{"model_id": "x"}'),
        ("/create_model", b"{}"),
        ("/optim_step", b'{"model_id": "x", "seq_id": "one"}'),
        ("/asample", b"{}"),
        ("/retrieve_future", b"{}"),
    ):
        answer = api.post(path, content=body, headers={"content-type": "application/json"})
        assert answer.status_code == 400, (path, body, answer.text)
    bad = api.post(
        "/forward_backward", content=b"\xff\xfe", headers={"content-type": "application/x-protobuf"}
    )
    assert bad.status_code == 400
    for path in ("/billing/usage/events", "/audit", "/sessions/search", "/nothing/at/all"):
        answer = api.get(path)
        assert answer.status_code == 404 and "does not offer" in answer.json()["detail"]
    assert api.post("/retrieve_future", json={"request_id": "nobody"}).status_code == 410
    assert api.post("/session_heartbeat", json={"session_id": "nobody"}).status_code == 410
    # What names a model and a place in its order is taken, whatever is wrong with it.
    wrong = api.post(
        "/optim_step",
        json={"model_id": model_id, "seq_id": 1, "adam_params": {"learning_rate": "much"}},
    )
    assert wrong.status_code == 200
    failed = api.post("/retrieve_future", json=wrong.json()).json()
    assert failed["category"] == "user" and "learning_rate" in failed["error"]
    gone = api.post("/optim_step", json={"model_id": "gone:train:0", "seq_id": 7})
    assert gone.status_code == 200
    assert "save_state" in api.post("/retrieve_future", json=gone.json()).json()["error"]
    message = schema.ForwardBackwardRequest(model_id=model_id, seq_id=2, loss_fn="cross_entropy")
    message.data.add().model_input.add().image.data = b"png"
    image = api.post(
        "/forward_backward",
        content=message.SerializeToString(),
        headers={"content-type": "application/x-protobuf"},
    )
    assert "expected_tokens" in api.post("/retrieve_future", json=image.json()).json()["error"]


def test_what_would_be_ignored_or_cannot_be_read_fails_and_nobody_elses(
    api: httpx.Client, model_id: str
) -> None:
    good: dict[str, Any] = {
        "prompt": {"chunks": [{"tokens": [5, 6, 7]}]},
        "base_model": "tiny",
        "num_samples": 1,
    }
    long = api.post(
        "/asample",
        json={**good, "sampling_params": {"max_tokens": 200, "temperature": 2.0, "stop": []}},
    ).json()
    for params, more in (
        ({"seed": "x"}, {}),
        ({"stop": 5}, {}),
        ({"top_k": 2**70}, {}),
        ({"temperature": 10**400}, {}),
        ({}, {"topk_sample_logprobs": -1}),
        ({}, {"prompt_alt_tokens_k": 10**6}),
        ({}, {"prompt_logprobs_last_n": 7}),
        ({}, {"record_stability_info": True}),
    ):
        asked = api.post(
            "/asample", json={**good, "sampling_params": {"max_tokens": 2, **params}, **more}
        )
        if asked.status_code == 200:
            assert (
                "error"
                in api.post(
                    "/retrieve_future", json={"request_id": asked.json()["request_id"]}
                ).json()
            ), (
                params,
                more,
            )
        else:
            assert asked.status_code == 400
    for seq_id, body in enumerate(
        (
            {"path": "x", "age_encryption_recipients": ["age1"]},
            {"sampling_session_seq_id": 0, "kind": "inflight"},
        ),
        start=1,
    ):
        route = "/save_weights_external" if "path" in body else "/save_weights_for_sampler"
        asked = api.post(route, json={"model_id": model_id, "seq_id": seq_id, **body})
        assert "not offered" in api.post("/retrieve_future", json=asked.json()).json()["error"]
    bad = {
        "model_id": model_id,
        "seq_id": 3,
        "optimizer_params": {"type": "adamw", "learning_rate": -1},
    }
    assert (
        "error"
        in api.post("/retrieve_future", json=api.post("/optim_step", json=bad).json()).json()
    )
    assert (
        len(
            api.post("/retrieve_future", json={"request_id": long["request_id"]}).json()[
                "sequences"
            ][0]["tokens"]
        )
        == 200
    )


def test_a_request_that_is_too_large_fails_in_its_turn(api: httpx.Client, tmp_path: Path) -> None:
    small = Server.start(tmp_path, "--max-body-mb", "1")
    try:
        with httpx.Client(
            base_url=f"{small.url}/api/v1", headers={"X-API-Key": small.key}, timeout=60
        ) as http:
            session = http.post("/create_session", json={}).json()["session_id"]
            body = {
                "session_id": session,
                "model_seq_id": 0,
                "base_model": "tiny",
                "lora_config": {"rank": 4},
            }
            model_id = http.post(
                "/retrieve_future", json=http.post("/create_model", json=body).json()
            ).json()["model_id"]
            message = schema.ForwardBackwardRequest(
                model_id=model_id, seq_id=1, loss_fn="cross_entropy"
            )
            message.data.add().model_input.add().encoded_text.tokens = bytes(2 << 20)
            large = http.post(
                "/forward_backward",
                content=message.SerializeToString(),
                headers={"content-type": "application/x-protobuf"},
            )
            padded = http.post(
                "/optim_step", json={"model_id": model_id, "seq_id": 2, "padding": "x" * (2 << 20)}
            )
            after = http.post(
                "/optim_step", json={"model_id": model_id, "seq_id": 3, "adam_params": {}}
            )
            for answer in (large, padded):
                assert answer.status_code == 200
                assert (
                    "more than 1,048,576 bytes"
                    in http.post("/retrieve_future", json=answer.json()).json()["error"]
                )
            assert "metrics" in http.post("/retrieve_future", json=after.json()).json()
    finally:
        small.stop()


def test_a_sample_that_is_cancelled_ends(api: httpx.Client) -> None:
    ask: dict[str, Any] = {
        "prompt": {"chunks": [{"tokens": [5, 6, 7]}]},
        "base_model": "tiny",
        "num_samples": 64,
    }
    ask["sampling_params"] = {"max_tokens": 1000, "temperature": 2.0, "stop": []}
    asked = api.post("/asample", json=ask).json()
    assert api.post("/cancel_future", json={"request_id": asked["request_id"]}).json() == {
        "cancelled": [asked["request_id"]]
    }
    assert (
        api.post("/retrieve_future", json={"request_id": asked["request_id"]}).json()["error"]
        == "it was cancelled"
    )
    began = time.monotonic()
    ask["sampling_params"] = {"max_tokens": 2}
    short = api.post("/asample", json={**ask, "num_samples": 1}).json()
    assert api.post("/retrieve_future", json={"request_id": short["request_id"]}).json()[
        "sequences"
    ]
    assert time.monotonic() - began < 10


def test_the_json_of_older_sdks_is_taken_and_answered(api: httpx.Client, model_id: str) -> None:
    data = [
        {
            "model_input": {"chunks": [{"type": "encoded_text", "tokens": [5, 6, 7]}]},
            "loss_fn_inputs": {
                "target_tokens": {"data": [6, 7, 8], "dtype": "int64", "shape": [3]},
                "weights": {"data": [0.0, 1.0, 1.0], "dtype": "float32", "shape": [3]},
            },
        }
    ]
    given = {"data": data, "loss_fn": "cross_entropy"}
    first = api.post(
        "/forward", json={"model_id": model_id, "seq_id": 1, "forward_input": given}
    ).json()
    second = api.post(
        "/forward_backward",
        json={"model_id": model_id, "seq_id": 2, "forward_backward_input": given},
    ).json()
    answers = [
        api.post("/retrieve_future", json={"request_id": one["request_id"]}).json()
        for one in (first, second)
    ]
    logprobs, again = (answer["loss_fn_outputs"][0].pop("logprobs") for answer in answers)
    # The two calls may share a pass, in which equal rows are rounded otherwise.
    assert again.pop("data") == pytest.approx(logprobs["data"], abs=1e-5)
    assert again == {name: value for name, value in logprobs.items() if name != "data"}
    assert answers[0]["metrics"] == pytest.approx(answers[1]["metrics"], rel=1e-5)
    assert {**answers[0], "metrics": {}} == {**answers[1], "metrics": {}}
    assert logprobs["shape"] == [3] and answers[0]["metrics"]["loss:sum"] == pytest.approx(
        -sum(logprobs["data"][1:]), rel=1e-5
    )
    sample = {
        "prompt": {"chunks": [{"tokens": [5, 6, 7]}]},
        "sampling_params": {"max_tokens": 2},
        "base_model": "tiny",
    }
    asked = api.post("/asample", json=sample).json()
    answer = api.post("/retrieve_future", json={"request_id": asked["request_id"]}).json()
    assert len(answer["sequences"][0]["tokens"]) <= 2 and answer["type"] == "sample"


def test_messages_have_the_numbers_of_the_sdk(sdk: Any) -> None:
    from tinker.proto import tinker_public_pb2

    for name, kind in schema._CLASSES.items():
        theirs = {
            field.name: field.number for field in getattr(tinker_public_pb2, name).DESCRIPTOR.fields
        }
        assert {
            field.name: field.number for field in kind.DESCRIPTOR.fields
        }.items() <= theirs.items()

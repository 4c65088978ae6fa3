"""Whatever comes over HTTP: no 5xx, no hang, and every request that was taken is answered."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis.checks import not_a_server_error
from serving import Server

from lorakit.service.http import codec as wire
from lorakit.service.http import schema

MANY = pytest.param(200, marks=pytest.mark.slow)


@pytest.mark.parametrize("num_examples", [5, MANY])
def test_what_the_description_allows_and_what_not_is_no_server_error(
    server: Server, num_examples: int
) -> None:
    headers = {"X-API-Key": server.key}
    described = schemathesis.openapi.from_url(f"{server.url}/openapi.json", headers=headers)
    for result in described.get_all_operations():
        operation = result.ok()

        @settings(
            max_examples=num_examples,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            database=None,
        )
        @given(case=operation.as_strategy())
        def ask(case: Any) -> None:
            case.call_and_validate(headers=headers, checks=[not_a_server_error], timeout=50)

        ask()


@pytest.fixture(scope="module")
def api(server: Server) -> Any:
    with httpx.Client(
        base_url=f"{server.url}/api/v1", headers={"X-API-Key": server.key}, timeout=60
    ) as http:
        yield http


@pytest.fixture(scope="module")
def model(api: httpx.Client) -> Any:
    session = api.post("/create_session", json={}).json()["session_id"]
    body = {
        "session_id": session,
        "model_seq_id": 0,
        "base_model": "tiny",
        "lora_config": {"rank": 2},
    }
    created = api.post("/retrieve_future", json=api.post("/create_model", json=body).json()).json()
    return {"id": created["model_id"], "next": 1}


def as_bytes(tokens: list[int]) -> bytes:
    return b"".join(token.to_bytes(4, "little") for token in tokens)


NAMES = ["target_tokens", "weights", "advantages", "logprobs", "mask", "ü"]
shapes = st.lists(st.integers(-2, 9), max_size=3)
tensors = st.fixed_dictionaries(
    {
        "bytes": st.binary(max_size=64),
        "dtype": st.integers(0, 6),
        "shape": shapes,
        "sparse": st.booleans(),
    }
)
tokens = st.one_of(st.binary(max_size=40), st.lists(st.integers(0, 255), max_size=8).map(as_bytes))
datums = st.fixed_dictionaries(
    {
        "tokens": tokens,
        "inputs": st.dictionaries(st.sampled_from(NAMES), tensors, max_size=3),
        "kind": st.sampled_from(["encoded_text", "image", "dmel", "none"]),
    }
)


def build(model_id: str, seq_id: int, loss: str, given_datums: list[dict[str, Any]]) -> bytes:
    message = schema.ForwardBackwardRequest(model_id=model_id, seq_id=seq_id, loss_fn=loss)
    for one in given_datums:
        datum = message.data.add()
        if one["kind"] == "encoded_text":
            datum.model_input.add().encoded_text.tokens = one["tokens"]
        elif one["kind"] == "image":
            datum.model_input.add().image.data = one["tokens"]
        elif one["kind"] == "dmel":
            datum.model_input.add().dmel.dmel = one["tokens"]
        for name, tensor in one["inputs"].items():
            field = datum.loss_fn_inputs[name]
            field.dtype = tensor["dtype"]
            field.shape.extend(tensor["shape"])
            if tensor["sparse"]:
                field.sparse_csr.values = field.sparse_csr.crow_indices = (
                    field.sparse_csr.col_indices
                ) = tensor["bytes"]
            else:
                field.dense = tensor["bytes"]
    return bytes(message.SerializeToString())


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    loss=st.sampled_from(["cross_entropy", "ppo", "gspo", "nothing", ""]),
    given_datums=st.lists(datums, max_size=3),
    cut=st.one_of(st.none(), st.integers(0, 60)),
    flip=st.one_of(st.none(), st.tuples(st.integers(0, 200), st.integers(0, 255))),
)
def test_protobuf_of_any_kind_is_answered(
    api: httpx.Client,
    model: dict[str, Any],
    loss: str,
    given_datums: list[dict[str, Any]],
    cut: int | None,
    flip: Any,
) -> None:
    body = bytearray(build(model["id"], model["next"], loss, given_datums))
    # ids stay whole, or it would be another call
    head = len(build(model["id"], model["next"], "", []))
    if flip is not None and head + flip[0] < len(body):
        body[head + flip[0]] = flip[1]
    if cut is not None:
        body = body[: max(head, len(body) - cut)]
    answer = api.post(
        "/forward_backward", content=bytes(body), headers={"content-type": "application/x-protobuf"}
    )
    assert answer.status_code in (200, 400)
    if answer.status_code == 200:
        if answer.json()["request_id"] == f"{model['id']}:{model['next']}":
            model["next"] += 1
        result = api.post("/retrieve_future", json={"request_id": answer.json()["request_id"]})
        assert result.status_code == 200
    step = api.post(
        "/optim_step",
        json={
            "model_id": model["id"],
            "seq_id": model["next"],
            "adam_params": {"learning_rate": 0.0},
        },
    )
    model["next"] += 1
    assert "metrics" in api.post("/retrieve_future", json=step.json()).json()


@given(st.binary(max_size=80))
def test_the_head_of_anything_is_peeked_at_without_an_error(head: bytes) -> None:
    found = wire.peek_ids(head)
    assert found is None or (isinstance(found[0], str) and isinstance(found[1], int))


@given(st.text(max_size=30), st.integers(0, 2**31 - 1))
def test_ids_are_found_in_the_head_of_a_message(model_id: str, seq_id: int) -> None:
    body = schema.ForwardBackwardRequest(
        model_id=model_id, seq_id=seq_id, loss_fn="x"
    ).SerializeToString()
    assert wire.peek_ids(body) == ((model_id, seq_id) if model_id and seq_id else None)

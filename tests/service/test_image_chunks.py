"""Images through the primitives: in process and by the real SDK, trained on and sampled from."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from typing import Any

import numpy as np
import openai
import pytest
import torch
from serving import Server
from vision import draw_image, make_encoder, make_tokenizer, make_vl_model, png, save_vl_model

import lorakit
from lorakit import types
from lorakit.data.batch.collate import collate
from lorakit.errors import DataError
from lorakit.lora.inject import inject
from lorakit.lora.spec import LoRASpec
from lorakit.lora.state import load_adapter_state
from lorakit.loss import LOSSES
from lorakit.model import vision as vision_module
from lorakit.sampling.generate import generate
from lorakit.training.step import compute_loss

PAD = make_tokenizer().convert_tokens_to_ids("<|image_pad|>")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_vl_model(tmp_path_factory.mktemp("vl"))


@pytest.fixture(scope="module")
def vl_server(folder: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    started = Server.start(tmp_path_factory.mktemp("server"), models=(f"vl={folder}",))
    yield started
    started.stop()


def model_input(kinds: Any, seed: int, *, expected: int = 0, question: str = "How many?") -> Any:
    """Text, an image, text, of the classes of ``kinds``: lorakit's or the SDK's."""
    content = png(draw_image(seed, (32, 40)))
    count = make_encoder().count_tokens(types.ImageChunk(content))
    before, after = (
        make_tokenizer().encode(text, add_special_tokens=False)
        for text in ("<|vision_start|>", question)
    )
    image = kinds.ImageChunk(data=content, format="png", expected_tokens=count + expected)
    return kinds.ModelInput(
        chunks=[kinds.EncodedTextChunk(tokens=before), image, kinds.EncodedTextChunk(tokens=after)]
    )


def datum(kinds: Any, seed: int, **options: Any) -> Any:
    given = model_input(kinds, seed, **options)
    targets = [(7 * place + seed) % 200 for place in range(given.length)]
    weights = [float(place > given.length - 5) for place in range(given.length)]
    return kinds.Datum(
        model_input=given, loss_fn_inputs={"target_tokens": targets, "weights": weights}
    )


def text_datum(kinds: Any) -> Any:
    inputs = {"target_tokens": [6, 7, 8], "weights": [0.0, 1.0, 1.0]}
    return kinds.Datum(model_input=kinds.ModelInput.from_ints([5, 6, 7]), loss_fn_inputs=inputs)


def reference(
    adapter: dict[str, torch.Tensor], data: list[types.Datum]
) -> tuple[list[np.ndarray], float]:
    """The log-probabilities and the gradient's norm of a step of the main job with this adapter."""
    model = inject(make_vl_model(), LoRASpec(rank=4, unembedding=True))
    load_adapter_state(model, adapter, source="the service's")
    output = compute_loss(
        model,
        collate([[one] for one in data], 0, make_encoder()),
        LOSSES["cross_entropy"],
        all_positions=True,
    )
    output.loss_sum.backward()
    gradient = sum(float(p.grad.square().sum()) for p in model.parameters() if p.grad is not None)
    return [
        output.logprobs[n, : len(one)].detach().numpy() for n, one in enumerate(data)
    ], gradient**0.5


def test_a_step_on_images_is_that_of_the_main_job_in_process_and_by_the_sdk(
    folder: str, vl_server: Server, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = [datum(types, 1), text_datum(types), datum(types, 2)]
    with lorakit.ServiceClient(folder=tmp_path, accelerator="cpu") as service:
        client = service.create_lora_training_client(folder, rank=4, seed=3)
        (training_state,) = client._model.engine.worker.training_states.values()
        logprobs, norm = reference(training_state.layout.file_tensors(training_state.vector), own)
        found = client.forward_backward(own, "cross_entropy").result()
        assert client.optim_step(types.AdamParams(1e-3)).result().metrics[
            "grad_norm"
        ] == pytest.approx(norm, rel=1e-4)
        sampled = (
            client.save_weights_and_get_sampling_client()
            .sample(
                model_input(types, 1),
                1,
                types.SamplingParams(max_tokens=8, temperature=0.0, stop=[]),
            )
            .result()
            .sequences[0]
            .tokens
        )
    for output, expected in zip(found.loss_fn_outputs, logprobs, strict=True):
        assert np.allclose(output["logprobs"], expected, atol=1e-5)
    for name, value in vl_server.environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    import tinker

    with tinker.ServiceClient() as service:
        client = service.create_lora_training_client("vl", rank=4, seed=3)
        data = [datum(tinker.types, 1), text_datum(tinker.types), datum(tinker.types, 2)]
        theirs = client.forward_backward(data, "cross_entropy").result()
        for output, expected in zip(theirs.loss_fn_outputs, logprobs, strict=True):
            assert np.allclose(output["logprobs"].tolist(), expected, atol=1e-5)
        client.optim_step(tinker.types.AdamParams(learning_rate=1e-3)).result()
        sampler = client.save_weights_and_get_sampling_client()
        params = tinker.types.SamplingParams(max_tokens=8, temperature=0.0, stop=[])
        assert (
            sampler.sample(model_input(tinker.types, 1), 1, params).result().sequences[0].tokens
            == sampled
        )
        with pytest.raises(
            tinker.TinkerError,
            match=r"data\[1\].model_input: image chunks\[1\]: expected_tokens=21, but it takes 20",
        ):
            client.forward_backward(
                [data[0], datum(tinker.types, 1, expected=1)], "cross_entropy"
            ).result()
        with pytest.raises(tinker.TinkerError, match="expected_tokens=19"):
            sampler.sample(model_input(tinker.types, 1, expected=-1), 1, params).result()
        assert len(client.forward_backward(data, "cross_entropy").result().loss_fn_outputs) == 3


def test_images_that_cannot_be_used_name_datum_and_chunk_and_spoil_nobody_else(
    folder: str, tmp_path: Any
) -> None:
    with lorakit.ServiceClient(folder=tmp_path, accelerator="cpu") as service:
        client = service.create_lora_training_client(folder, rank=2, seed=1)
        broken = types.ModelInput(
            (types.EncodedTextChunk((5,)), types.ImageChunk(b"no image", "png", 20))
        )
        given = {"target_tokens": [1] * 21, "weights": [1.0] * 21}
        with pytest.raises(
            DataError, match=r"data\[1\].model_input: image chunks\[1\] cannot be read"
        ):
            client.forward_backward(
                [datum(types, 1), types.Datum(broken, given)], "cross_entropy"
            ).result()
        written = types.Datum(
            types.ModelInput.from_ints([5, PAD, 6]),
            {"target_tokens": [1] * 3, "weights": [1.0] * 3},
        )
        with pytest.raises(
            DataError,
            match=rf"data\[0\].model_input: chunks\[0\] has token {PAD}, which stands for an image",
        ):
            client.forward_backward([written], "cross_entropy").result()
        text = service.create_lora_training_client("tiny", rank=2, seed=1)
        with pytest.raises(DataError, match=r"data\[0\].model_input: this model takes no images"):
            text.forward_backward([datum(types, 1)], "cross_entropy").result()
        params = types.SamplingParams(max_tokens=4)
        with pytest.raises(DataError, match="this model takes none"):
            text.save_weights_and_get_sampling_client().sample(
                model_input(types, 1), 1, params
            ).result()
        client.forward_backward([datum(types, 1)], "cross_entropy").result()


def test_calls_of_several_adapters_with_and_without_images_share_a_pass(
    folder: str, tmp_path: Any
) -> None:
    with lorakit.ServiceClient(folder=tmp_path, accelerator="cpu") as service:
        clients = [service.create_lora_training_client(folder, rank=2, seed=n) for n in range(3)]
        data = [
            [datum(types, 1)],
            [text_datum(types)],
            [datum(types, 2, question="And which is the larger one?"), datum(types, 3)],
        ]
        alone = [
            client.forward_backward(own, "cross_entropy").result()
            for client, own in zip(clients, data, strict=True)
        ]
        runner = clients[0]._model.engine.worker.runner
        before, most = runner.num_passes, 0
        for _ in range(3):
            futures = [
                client.forward(own, "cross_entropy")
                for client, own in zip(clients, data, strict=True)
            ]
            together = [future.result() for future in futures]
        most = runner.num_passes - before
        assert most < 9
        for one, same in zip(alone, together, strict=True):
            for output, expected in zip(same.loss_fn_outputs, one.loss_fn_outputs, strict=True):
                assert np.allclose(output["logprobs"], expected["logprobs"], atol=1e-5)
    assert torch.is_grad_enabled()


def test_a_tower_that_every_process_must_run_changes_nothing_for_text(
    folder: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with lorakit.ServiceClient(folder=tmp_path, accelerator="cpu") as service:
        clients = [
            service.create_lora_training_client(folder, rank=rank, seed=rank) for rank in (2, 4)
        ]
        plain = [
            client.forward_backward([text_datum(types)] * 2, "cross_entropy").result()
            for client in clients
        ]
        monkeypatch.setattr(vision_module, "is_partitioned", lambda parameter: True)
        for _ in range(3):
            futures = [
                client.forward([text_datum(types)] * 2, "cross_entropy") for client in clients
            ]
            for one, future in zip(plain, futures, strict=True):
                for output, expected in zip(
                    future.result().loss_fn_outputs, one.loss_fn_outputs, strict=True
                ):
                    assert np.allclose(output["logprobs"], expected["logprobs"], atol=1e-5)


def test_an_openai_client_asks_about_an_image(vl_server: Server, folder: str) -> None:
    content = png(draw_image(1, (32, 40)))
    url = f"data:image/png;base64,{base64.b64encode(content).decode()}"
    parts: Any = [
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "text", "text": "How many?"},
    ]
    messages: Any = [{"role": "user", "content": parts}]
    with openai.OpenAI(
        base_url=f"{vl_server.url}/v1", api_key=vl_server.key, max_retries=0
    ) as client:
        asked: Any = {"model": "vl", "max_tokens": 12, "temperature": 0, "stop": []}
        answer = client.chat.completions.create(messages=messages, **asked)
        text = make_tokenizer().apply_chat_template(
            [{"role": "user", "content": [{"type": "image"}, parts[1]]}],
            tokenize=False,
            add_generation_prompt=True,
        )
        encoder = make_encoder()
        chunk = types.ImageChunk(
            content, expected_tokens=encoder.count_tokens(types.ImageChunk(content))
        )
        prompt = encoder.place(make_tokenizer().encode(text, add_special_tokens=False), [chunk])
        params = types.SamplingParams(max_tokens=12, temperature=0.0)
        (expected,) = generate(make_vl_model(), make_tokenizer(), [prompt], params, encoder)
        assert answer.choices[0].message.content == expected.text
        assert answer.usage is not None and answer.usage.prompt_tokens == prompt.length
        for bad in ("/etc/passwd", "http://example.com/a.png", "file:///etc/passwd"):
            messages[0]["content"][0] = {"type": "image_url", "image_url": {"url": bad}}
            with pytest.raises(
                openai.BadRequestError,
                match=r"messages\[0\].content\[0\] is neither text nor an image_url",
            ):
                client.chat.completions.create(messages=messages, **asked)

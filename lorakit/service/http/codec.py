"""lorakit's types to and from HTTP: the SDK's protobuf, and the JSON of older ones."""

from __future__ import annotations

import base64
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lorakit.errors import DataError
from lorakit.service.http import schema
from lorakit.types import (
    Chunk,
    Datum,
    EncodedTextChunk,
    ForwardBackwardOutput,
    ImageChunk,
    ModelInput,
    SampleResponse,
    SamplingParams,
    TensorData,
)

_DTYPES = {
    schema.FLOAT32: np.float32,
    schema.INT64: np.int64,
    schema.INT32: np.int32,
    schema.BFLOAT16: np.uint16,
}
_MISSING_LOGPROB = -99999.0  # with token 0: a candidate that is not there
MAX_DENSE_ELEMENTS = 1 << 25  # of a sparse tensor that is written out


@dataclass(frozen=True)
class ForwardBackwardCall:
    """What a client asks. ``data`` is made of the message when it is wanted, so that its errors
    belong to the call.
    """

    model_id: str
    seq_id: int
    loss_fn: str
    loss_fn_config: dict[str, Any]
    forward_only: bool
    _data: Any
    _problem: str = ""  # of the request as a whole

    def data(self) -> list[Datum]:
        """Raises DataError that names Datum and field."""
        if self._problem:
            raise DataError(self._problem)
        found = []
        for number, message in enumerate(self._data):
            try:
                read = _datum_from_json if isinstance(message, Mapping) else _datum
                found.append(read(message))
            except (ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
                raise DataError(f"data[{number}]: {error}") from error
        return found


def read_forward_backward(body: bytes) -> ForwardBackwardCall:
    """Raises DataError where ``body`` is no such message."""
    message = schema.ForwardBackwardRequest()
    try:
        message.ParseFromString(body)
    except Exception as error:  # the message class depends on the implementation of protobuf
        raise DataError(f"not a ForwardBackwardRequest: {error}") from error
    config: dict[str, Any] = dict(message.loss_fn_config)
    for name, value in message.loss_fn_config_v2.items():
        config[name] = value.text if value.WhichOneof("kind") == "text" else value.number
    return ForwardBackwardCall(
        message.model_id,
        message.seq_id,
        message.loss_fn,
        config,
        message.forward_only,
        message.data,
    )


def read_forward_backward_json(
    body: Mapping[str, Any], *, forward_only: bool
) -> ForwardBackwardCall:
    """The form of older SDKs: ``forward_backward_input`` (or ``forward_input``) with data,
    loss_fn and loss_fn_config.
    """
    given = body.get("forward_backward_input") or body.get("forward_input") or {}
    problem = ""
    if not isinstance(given, Mapping):
        problem, given = "forward_backward_input is not an object", {}
    config, data = given.get("loss_fn_config") or {}, given.get("data") or []
    if not isinstance(config, Mapping) or not isinstance(data, list):
        problem, config, data = "loss_fn_config is an object, and data a list", {}, []
    return ForwardBackwardCall(
        str(body.get("model_id")),
        int(body.get("seq_id") or 0),
        str(given.get("loss_fn", "")),
        dict(config),
        forward_only or bool(body.get("forward_only")),
        data,
        problem,
    )


def peek_ids(head: bytes) -> tuple[str, int] | None:
    """Return model_id and seq_id from the first bytes of a ForwardBackwardRequest that is too
    large to be read; None without them.
    """
    # Field 1, a string, and field 2, a varint, come first: SDKs write fields in the order of their
    # numbers.
    if len(head) < 2 or head[0] != 0x0A:
        return None
    length, place = _varint(head, 1)
    model_id, place = head[place : place + length], place + length
    if place >= len(head) or head[place] != 0x10:
        return None
    seq_id, _ = _varint(head, place + 1)
    try:
        return model_id.decode(), seq_id
    except UnicodeDecodeError:
        return None


def _varint(data: bytes, place: int) -> tuple[int, int]:
    value = shift = 0
    while place < len(data):
        byte = data[place]
        value |= (byte & 0x7F) << shift
        place, shift = place + 1, shift + 7
        if not byte & 0x80:
            break
    return value, place


def _image(number: int, data: bytes, format: str, expected_tokens: int | None) -> ImageChunk:
    if expected_tokens is not None and expected_tokens < 1:
        raise DataError(
            f"model_input.chunks[{number}]: expected_tokens={expected_tokens} must be at least 1"
        )
    return ImageChunk(data, format or "png", expected_tokens, name=f"chunks[{number}]")


def _datum(message: Any) -> Datum:
    chunks: list[Chunk] = []
    for number, chunk in enumerate(message.model_input):
        kind = chunk.WhichOneof("kind")
        if kind == "encoded_text":
            tokens = np.frombuffer(chunk.encoded_text.tokens, np.int32)
            chunks.append(EncodedTextChunk(tuple(tokens.tolist())))
        elif kind == "image":
            count = chunk.image.expected_tokens if chunk.image.HasField("expected_tokens") else None
            chunks.append(_image(number, chunk.image.data, chunk.image.format, count))
        else:
            raise DataError(
                f"model_input.chunks[{number}] is {kind or 'empty'}; there are text and image"
            )
    return Datum(
        ModelInput(tuple(chunks)),
        {name: _tensor(tensor) for name, tensor in message.loss_fn_inputs.items()},
    )


def _tensor(message: Any) -> np.ndarray:
    if message.dtype not in _DTYPES:
        raise DataError(f"dtype {message.dtype} is unknown")
    if message.WhichOneof("kind") == "sparse_csr":
        csr = message.sparse_csr
        values = _widen(np.frombuffer(csr.values, _DTYPES[message.dtype]), message.dtype)
        crow, col = (np.frombuffer(part, np.int64) for part in (csr.crow_indices, csr.col_indices))
        return _dense(values, crow, col, list(message.shape))
    array = _widen(np.frombuffer(message.dense, _DTYPES[message.dtype]), message.dtype)
    return array.reshape(tuple(message.shape)) if message.shape else array


def _widen(array: np.ndarray, dtype: int) -> np.ndarray:
    """bfloat16 is the upper half of a float32."""
    return (array.astype(np.uint32) << 16).view(np.float32) if dtype == schema.BFLOAT16 else array


def _dense(
    values: np.ndarray, crow: np.ndarray, col: np.ndarray, shape: Sequence[int]
) -> np.ndarray:
    """A matrix in compressed rows, written out; zeros where nothing is listed."""
    if len(shape) != 2 or min(shape) < 0 or shape[0] * shape[1] > MAX_DENSE_ELEMENTS:
        raise DataError(f"a sparse tensor of shape {tuple(shape)} cannot be used")
    counts = np.diff(crow)
    is_whole = len(crow) == shape[0] + 1 and crow[0] == 0 and crow[-1] == len(values)
    if not is_whole or (counts < 0).any():
        raise DataError("sparse_crow_indices do not belong to the shape")
    if len(col) != len(values) or (len(col) and (col.min() < 0 or col.max() >= shape[1])):
        raise DataError("sparse_col_indices do not belong to the shape")
    dense = np.zeros(tuple(shape), values.dtype)
    dense[np.repeat(np.arange(shape[0]), counts), col] = values
    return dense


def _datum_from_json(message: Mapping[str, Any]) -> Datum:
    inputs = {
        name: tensor_from_json(tensor) for name, tensor in message.get("loss_fn_inputs", {}).items()
    }
    return Datum(model_input_from_json(message.get("model_input", {})), inputs)


def model_input_from_json(message: Mapping[str, Any]) -> ModelInput:
    """Raises DataError for a chunk that is neither text nor an image."""
    chunks: list[Chunk] = []
    for number, chunk in enumerate(message.get("chunks", ())):
        kind = chunk.get("type", "encoded_text")
        if kind == "encoded_text":
            chunks.append(EncodedTextChunk(tuple(chunk["tokens"])))
        elif kind == "image":
            data = base64.b64decode(chunk["data"], validate=True)
            format, count = chunk.get("format", "png"), chunk.get("expected_tokens")
            chunks.append(_image(number, data, format, count))
        else:
            raise DataError(f"chunks[{number}] is {kind}; there are encoded_text and image")
    return ModelInput(tuple(chunks))


def tensor_from_json(message: Mapping[str, Any]) -> np.ndarray:
    """A TensorData of the SDK's JSON; a sparse one is written out."""
    dtype = {"float32": np.float32, "int64": np.int64}[message["dtype"]]
    values = np.asarray(message["data"], dtype)
    shape = message.get("shape")
    if message.get("sparse_crow_indices") is not None:
        crow = np.asarray(message["sparse_crow_indices"], np.int64)
        col = np.asarray(message["sparse_col_indices"], np.int64)
        return _dense(values, crow, col, shape or ())
    return values.reshape(tuple(shape)) if shape is not None else values


def sampling_params_from_json(message: Mapping[str, Any]) -> SamplingParams:
    """``max_tokens`` absent generates as far as the model goes."""
    top_k = message.get("top_k", -1)
    return SamplingParams(
        max_tokens=message.get("max_tokens"),
        temperature=float(message.get("temperature", 1.0)),
        top_p=float(message.get("top_p", 1.0)),
        top_k=int(-1 if top_k is None else top_k),
        seed=message.get("seed"),
        stop=message.get("stop"),
    )


# ---- results


def write_forward_backward(output: ForwardBackwardOutput) -> bytes:
    """As protobuf: one record for each run of Datums whose arrays have the same trailing shapes."""
    message = schema.ForwardBackwardOutput(loss_fn_output_type=output.loss_fn_output_type)
    for name, value in output.metrics.items():
        message.metrics[name] = value
    for _, alike in itertools.groupby(output.loss_fn_outputs, key=_trailing_shapes):
        group = list(alike)
        record = message.loss_fn_outputs.add(
            type_tag=output.loss_fn_output_type, num_datums=len(group)
        )
        for name in group[0]:
            arrays = [np.ascontiguousarray(datum[name]) for datum in group]
            field = record.fields[name]
            field.data = b"".join(array.tobytes() for array in arrays)
            field.offsets = np.cumsum(
                [0, *(array.nbytes for array in arrays)], dtype=np.int64
            ).tobytes()
            field.dtype = _dtype_of(arrays[0])
            field.trailing_shape.extend(arrays[0].shape[1:])
    return message.SerializeToString()


def _trailing_shapes(datum: Mapping[str, TensorData]) -> dict[str, tuple[int, ...]]:
    return {name: array.shape[1:] for name, array in datum.items()}


def write_sample_response(response: SampleResponse) -> bytes:
    """As protobuf."""
    message = schema.SampleResponse()
    for sample in response.sequences:
        sequence = message.sequences.add(
            stop_reason=schema.STOP if sample.stop_reason == "stop" else schema.LENGTH
        )
        sequence.tokens = np.asarray(sample.tokens, np.int32).tobytes()
        if sample.logprobs is not None:
            sequence.logprobs = np.asarray(sample.logprobs, np.float32).tobytes()
        if sample.topk_logprobs is not None:
            _write_topk(sequence.topk_sampled_logprobs, sample.topk_logprobs)
    if response.prompt_logprobs is not None:
        # None becomes NaN
        message.prompt_logprobs = np.array(response.prompt_logprobs, np.float32).tobytes()
    if response.topk_prompt_logprobs is not None:
        _write_topk(message.topk_prompt_logprobs, response.topk_prompt_logprobs)
    if response.target_prompt_logprobs is not None:
        _write_tensor(message.target_prompt_logprobs, response.target_prompt_logprobs)
    if response.prompt_alt_tokens is not None:
        _write_tensor(message.prompt_alt_tokens.tokens, response.prompt_alt_tokens[0])
        _write_tensor(message.prompt_alt_tokens.logprobs, response.prompt_alt_tokens[1])
    return message.SerializeToString()


def _write_tensor(message: Any, array: np.ndarray) -> None:
    message.dense = array.tobytes()
    message.dtype = _dtype_of(array)
    message.shape.extend(array.shape)


def _dtype_of(array: np.ndarray) -> int:
    return schema.INT64 if array.dtype == np.int64 else schema.FLOAT32


def _write_topk(message: Any, rows: Sequence[list[tuple[int, float]] | None]) -> None:
    width = max((len(row) for row in rows if row), default=0)
    tokens = np.zeros((len(rows), width), np.int32)
    logprobs = np.full((len(rows), width), _MISSING_LOGPROB, np.float32)
    for number, row in enumerate(rows):
        for place, (token, logprob) in enumerate(row or ()):
            tokens[number, place], logprobs[number, place] = token, logprob
    message.token_ids, message.logprobs = tokens.tobytes(), logprobs.tobytes()
    message.length, message.k = tokens.shape


def forward_backward_as_json(payload: bytes) -> dict[str, Any]:
    """A written result as SDKs from before protobuf read it."""
    message = schema.ForwardBackwardOutput.FromString(payload)
    return {
        "loss_fn_output_type": message.loss_fn_output_type,
        "loss_fn_outputs": [
            {name: _nth_as_json(field, number) for name, field in record.fields.items()}
            for record in message.loss_fn_outputs
            for number in range(record.num_datums)
        ],
        "metrics": dict(message.metrics),
    }


def _nth_as_json(field: Any, number: int) -> dict[str, Any]:
    start, end = np.frombuffer(field.offsets, np.int64)[number : number + 2]
    values = np.frombuffer(field.data[start:end], _DTYPES[field.dtype])
    shape = [-1, *field.trailing_shape]
    dtype = "int64" if field.dtype == schema.INT64 else "float32"
    return {"data": values.tolist(), "dtype": dtype, "shape": list(values.reshape(shape).shape)}


def sample_response_as_json(payload: bytes) -> dict[str, Any]:
    """A written result as SDKs from before protobuf read it."""
    message = schema.SampleResponse.FromString(payload)
    prompt = _logprobs_as_json(message, "prompt_logprobs")
    return {
        "type": "sample",
        "sequences": [
            {
                "stop_reason": "stop" if sequence.stop_reason == schema.STOP else "length",
                "tokens": np.frombuffer(sequence.tokens, np.int32).tolist(),
                "logprobs": _logprobs_as_json(sequence, "logprobs"),
                "topk_logprobs": _topk_as_json(sequence, "topk_sampled_logprobs"),
            }
            for sequence in message.sequences
        ],
        "prompt_logprobs": prompt and [None if math.isnan(value) else value for value in prompt],
        "topk_prompt_logprobs": _topk_as_json(message, "topk_prompt_logprobs"),
    }


def _logprobs_as_json(message: Any, name: str) -> list[float] | None:
    if not message.HasField(name):
        return None
    return np.frombuffer(getattr(message, name), np.float32).tolist()


def _topk_as_json(message: Any, name: str) -> list[list[tuple[int, float]] | None] | None:
    if not message.HasField(name):
        return None
    best = getattr(message, name)
    shape = (best.length, best.k)
    tokens = np.frombuffer(best.token_ids, np.int32).reshape(shape).tolist()
    logprobs = np.frombuffer(best.logprobs, np.float32).reshape(shape).tolist()
    rows = [
        [(t, p) for t, p in zip(*row, strict=True) if p > _MISSING_LOGPROB]
        for row in zip(tokens, logprobs, strict=True)
    ]
    return [row or None for row in rows]

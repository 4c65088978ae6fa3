"""The protobuf messages of Tinker's protocol, described here so that no compiler and no SDK is
needed.

Field numbers are the protocol (`tinker_public.proto` of the public SDK); they live in a pool of
their own, so that the SDK can be in the same process.
"""

from __future__ import annotations

from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

_PACKAGE = "lorakit_wire"
# Each field: name, number, type; "?" may be absent, "*" repeated, "a>b" a map, "|" one of a group.
_MESSAGES: dict[str, str] = {
    "EncodedTextChunk": "tokens 1 bytes",
    "ImageChunk": "data 1 bytes, format 2 string, expected_tokens 3 int32?",
    "DmelChunk": "dmel 1 bytes",
    "Chunk": "encoded_text 1 EncodedTextChunk|, image 2 ImageChunk|, dmel 3 DmelChunk|",
    "SparseCsr": "values 1 bytes, crow_indices 2 bytes, col_indices 3 bytes",
    "Tensor": "dense 1 bytes|, sparse_csr 2 SparseCsr|, dtype 3 int32, shape 4 int64*",
    "Datum": "model_input 1 Chunk*, loss_fn_inputs 2 string>Tensor",
    "LossConfigValue": "number 1 double|, text 2 string|",
    "ForwardBackwardRequest": (
        "model_id 1 string, seq_id 2 int32, data 3 Datum*, loss_fn 4 string, loss_fn_config 5"
        " string>double, forward_only 6 bool, loss_fn_config_v2 7 string>LossConfigValue"
    ),
    "BatchedTensor": "data 1 bytes, offsets 2 bytes, dtype 3 int32, trailing_shape 4 int64*",
    "ArrayRecord": "type_tag 1 string, fields 2 string>BatchedTensor, num_datums 3 int64",
    "ForwardBackwardOutput": (
        "loss_fn_output_type 1 string, loss_fn_outputs 2 ArrayRecord*, metrics 3 string>double"
    ),
    "TopkLogprobs": "token_ids 1 bytes, logprobs 2 bytes, k 3 uint32, length 4 uint32",
    "SampledSequence": (
        "stop_reason 1 int32, tokens 2 bytes, logprobs 3 bytes?, topk_sampled_logprobs 4"
        " TopkLogprobs?"
    ),
    "PromptAltTokens": "tokens 1 Tensor, logprobs 2 Tensor",
    "SampleResponse": (
        "sequences 1 SampledSequence*, prompt_logprobs 2 bytes?, topk_prompt_logprobs 3"
        " TopkLogprobs?, prompt_cache_hit_tokens 4 int32, target_prompt_logprobs 5 Tensor?,"
        " prompt_alt_tokens 6 PromptAltTokens?"
    ),
}
FLOAT32, INT64, INT32, BFLOAT16 = 1, 2, 3, 4  # values of dtype
STOP, LENGTH = 0, 1  # values of stop_reason

_Field = descriptor_pb2.FieldDescriptorProto
_SCALARS = {
    name: getattr(_Field, f"TYPE_{name.upper()}")
    for name in ("double", "int64", "int32", "uint32", "bool", "string", "bytes")
}


def _describe(name: str, fields: str) -> descriptor_pb2.DescriptorProto:
    message = descriptor_pb2.DescriptorProto(name=name)
    has_group = "|" in fields
    if has_group:
        message.oneof_decl.add(name="kind")
    for text in fields.split(", "):
        field_name, number, kind = text.split(" ")
        field = message.field.add(name=field_name, number=int(number), label=_Field.LABEL_OPTIONAL)
        bare = kind.rstrip("?*|")
        if ">" in bare:
            key, value = bare.split(">")
            entry_name = "".join(part.capitalize() for part in field_name.split("_")) + "Entry"
            entry = _describe(entry_name, f"key 1 {key}, value 2 {value}")
            entry.options.map_entry = True
            message.nested_type.append(entry)
            field.label = _Field.LABEL_REPEATED
            field.type, field.type_name = _Field.TYPE_MESSAGE, f".{_PACKAGE}.{name}.{entry_name}"
            continue
        if bare in _SCALARS:
            field.type = _SCALARS[bare]
        else:
            field.type, field.type_name = _Field.TYPE_MESSAGE, f".{_PACKAGE}.{bare}"
        if kind.endswith("*"):
            field.label = _Field.LABEL_REPEATED
        elif kind.endswith("|"):
            field.oneof_index = 0
        elif kind.endswith("?"):
            field.proto3_optional, field.oneof_index = True, len(message.oneof_decl)
            message.oneof_decl.add(name=f"_{field_name}")
    return message


def _build() -> dict[str, Any]:
    file = descriptor_pb2.FileDescriptorProto(
        name="lorakit_wire.proto", package=_PACKAGE, syntax="proto3"
    )
    file.message_type.extend(_describe(name, fields) for name, fields in _MESSAGES.items())
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    found = pool.FindFileByName(file.name).message_types_by_name
    return {name: message_factory.GetMessageClass(found[name]) for name in _MESSAGES}


_CLASSES = _build()
ForwardBackwardRequest = _CLASSES["ForwardBackwardRequest"]
ForwardBackwardOutput = _CLASSES["ForwardBackwardOutput"]
SampleResponse = _CLASSES["SampleResponse"]

"""Data for programs that are written for the SDK and for lorakit's own clients alike."""

from __future__ import annotations

from typing import Any

PAIRS = [
    ("rubber duck", "ubber-ray uck-day"),
    ("donut shop", "onut-day op-shay"),
    ("pickle jar", "ickle-pay ar-jay"),
]


def make_data(types: Any, tokenizer: Any, pairs: Any = PAIRS) -> list[Any]:
    """Weighted examples, of the types of whichever package."""
    data = []
    for english, pig_latin in pairs:
        prompt = tokenizer.encode(f"English: {english}\nPig Latin:")
        completion = tokenizer.encode(f" {pig_latin}\n\n", add_special_tokens=False)
        tokens, weights = prompt + completion, [0.0] * len(prompt) + [1.0] * len(completion)
        inputs = {"target_tokens": tokens[1:], "weights": weights[1:]}
        data.append(
            types.Datum(model_input=types.ModelInput.from_ints(tokens[:-1]), loss_fn_inputs=inputs)
        )
    return data


def train(
    client: Any, types: Any, data: Any, steps: int, learning_rate: float = 5e-3
) -> list[float]:
    """A plain loop; the losses."""
    losses = []
    for _ in range(steps):
        computed = client.forward_backward(data, "cross_entropy")
        stepped = client.optim_step(types.AdamParams(learning_rate=learning_rate))
        losses.append(computed.result().metrics["loss:sum"])
        stepped.result()
    return losses

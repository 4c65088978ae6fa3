"""One program for any number of processes: its losses, a sample and a resumed run, as JSON.
Started by test_executor.py.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from programs import PAIRS, make_data, train

import lorakit
from lorakit import types


def main(folder: Path, strategy: str) -> None:
    torch.set_num_threads(1)
    with lorakit.ServiceClient(
        folder=folder / "service", accelerator="cpu", strategy=strategy
    ) as service:
        clients = [
            service.create_lora_training_client("tiny", rank=rank, seed=rank) for rank in (8, 3)
        ]
        first, second = clients
        data = make_data(types, first.get_tokenizer(), PAIRS)
        found: dict[str, object] = {}
        computed = first.forward(data, "cross_entropy").result()
        found["logprobs"] = [output["logprobs"].tolist() for output in computed.loss_fn_outputs]
        futures = [
            client.forward_backward(data[n:], "cross_entropy") for n, client in enumerate(clients)
        ]
        found["together"] = [future.result().metrics["loss:sum"] for future in futures]
        found["norms"] = [
            client.optim_step(types.AdamParams(learning_rate=1e-3)).result().metrics["grad_norm"]
            for client in clients
        ]
        found["losses"] = train(first, types, data, 4, 1e-3)
        saved = first.save_state("four").result().path
        found["after"] = train(first, types, data, 2, 1e-3)
        resumed = service.create_training_client_from_state_with_optimizer(saved)
        found["resumed"] = train(resumed, types, data, 2, 1e-3)
        found["custom"] = (
            second.forward_backward_custom(data, lambda d, lp: (-torch.cat(list(lp)).sum(), {}))
            .result()
            .metrics["loss:sum"]
        )
        found["custom_norm"] = (
            second.optim_step(types.AdamParams(learning_rate=0.0)).result().metrics["grad_norm"]
        )
        sampling = first.save_weights_and_get_sampling_client()
        prompt = types.ModelInput.from_ints(data[0].model_input.to_ints()[:12])
        params = types.SamplingParams(max_tokens=6, temperature=0.0, stop=[])
        found["sample"] = sampling.sample(prompt, 2, params).result().sequences[0].tokens
        found["scores"] = sampling.compute_logprobs(data[0].model_input).result()[1:]
        try:
            first.forward_backward([], "cross_entropy").result()
        except lorakit.LorakitError as error:
            found["error"] = str(error)
        found["still"] = first.forward(data, "cross_entropy").result().metrics["loss:sum"]
        (folder / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])

"""A program for the public SDK that survives its server: it goes on from its last save_state.
Started by test_killed.py.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import tinker
from programs import make_data
from tinker import types


def main(num_steps: int, out: Path) -> None:
    path, step = None, 0
    losses: dict[int, float] = {}
    while step < num_steps:
        try:
            service = tinker.ServiceClient()
            if path is None:
                client = service.create_lora_training_client("tiny", rank=4, seed=1).result()
            else:
                client = service.create_training_client_from_state_with_optimizer(path).result()
            data = make_data(types, client.get_tokenizer())
            while step < num_steps:
                computed = client.forward_backward(data, "cross_entropy")
                client.optim_step(types.AdamParams(learning_rate=5e-3)).result(60)
                losses[step] = computed.result(60).metrics["loss:sum"]
                saved = client.save_state(f"step-{step}-{int(time.time() * 1000)}").result(60).path
                path, step = saved, step + 1
        except Exception as error:
            print(f"step {step}: {type(error).__name__}: {error}; going on from {path}", flush=True)
            time.sleep(0.2)
    out.write_text("\n".join(repr(losses[number]) for number in range(num_steps)))


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))

"""Tinker's clients without a server: the same verbs, in this process, on this machine.

Every call returns at once; ``.result()``, ``await`` and the ``*_async`` spellings all work. A
client can be waited for as well, since the public SDK's creating calls return futures of clients.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from lorakit.service.base import Base
from lorakit.service.checkpoints import LOCAL_OWNER
from lorakit.service.core import Service
from lorakit.service.database import Checkpoint, TrainingRun
from lorakit.service.futures import APIFuture, AsFuture, finished
from lorakit.service.sampling_client import SamplingClient
from lorakit.service.training_client import TrainingClient


class ServiceClient(AsFuture):
    """Trains and samples on this machine.

    Args:
        user_metadata: kept with every run.
        folder: of the database and the checkpoints.
        models: names that programs use -> folders or names of models, for programs that ask for a
            model of the hub.
        accelerator: auto, cpu, cuda or mps.
        precision: auto (bf16 on a GPU that has it, else float32), 32-true or bf16-mixed.
        lora_alpha, expert_layout: of the adapters, as ``lora.alpha`` and ``lora.expert_layout``.
        max_pass_tokens: positions of a forward pass, padding included.
        batch_invariant: log-probabilities of sampled tokens and those that ``compute_logprobs``
            finds are equal to the bit; slow.
        strategy: for several processes (`torchrun program.py`): auto, ddp, zero1, zero2, zero3 or
            zero3_offload. The first runs the program; the others do here what it asks for, and end
            with it.
    """

    def __init__(
        self,
        user_metadata: Mapping[str, str] | None = None,
        project_id: str | None = None,
        *,
        folder: str | Path = "runs/service",
        models: Mapping[str, str] | None = None,
        accelerator: str = "auto",
        precision: str = "auto",
        lora_alpha: float = 32.0,
        expert_layout: str = "per_expert",
        max_pass_tokens: int = 16_384,
        strategy: str = "auto",
        batch_invariant: bool = False,
    ) -> None:
        self._service = Service(
            folder,
            models=models or {},
            accelerator=accelerator,
            load=lambda path: Base.load(
                path, accelerator=accelerator, precision=precision, strategy=strategy
            ),
            lora={"alpha": lora_alpha, "expert_layout": expert_layout},
            worker_options={
                "max_pass_tokens": max_pass_tokens,
                "batch_invariant": batch_invariant,
            },
        )
        self._session, self._num_models = secrets.token_hex(6), 0
        self.user_metadata = dict(user_metadata or {})

    # ---- training

    def create_lora_training_client(
        self,
        base_model: str,
        rank: int = 32,
        seed: int | None = None,
        train_mlp: bool = True,
        train_attn: bool = True,
        train_unembed: bool = True,
        user_metadata: Mapping[str, str] | None = None,
    ) -> TrainingClient:
        """Return a client that trains a new adapter on ``base_model``. Raises ConfigError."""
        future = self._service.create_model(
            self._new_id(),
            base_model,
            rank=rank,
            seed=seed,
            train_mlp=train_mlp,
            train_attn=train_attn,
            train_unembed=train_unembed,
            user_metadata={**self.user_metadata, **(user_metadata or {})},
        )
        return TrainingClient(self._service, future.result())

    def create_training_client_from_state(
        self,
        path: str,
        base_model: str | None = None,
        user_metadata: Mapping[str, str] | None = None,
    ) -> TrainingClient:
        """Return a client that continues from saved weights: a path of ``save_state``, or a folder
        of a PEFT adapter.
        """
        return self._from_state(path, base_model, user_metadata, with_optimizer=False)

    def create_training_client_from_state_with_optimizer(
        self,
        path: str,
        base_model: str | None = None,
        user_metadata: Mapping[str, str] | None = None,
    ) -> TrainingClient:
        """The same with the optimiser that was saved."""
        return self._from_state(path, base_model, user_metadata, with_optimizer=True)

    def _from_state(
        self,
        path: str,
        base_model: str | None,
        user_metadata: Mapping[str, str] | None,
        *,
        with_optimizer: bool,
    ) -> TrainingClient:
        future = self._service.create_model_from(
            self._new_id(),
            path,
            base_model=base_model,
            with_optimizer=with_optimizer,
            user_metadata={**self.user_metadata, **(user_metadata or {})},
        )
        return TrainingClient(self._service, future.result())

    def _new_id(self) -> str:
        self._num_models += 1
        return f"{self._session}:train:{self._num_models - 1}"

    # ---- sampling and the rest

    def create_sampling_client(
        self, model_path: str | None = None, base_model: str | None = None
    ) -> SamplingClient:
        """Return a client that samples from saved weights, or from a base."""
        return SamplingClient(
            self._service, self._service.weights(base_model=base_model, path=model_path).result()
        )

    def create_rest_client(self) -> RestClient:
        """Return a client that lists and deletes what was saved."""
        return RestClient(self._service)

    def close(self, status: str = "success", detail: str | None = None) -> None:
        """End the engines. What waits gets an error."""
        self._service.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    async def create_lora_training_client_async(self, *args: Any, **kwargs: Any) -> TrainingClient:
        return self.create_lora_training_client(*args, **kwargs)

    async def create_training_client_from_state_async(
        self, *args: Any, **kwargs: Any
    ) -> TrainingClient:
        return self.create_training_client_from_state(*args, **kwargs)

    async def create_training_client_from_state_with_optimizer_async(
        self, *args: Any, **kwargs: Any
    ) -> TrainingClient:
        return self.create_training_client_from_state_with_optimizer(*args, **kwargs)

    async def create_sampling_client_async(self, *args: Any, **kwargs: Any) -> SamplingClient:
        return self.create_sampling_client(*args, **kwargs)


class RestClient(AsFuture):
    """Lists, describes and deletes what was saved."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def list_training_runs(self, limit: int = 20, offset: int = 0) -> APIFuture[list[TrainingRun]]:
        """The runs, the last asked first, with the tokens and seconds that they have cost."""
        runs, _ = self._service.database.runs(LOCAL_OWNER, limit=limit, offset=offset)
        return APIFuture(finished(runs))

    def get_training_run(self, training_run_id: str) -> APIFuture[TrainingRun]:
        return APIFuture(finished(self._service.database.run(training_run_id, LOCAL_OWNER)))

    def list_checkpoints(self, training_run_id: str) -> APIFuture[list[Checkpoint]]:
        run = self._service.database.run(training_run_id, LOCAL_OWNER)
        return APIFuture(finished(self._service.checkpoints.of_runs([run.id])))

    def delete_checkpoint_from_tinker_path(self, tinker_path: str) -> APIFuture[None]:
        self._service.checkpoints.delete(tinker_path, LOCAL_OWNER)
        return APIFuture(finished(None))

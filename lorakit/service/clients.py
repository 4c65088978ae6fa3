"""Tinker's clients without a server: the same verbs, in this process, on this machine.

Every call returns at once; ``.result()``, ``await`` and the ``*_async`` spellings all work. A
client can be waited for as well, since the public SDK's creating calls return futures of clients.
"""

from __future__ import annotations

import secrets
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from lorakit.errors import ConfigError
from lorakit.service.base import Base
from lorakit.service.checkpoints import LOCAL_OWNER, SaveOptions
from lorakit.service.core import Model, Service, Weights
from lorakit.service.database import Checkpoint, Run
from lorakit.service.futures import APIFuture
from lorakit.types import (
    AdamParams,
    Datum,
    ForwardBackwardOutput,
    ModelInput,
    OptimStepResponse,
    SampleResponse,
    SamplingParams,
    SavedPath,
    TensorData,
)


class _AsFuture:
    """Lets a client be used where the public SDK returns a future of one."""

    def result(self, timeout: float | None = None) -> Self:
        return self

    async def result_async(self, timeout: float | None = None) -> Self:
        return self

    def __await__(self) -> Generator[Any, None, Self]:
        return self.result_async().__await__()


class ServiceClient(_AsFuture):
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
        strategy: of several processes (`torchrun program.py`): auto, ddp, zero1, zero2, zero3 or
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
        """Return a client that goes on from saved weights: a path of ``save_state``, or a folder
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


@dataclass(frozen=True)
class ModelData:
    """What a base is called."""

    arch: str
    model_name: str
    tokenizer_id: str


@dataclass(frozen=True)
class ModelInfo:
    """Facts about a model under training, and what it has cost so far."""

    model_data: ModelData
    model_id: str
    model_name: str
    lora_rank: int
    num_params: int
    num_steps: int
    tokens: int
    seconds: float
    is_lora: bool = True


class TrainingClient(_AsFuture):
    """Trains one adapter. Calls run in their order; an error arrives in its call's future, and
    later calls go on.
    """

    def __init__(self, service: Service, model: Model) -> None:
        self._service, self._model = service, model

    @property
    def model_id(self) -> str:
        return self._model.id

    def forward(
        self, data: Sequence[Datum], loss_fn: str, loss_fn_config: Mapping[str, float] | None = None
    ) -> APIFuture[ForwardBackwardOutput]:
        """Compute a loss and the log-probability of each target; no gradient."""
        return APIFuture(
            self._service.forward_backward(
                self._model, list(data), loss_fn, loss_fn_config, needs_gradient=False
            )
        )

    def forward_backward(
        self, data: Sequence[Datum], loss_fn: str, loss_fn_config: Mapping[str, float] | None = None
    ) -> APIFuture[ForwardBackwardOutput]:
        """The same, and add the loss's gradient, a sum over tokens, to what has accumulated
        since the last ``optim_step``.
        """
        return APIFuture(
            self._service.forward_backward(self._model, list(data), loss_fn, loss_fn_config)
        )

    def forward_backward_custom(
        self, data: Sequence[Datum], loss_fn: Any, *, loss_type_input: str | None = None
    ) -> APIFuture[ForwardBackwardOutput]:
        """The same for a loss of your own, which runs in another thread.

        Args:
            loss_fn: ``loss_fn(data, logprobs)`` returns (scalar tensor, metrics); ``logprobs`` has
                a tensor for each Datum. With ``loss_type_input="vocabulary"`` it is
                ``loss_fn(number, first, logprobs)``, called for chunks of each Datum with the
                log-probabilities of the whole vocabulary, (positions, V) from position ``first``,
                and returns a scalar to be summed.
        """
        if loss_type_input == "vocabulary":
            return APIFuture(
                self._service.forward_backward_vocabulary(self._model, list(data), loss_fn)
            )
        if loss_type_input not in (None, "logprobs"):
            raise ConfigError(
                f"loss_type_input={loss_type_input!r} is unknown; choose logprobs or vocabulary"
            )
        return APIFuture(self._service.forward_backward_custom(self._model, list(data), loss_fn))

    def optim_step(
        self, optim_params: AdamParams | None = None, *, adam_params: AdamParams | None = None
    ) -> APIFuture[OptimStepResponse]:
        """Make one step of AdamW, and start a new gradient. Its norm before clipping is in the
        figures.
        """
        params = optim_params or adam_params
        if not isinstance(params, AdamParams):
            raise ConfigError(f"optim_step takes types.AdamParams, not {type(params).__name__}")
        return APIFuture(
            self._service.optim_step(self._model, params),
            lambda metrics: OptimStepResponse(metrics),
        )

    def save_state(
        self,
        name: str,
        ttl_seconds: int | None = None,
        overwrite: bool = False,
        user_metadata: Mapping[str, str] | None = None,
    ) -> APIFuture[SavedPath]:
        """Save weights and optimiser; ``.path`` of the result is what ``load_state`` takes."""
        return self._save(SaveOptions("weights", name, overwrite, ttl_seconds, user_metadata))

    def save_weights_for_sampler(
        self,
        name: str,
        ttl_seconds: int | None = None,
        user_metadata: Mapping[str, str] | None = None,
    ) -> APIFuture[SavedPath]:
        """Save weights alone, a PEFT folder."""
        return self._save(
            SaveOptions(
                "sampler_weights", name, ttl_seconds=ttl_seconds, user_metadata=user_metadata
            )
        )

    def _save(self, wanted: SaveOptions) -> APIFuture[SavedPath]:
        return APIFuture(
            self._service.save(self._model, wanted), lambda saved: SavedPath(saved.path)
        )

    def load_state(self, path: str) -> APIFuture[SavedPath]:
        """Take up saved weights; the optimiser starts anew."""
        return APIFuture(
            self._service.load_state(self._model, path, with_optimizer=False), SavedPath
        )

    def load_state_with_optimizer(self, path: str) -> APIFuture[SavedPath]:
        """Take up saved weights and the optimiser's state."""
        return APIFuture(
            self._service.load_state(self._model, path, with_optimizer=True), SavedPath
        )

    def save_weights_and_get_sampling_client(self, name: str | None = None) -> SamplingClient:
        """Return a client that samples from the weights as they are behind what was called
        before; nothing is written.
        """
        return SamplingClient(self._service, self._service.snapshot(self._model).result())

    def create_sampling_client(self, model_path: str) -> SamplingClient:
        """Return a client that samples from saved weights."""
        return SamplingClient(self._service, self._service.weights(path=model_path).result())

    def get_info(self) -> ModelInfo:
        """Facts about the model, and what it has cost so far."""
        model, base = self._model, self._model.engine.base
        usage, training_state = self._service.usage(model), model.made()
        data = ModelData(str(base.model.config.model_type), model.base_model, base.name)
        return ModelInfo(
            data,
            model.id,
            model.base_model,
            training_state.layout.spec.rank,
            training_state.layout.num_params,
            training_state.num_steps,
            usage.tokens,
            usage.seconds,
        )

    def get_tokenizer(self) -> Any:
        """The base's tokenizer."""
        return self._model.engine.base.tokenizer

    async def forward_async(self, *args: Any, **kwargs: Any) -> APIFuture[ForwardBackwardOutput]:
        return self.forward(*args, **kwargs)

    async def forward_backward_async(
        self, *args: Any, **kwargs: Any
    ) -> APIFuture[ForwardBackwardOutput]:
        return self.forward_backward(*args, **kwargs)

    async def forward_backward_custom_async(
        self, *args: Any, **kwargs: Any
    ) -> APIFuture[ForwardBackwardOutput]:
        return self.forward_backward_custom(*args, **kwargs)

    async def optim_step_async(self, *args: Any, **kwargs: Any) -> APIFuture[OptimStepResponse]:
        return self.optim_step(*args, **kwargs)

    async def save_state_async(self, *args: Any, **kwargs: Any) -> APIFuture[SavedPath]:
        return self.save_state(*args, **kwargs)

    async def save_weights_for_sampler_async(
        self, *args: Any, **kwargs: Any
    ) -> APIFuture[SavedPath]:
        return self.save_weights_for_sampler(*args, **kwargs)

    async def load_state_async(self, path: str) -> APIFuture[SavedPath]:
        return self.load_state(path)

    async def load_state_with_optimizer_async(self, path: str) -> APIFuture[SavedPath]:
        return self.load_state_with_optimizer(path)

    async def save_weights_and_get_sampling_client_async(
        self, name: str | None = None
    ) -> SamplingClient:
        return SamplingClient(self._service, await APIFuture(self._service.snapshot(self._model)))

    async def create_sampling_client_async(self, model_path: str) -> SamplingClient:
        return self.create_sampling_client(model_path)

    async def get_info_async(self) -> ModelInfo:
        return self.get_info()


class SamplingClient(_AsFuture):
    """Samples from weights that do not change."""

    def __init__(self, service: Service, weights: Weights) -> None:
        self._service, self._weights = service, weights

    def sample(
        self,
        prompt: ModelInput,
        num_samples: int,
        sampling_params: SamplingParams,
        include_prompt_logprobs: bool = False,
        topk_prompt_logprobs: int = 0,
        topk_sample_logprobs: int = 0,
        target_prompt_logprobs: TensorData | None = None,
        prompt_alt_tokens_k: int = 0,
        prompt_logprobs_last_n: int | None = None,
    ) -> APIFuture[SampleResponse]:
        """Generate ``num_samples`` completions of ``prompt``.

        Log-probabilities of generated tokens are those of the distribution that the temperature
        makes; those of the prompt have temperature 1. ``topk_*`` name so many of the best
        candidates for each token, as many as the vocabulary has if need be; ``prompt_alt_tokens_k``
        draws so many other tokens for each place of the prompt; ``prompt_logprobs_last_n`` scores
        so many of its last tokens alone.
        """
        return APIFuture(
            self._service.sample(
                self._weights,
                prompt,
                sampling_params,
                num_samples,
                num_best=topk_sample_logprobs,
                scores_prompt=include_prompt_logprobs,
                num_best_of_prompt=topk_prompt_logprobs,
                prompt_targets=target_prompt_logprobs,
                num_alternatives=prompt_alt_tokens_k,
                last_n=prompt_logprobs_last_n,
            )
        )

    def compute_logprobs(self, prompt: ModelInput) -> APIFuture[list[float | None]]:
        """The log-probability of each token of ``prompt`` after those before it; None for the
        first.
        """
        future = self._service.sample(
            self._weights, prompt, SamplingParams(max_tokens=0), scores_prompt=True
        )
        return APIFuture(future, lambda response: response.prompt_logprobs)

    def get_tokenizer(self) -> Any:
        """The base's tokenizer."""
        return self._weights.engine.base.tokenizer

    def get_base_model(self) -> str:
        return self._weights.base_model

    async def sample_async(self, *args: Any, **kwargs: Any) -> SampleResponse:
        return await self.sample(*args, **kwargs)

    async def compute_logprobs_async(self, prompt: ModelInput) -> list[float | None]:
        return await self.compute_logprobs(prompt)


class RestClient(_AsFuture):
    """Lists, describes and deletes what was saved."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def list_training_runs(self, limit: int = 20, offset: int = 0) -> APIFuture[list[Run]]:
        """The runs, those that were asked something last first, with the tokens and seconds that
        they have cost.
        """
        return _done(self._service.database.runs(LOCAL_OWNER, limit=limit, offset=offset)[0])

    def get_training_run(self, training_run_id: str) -> APIFuture[Run]:
        return _done(self._service.database.run(training_run_id, LOCAL_OWNER))

    def list_checkpoints(self, training_run_id: str) -> APIFuture[list[Checkpoint]]:
        run = self._service.database.run(training_run_id, LOCAL_OWNER)
        return _done(self._service.checkpoints.of_runs([run.id]))

    def delete_checkpoint_from_tinker_path(self, tinker_path: str) -> APIFuture[None]:
        self._service.checkpoints.delete(tinker_path, LOCAL_OWNER)
        return _done(None)


def _done(value: Any) -> APIFuture[Any]:
    from concurrent.futures import Future

    future: Future[Any] = Future()
    future.set_result(value)
    return APIFuture(future)

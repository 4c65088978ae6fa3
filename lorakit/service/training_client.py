"""The client that trains one adapter: Tinker's verbs, in this process."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lorakit.errors import ConfigError
from lorakit.service.checkpoints import SaveOptions
from lorakit.service.core import Service
from lorakit.service.futures import APIFuture, AsFuture
from lorakit.service.model import Model
from lorakit.service.sampling_client import SamplingClient
from lorakit.types import (
    AdamParams,
    Datum,
    ForwardBackwardOutput,
    OptimStepResponse,
    SavedPath,
)


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


class TrainingClient(AsFuture):
    """Trains one adapter. Calls run in their order; an error arrives in its call's future, and
    later calls still run.
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
        """Make one step of AdamW, and start a new gradient. Figures: its norm before clipping."""
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
        """Load saved weights; the optimiser starts anew."""
        return APIFuture(
            self._service.load_state(self._model, path, with_optimizer=False), SavedPath
        )

    def load_state_with_optimizer(self, path: str) -> APIFuture[SavedPath]:
        """Load saved weights and the optimiser's state."""
        return APIFuture(
            self._service.load_state(self._model, path, with_optimizer=True), SavedPath
        )

    def save_weights_and_get_sampling_client(self, name: str | None = None) -> SamplingClient:
        """Return a client that samples from the weights as they are after what was called
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

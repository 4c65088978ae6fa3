"""The client that samples from weights that do not change."""

from __future__ import annotations

from typing import Any

from lorakit.service.core import Service
from lorakit.service.futures import APIFuture, AsFuture
from lorakit.service.model import Weights
from lorakit.types import (
    ModelInput,
    SampleResponse,
    SamplingParams,
    TensorData,
)


class SamplingClient(AsFuture):
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
        makes; those of the prompt have temperature 1. ``topk_*`` is how many of the best
        candidates for each token, as many as the vocabulary has if need be; ``prompt_alt_tokens_k``
        draws that number of other tokens for each place of the prompt; ``prompt_logprobs_last_n``
        scores that number of its last tokens alone.
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
        """The log-probability of each token of ``prompt``; None for the first."""
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

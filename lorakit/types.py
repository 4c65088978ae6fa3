"""The records that travel through lorakit, and the legend of shapes.

Shape suffixes: ``B`` rows of a batch, ``L`` positions of a row, ``N`` trained positions, ``V``
vocabulary, ``E`` experts, ``R`` LoRA rank, ``I`` inputs of a matrix, ``O`` outputs of a matrix. So
``logits_NV`` is (trained positions, vocabulary).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from lorakit.errors import DataError
from lorakit.model_input import Chunk as Chunk
from lorakit.model_input import EncodedTextChunk as EncodedTextChunk
from lorakit.model_input import Given, ModelInput, TensorData
from lorakit.model_input import ImageChunk as ImageChunk

if TYPE_CHECKING:
    import torch

_DTYPES: dict[str, Any] = {"target_tokens": np.int64}
SEVERAL_PER_POSITION = ("target_tokens", "weights")  # loss inputs that may have a second dimension


class Datum:
    """One example in Tinker's shape: what the model reads, and per position what the loss needs.

    ``loss_fn_inputs`` holds arrays of ``model_input.length`` entries: ``target_tokens`` (already
    shifted: the token that position i must predict), ``weights``, and what other losses take;
    targets and weights may have a second dimension of several targets per position. They are
    read-only here; a Datum is never changed after it is made.

    >>> datum = Datum(ModelInput.from_ints([5, 6]), {"target_tokens": [6, 7], "weights": [0, 1]})
    >>> datum.weights.tolist()
    [0.0, 1.0]
    """

    __slots__ = ("loss_fn_inputs", "model_input", "origin")

    def __init__(
        self,
        model_input: ModelInput,
        loss_fn_inputs: Mapping[str, Given],
        *,
        origin: int | None = None,
    ) -> None:
        self.model_input = model_input
        self.origin = origin  # which of several sources of data it is from: for figures alone
        self.loss_fn_inputs: dict[str, TensorData] = {}
        for name, values in loss_fn_inputs.items():
            try:
                given = TensorData(values)
            except (TypeError, ValueError, OverflowError) as error:
                raise DataError(
                    f"loss_fn_inputs[{name!r}] is not an array of numbers: {error}"
                ) from error
            if given.size and given.dtype.kind not in "iufb":
                raise DataError(
                    f"loss_fn_inputs[{name!r}] is not an array of numbers, but of {given.dtype}"
                )
            with np.errstate(over="ignore", invalid="ignore"):
                array = given.astype(_DTYPES.get(name, np.float32)).view(TensorData)
            if (
                name == "target_tokens"
                and given.dtype.kind != "i"
                and not np.array_equal(array, given)
            ):
                raise DataError(f"loss_fn_inputs[{name!r}] must be whole numbers")
            if array.shape[:1] != (model_input.length,) or array.ndim > (
                2 if name in SEVERAL_PER_POSITION else 1
            ):
                several = " or several" if name in SEVERAL_PER_POSITION else ""
                raise DataError(
                    f"loss_fn_inputs[{name!r}] has shape {array.shape}, but model_input has"
                    f" {model_input.length} positions: one number{several} for each"
                )
            array.flags.writeable = False
            self.loss_fn_inputs[name] = array

    @property
    def targets(self) -> TensorData:
        """Token to predict at each position, (L,) or (L, K) int64."""
        return self.loss_fn_inputs["target_tokens"]

    @property
    def weights(self) -> TensorData:
        """Loss weight of each target, float32."""
        return self.loss_fn_inputs["weights"]

    @property
    def advantages(self) -> TensorData:
        """How much better than expected the target was, (L,) float32."""
        return self.loss_fn_inputs["advantages"]

    def __len__(self) -> int:
        return self.model_input.length

    def __repr__(self) -> str:
        return f"Datum({len(self)} positions, {', '.join(self.loss_fn_inputs)})"


@dataclass(frozen=True)
class Cursor:
    """Where a stream of batches stands: enough to continue from exactly there."""

    epoch: int = 0
    window_start: int = 0  # rows of the epoch's order that come before the current window
    batches_done: int = 0  # batches of that window already given out

    def to_dict(self) -> dict[str, int]:
        return asdict(self)


@dataclass(frozen=True)
class Images:
    """The images of a batch, one after the other in the order of their rows, as the model's
    vision tower takes them.
    """

    patches_PD: torch.Tensor  # all patches of all images, float32
    grids_N3: torch.Tensor  # of each image: frames, and patches down and across, int64

    def to(self, device: torch.device | str) -> Images:
        return Images(self.patches_PD.to(device), self.grids_N3.to(device))


@dataclass(frozen=True)
class Batch:
    """Datums as tensors. Padding is on the right, with weight 0; a row may hold several documents.

    ``position_ids`` is None for rows of one document, else it restarts at 0 with each document (and
    with the padding), which is how transformers isolates packed documents from one another
    (attention mask and cache must be absent). With images it is (4, B, L): the place in the
    document, then time, height and width (M-RoPE).

    Where several processes share each row, L is the length of this one's ``position_range``, and
    ``position_ids`` are given.
    """

    input_ids: torch.Tensor  # (B, L) int64
    targets: torch.Tensor  # (B, L) int64, or (B, L, K) with several targets per position
    weights: torch.Tensor  # as targets, float32
    position_ids: torch.Tensor | None  # (B, L) or (4, B, L) int64
    # per Datum: row, first position, one past the last, in whole rows
    spans: tuple[tuple[int, int, int], ...]
    # sum of |weights| over the whole accumulation window: the loss's denominator
    window_weight: float = 0.0
    cursor: Cursor | None = None  # the stream's state after this batch
    # first position of each row that is here, and one past the last; None: all are
    position_range: tuple[int, int] | None = None
    extras: dict[str, torch.Tensor] = field(default_factory=dict)  # further loss inputs, (B, L)
    images: Images | None = None
    # per span, how many of them are its own; empty where there is none
    num_images: tuple[int, ...] = ()
    num_pairs: int = 0  # where each two spans are a pair of a better and a worse answer: how many
    # per span, which of several sources of data it is from; empty where there is one
    origins: tuple[int, ...] = ()

    @cached_property
    def weight(self) -> float:
        """Sum of |weights| of this batch."""
        return float(self.weights.abs().sum())

    @property
    def denominator(self) -> float:
        """This batch's share of ``window_weight``: its weight, or its pairs."""
        return float(self.num_pairs) if self.num_pairs else self.weight

    @cached_property
    def trained_positions(self) -> torch.Tensor:
        """Where in the flattened (B * L) positions a weight is not 0, (N,) int64."""
        weights = self.weights if self.weights.ndim == 2 else self.weights.abs().amax(dim=-1)
        return weights.flatten().nonzero()[:, 0]

    @cached_property
    def origin_ids(self) -> torch.Tensor:
        """Which source of data each position is from, (B, L) int64; 0 in the padding."""
        return self._by_span(self.origins, 0)

    @cached_property
    def span_ids(self) -> torch.Tensor:
        """The number of each position's span, (B, L) int64; in the padding, the number of spans."""
        return self._by_span(range(len(self.spans)), len(self.spans))

    def _by_span(self, values: Sequence[int], padding: int) -> torch.Tensor:
        import torch

        first, last = self.position_range or (0, self.input_ids.shape[1])
        ids = np.full(self.input_ids.shape, padding, np.int64)
        for (row, start, end), value in zip(self.spans, values, strict=True):
            ids[row, max(start, first) - first : max(min(end, last) - first, 0)] = value
        return torch.from_numpy(ids)

    def with_extra(self, name: str, values: torch.Tensor) -> Batch:
        """This batch with one more loss input, (B, L); what was found out of it is kept."""
        wider = replace(self, extras={**self.extras, name: values})
        wider.__dict__.update(
            {key: value for key, value in vars(self).items() if key not in wider.__dict__}
        )
        return wider

    @property
    def spans_here(self) -> list[tuple[int, int, int]]:
        """``spans`` within this process's positions, counted from the first of these."""
        first, last = self.position_range or (0, self.input_ids.shape[1])
        clipped = (
            (row, max(start, first) - first, min(end, last) - first)
            for row, start, end in self.spans
        )
        return [(row, start, end) for row, start, end in clipped if start < end]

    @property
    def num_tokens(self) -> int:
        """Positions that hold a token of some document."""
        return sum(end - start for _, start, end in self.spans_here)

    @property
    def num_trained_tokens(self) -> int:
        """Positions with a weight other than 0."""
        return len(self.trained_positions)

    @property
    def padding_share(self) -> float:
        """Share of positions that hold only padding."""
        return 1.0 - self.num_tokens / self.input_ids.numel()

    def tensors(self) -> dict[str, torch.Tensor]:
        """All tensors by name, on the CPU."""
        named = {
            "input_ids": self.input_ids,
            "targets": self.targets,
            "weights": self.weights,
            **self.extras,
        }
        if self.position_ids is not None:
            named["position_ids"] = self.position_ids
        if self.images is not None:
            named |= {"patches": self.images.patches_PD, "grids": self.images.grids_N3}
        return {name: tensor.detach().cpu() for name, tensor in named.items()}

    def to(self, device: torch.device | str) -> Batch:
        """Return this batch on ``device``. What would make a device wait is found out before."""
        moved = replace(
            self,
            input_ids=self.input_ids.to(device),
            targets=self.targets.to(device),
            weights=self.weights.to(device),
            position_ids=None if self.position_ids is None else self.position_ids.to(device),
            extras={name: tensor.to(device) for name, tensor in self.extras.items()},
            images=None if self.images is None else self.images.to(device),
        )
        moved.__dict__.update(
            weight=self.weight, trained_positions=self.trained_positions.to(device)
        )
        if self.origins:
            moved.__dict__.update(origin_ids=self.origin_ids.to(device))
        if self.num_pairs:
            moved.__dict__.update(span_ids=self.span_ids.to(device))
        return moved


@dataclass(frozen=True)
class LossOutput:
    """What a loss returns: a sum, never a mean, so that one place can divide by the weight of
    the whole window.
    """

    loss_sum: torch.Tensor  # scalar, with graph
    # as the targets, float32: log-probability of each; NaN where it was not computed; detached
    logprobs: torch.Tensor
    # numbers, or scalar tensors: sums, as the loss; the same names in each call
    metrics: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class AdamParams:
    """One step of AdamW with decoupled weight decay. ``grad_clip_norm`` 0 does not clip.

    Raises:
        DataError: numbers with which a step would be wrong; with eps=0 the first one is 0 / 0 for
            every weight of A.
    """

    learning_rate: float = 1e-4
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-12
    weight_decay: float = 0.0
    grad_clip_norm: float = 0.0

    def __post_init__(self) -> None:
        limits = {
            "learning_rate": self.learning_rate >= 0,
            "beta1": 0 <= self.beta1 < 1,
            "beta2": 0 <= self.beta2 < 1,
            "eps": self.eps > 0,
            "weight_decay": self.weight_decay >= 0,
            "grad_clip_norm": True,
        }
        values = asdict(self)
        bad = [name for name in values if not (limits[name] and math.isfinite(values[name]))]
        if bad:
            said = ", ".join(f"{name}={values[name]}" for name in bad)
            raise DataError(
                f"AdamParams: {said}; betas are from 0 to below 1, eps is above 0, the others are 0"
                " or more"
            )


@dataclass(frozen=True)
class SamplingParams:
    """How to sample. Temperature 0 is greedy.

    ``stop`` None ends at EOS. Strings end there as well, tokens instead; ``[]``: nothing ends it
    but length.
    """

    max_tokens: int | None = 256
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    seed: int | None = None
    stop: str | Sequence[str] | Sequence[int] | None = None


@dataclass(frozen=True)
class Sample:
    """One completion: its tokens, its text without the stop string, and why it ended (``stop``
    or ``length``).
    """

    tokens: list[int]
    text: str
    stop_reason: str
    logprobs: list[float] | None = None  # of each token, in the distribution that temperature makes
    # of each token: (candidate, log-probability), best first
    topk_logprobs: list[list[tuple[int, float]]] | None = None


@dataclass(frozen=True)
class SampleResponse:
    """The completions of one prompt. What is said of the prompt is None unless asked for; its
    first token has no log-probability.
    """

    sequences: list[Sample]
    prompt_logprobs: list[float | None] | None = None
    topk_prompt_logprobs: list[list[tuple[int, float]] | None] | None = None
    target_prompt_logprobs: TensorData | None = None  # (prompt - 1, K), 0 where -1 was asked for
    # draws at each place after the first, and their logprobs
    prompt_alt_tokens: tuple[TensorData, TensorData] | None = None


@dataclass(frozen=True)
class ForwardBackwardOutput:
    """What a loss returns for each Datum (``logprobs``, shaped as its targets), and figures
    called ``name:reduction``.
    """

    loss_fn_outputs: list[dict[str, TensorData]]
    metrics: dict[str, float]
    loss_fn_output_type: str = "ArrayRecord"


@dataclass(frozen=True)
class OptimStepResponse:
    """Figures of an optimiser step."""

    metrics: dict[str, float]


@dataclass(frozen=True)
class SavedPath:
    """Where something was saved: ``tinker://RUN/weights/NAME`` or ``…/sampler_weights/NAME``."""

    path: str

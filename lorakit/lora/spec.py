"""What the user says about LoRA, and its checks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from lorakit.errors import ConfigError

Switch = bool | Literal["auto"]
# PEFT's inits that take the adapter's start out of the base's weights: the adapter then fits only
# that changed base, so that sampling, merging or serving it on the original gives wrong logits
# without a word.
BASE_CHANGING_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")
# of the factors of stacked experts
LAYOUTS = PER_EXPERT, SHARED_OUTER = ("per_expert", "shared_outer")
INITS = ("default", "gaussian", "orthogonal")


@dataclass(frozen=True, kw_only=True)
class LoRASpec:
    """Which matrices get an adapter, and how it is made.

    Args:
        rank: inner width of A and B.
        alpha: the adapter's output is scaled by ``alpha / rank`` (by ``alpha / sqrt(rank)`` with
            ``rslora``).
        dropout: probability of zeroing an input of A while training.
        init: how A and B start; ``default`` is Kaiming-uniform A and zero B.
        dora: decompose into magnitude and direction (PEFT's DoRA), on linear layers only.
        attention, mlp, experts, unembedding: families of matrices. True must match something,
            ``auto`` may match nothing.
        vision, merger: the same of a vision tower, and of what brings its output to the language
            model's width.
        expert_layout: ``per_expert`` gives each expert its own A and B, as PEFT does;
            ``shared_outer`` shares the factor that touches the hidden width among all experts of a
            layer, as Tinker does: far fewer parameters.
        targets: names, suffixes or patterns (``*.layers.0.*``) of matrices; where given, they alone
            decide.
        dtype: of the adapter while training.
        seed: of the initialisation.
        init_from: a PEFT adapter folder to start from.
        any_base: let ``init_from`` come from a base of another name.
        token_ids: tokens whose rows in embedding and unembedding are trained beside the adapter.
    """

    rank: int = 32
    alpha: float = 32.0
    rslora: bool = False
    dropout: float = 0.0
    init: str = "default"
    dora: bool = False
    attention: Switch = True
    mlp: Switch = "auto"
    experts: Switch = "auto"
    unembedding: Switch = False
    vision: Switch = False
    merger: Switch = False
    expert_layout: str = "per_expert"
    targets: Sequence[str] | None = None
    dtype: str = "float32"
    seed: int = 0
    init_from: str | None = None
    any_base: bool = False
    token_ids: Sequence[int] = ()

    def __post_init__(self) -> None:
        problems = []
        if self.rank < 1:
            problems.append(f"lora.rank={self.rank} must be at least 1")
        if self.alpha <= 0:
            problems.append(f"lora.alpha={self.alpha} must be more than 0")
        if not 0 <= self.dropout < 1:
            problems.append(f"lora.dropout={self.dropout} must be at least 0 and less than 1")
        if self.init not in INITS:
            why = "is unknown"
            if self.init in BASE_CHANGING_INITS:
                why = "changes the base, which then is no longer the model's"
            problems.append(f"lora.init={self.init} {why}; choose one of {', '.join(INITS)}")
        if self.expert_layout not in LAYOUTS:
            problems.append(
                f"lora.expert_layout={self.expert_layout} is unknown; choose one of"
                f" {', '.join(LAYOUTS)}"
            )
        if self.dtype not in ("float32", "bfloat16"):
            problems.append(f"lora.dtype={self.dtype} is unknown; choose float32 or bfloat16")
        for family in ("attention", "mlp", "experts", "unembedding", "vision", "merger"):
            if getattr(self, family) not in (True, False, "auto"):
                problems.append(
                    f"lora.{family}={getattr(self, family)} is unknown; choose true, false or auto"
                )
        if isinstance(self.targets, str):
            problems.append(
                f"lora.targets={self.targets} must be a list, for instance [{self.targets}]"
            )
        problems += self._find_idle()
        if problems:
            raise ConfigError("\n".join(problems))

    def _find_idle(self) -> list[str]:
        """Settings that another one leaves without effect."""
        idle = []
        if self.init_from and self.init != "default":
            idle.append(
                f"lora.init={self.init} has no effect beside lora.init_from; leave one of them out"
            )
        if self.token_ids and self.unembedding is True:
            idle.append(
                "lora.unembedding=true does not go with rows of the unembedding that are trained"
                " (model.add_tokens)"
            )
        if self.any_base and not self.init_from:
            idle.append("lora.any_base=true has no effect without lora.init_from")
        if self.targets:
            idle += [
                f"lora.{name}=true has no effect beside lora.targets, which alone decide"
                for name in ("mlp", "experts", "unembedding", "vision", "merger")
                if getattr(self, name) is True
            ]
        return idle

    @property
    def scale(self) -> float:
        """The factor s of ``y = W x + s B A x``."""
        return self.alpha / (self.rank**0.5 if self.rslora else self.rank)

"""Every family whose experts transformers stacks: factored adapters against the family's own
forward with W + s B A.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from test_expert_function import (
    EXPERTS,
    FORMS,
    HIDDEN,
    TOP_K,
    WIDTH,
    all_gradients,
    dense,
    factored,
    make_factors,
    make_inputs,
)
from tiny_models import relative_l2

from lorakit.model.families import ExpertStack

# Normalised behind the second product: its adapter is PEFT's own, which is slower.
UNSUPPORTED = {"muse_spark.MuseSparkExperts"}
# Whatever their dtype, these compute their activation in float32.
IN_FLOAT32 = {
    "beam.BeamExperts",
    "inkling2.Inkling2Experts",
    "openai_privacy_filter.OpenAIPrivacyFilterExperts",
}


class _AnyConfig(SimpleNamespace):
    """A config with the names that families give to the same sizes; what else they ask for is
    absent.
    """

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return None


def make_config() -> Any:
    sizes = dict.fromkeys(
        ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), EXPERTS
    )
    sizes |= dict.fromkeys(
        ("moe_intermediate_size", "intermediate_size", "expert_ffn_hidden_size", "ffn_hidden_size"),
        WIDTH,
    )
    sizes |= {"hidden_size": HIDDEN, "moe_hidden_size": HIDDEN, "num_experts_per_tok": TOP_K}
    numbers = {
        "swiglu_limit": 7.0,
        "swiglu_alpha": 1.7,
        "mlp_gate_softcap": 5.0,
        "mlp_up_softcap": 4.0,
        "post_norm_eps": 1e-6,
    }
    activations = {"hidden_act": "silu", "hidden_activation": "silu", "mlp_hidden_act": "relu2"}
    return _AnyConfig(**sizes, **numbers, **activations, _experts_implementation="eager")


def expert_classes() -> Iterator[tuple[str, Any]]:
    """Yield (name, class) of all that bear ``use_experts_implementation``, whose ``__init__``
    closes over its arguments.
    """
    for path in sorted(Path(transformers.__file__).parent.glob("models/*/modeling_*.py")):
        if "@use_experts_implementation" not in path.read_text(encoding="utf-8"):
            continue
        module = importlib.import_module(f"transformers.models.{path.parent.name}.{path.stem}")
        for name, member in vars(module).items():
            is_own = (
                isinstance(member, type)
                and member.__module__ == module.__name__
                and "__init__" in vars(member)
            )
            if is_own and "is_transposed" in vars(member)["__init__"].__code__.co_freevars:
                yield f"{path.parent.name}.{name}", member


@pytest.mark.slow
def test_the_factored_experts_equal_every_family_of_transformers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found, unsupported, different = [], set(), []
    for name, build in expert_classes():
        found.append(name)
        experts = build(make_config()).double().requires_grad_(False)
        generator = torch.Generator().manual_seed(0)
        for parameter in experts.parameters():
            parameter.data.copy_(
                torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.3
            )
        if not ExpertStack.supports(experts):
            unsupported.add(name)
            continue
        stack = ExpertStack(experts)
        is_transposed = experts.down_proj.shape[1] == WIDTH  # (E, in, out); H, I and 2 I differ
        gates = (
            ("concatenated" if experts.is_concatenated else "interleaved")
            if hasattr(experts, "gate_up_proj")
            else None
        )
        monkeypatch.setitem(FORMS, name, (is_transposed, gates))
        for shares_outer in (False, True):
            inputs = make_inputs(torch.float64)
            factors = make_factors(stack, torch.float64, shares_outer=shares_outer)
            ours = all_gradients(
                factored(stack, inputs, factors, shares_outer=shares_outer, products="loop"),
                inputs,
                factors,
            )
            theirs = all_gradients(
                dense(stack, name, inputs, factors, shares_outer=shares_outer), inputs, factors
            )
            distance = max(relative_l2({key: ours[key]}, {key: theirs[key]}) for key in ours)
            if distance > (1e-6 if name in IN_FLOAT32 else 1e-10):
                different.append((name, shares_outer, distance))
    assert len(found) >= 60
    assert different == []
    assert unsupported == UNSUPPORTED

"""The factored experts against dense W + s B A, expert by expert in float64: outputs and every gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from tiny_models import relative_l2
from torch.utils._python_dispatch import TorchDispatchMode

from lorakit.lora.expert_function import ExpertCall, ExpertFunction, Part
from lorakit.lora.layouts import expand_shared_outer
from lorakit.model.families import ExpertStack

HIDDEN, WIDTH, EXPERTS, TOP_K, TOKENS = 32, 24, 6, 2, 20
SCALE = 0.7
_TEXT = {"hidden_size": HIDDEN, "moe_intermediate_size": WIDTH, "num_experts": EXPERTS, "num_experts_per_tok": TOP_K}
# Family -> (module, class of its experts, config): plain, transposed with biases and interleaved gates, without a gate.
FAMILIES: dict[str, tuple[str, str, Any]] = {
    "qwen3_moe": ("qwen3_moe", "Qwen3MoeExperts", transformers.Qwen3MoeConfig(**_TEXT)),
    "qwen3_vl_moe": ("qwen3_vl_moe", "Qwen3VLMoeTextExperts", transformers.Qwen3VLMoeTextConfig(**_TEXT)),
    "qwen3_5_moe": ("qwen3_5_moe", "Qwen3_5MoeExperts", transformers.Qwen3_5MoeTextConfig(**_TEXT)),
    "mixtral": (
        "mixtral",
        "MixtralExperts",
        transformers.MixtralConfig(hidden_size=HIDDEN, intermediate_size=WIDTH, num_local_experts=EXPERTS),
    ),
    "gpt_oss": (
        "gpt_oss",
        "GptOssExperts",
        transformers.GptOssConfig(hidden_size=HIDDEN, intermediate_size=WIDTH, num_local_experts=EXPERTS),
    ),
    "nemotron_h": (
        "nemotron_h",
        "NemotronHExperts",
        transformers.NemotronHConfig(hidden_size=HIDDEN, moe_intermediate_size=WIDTH, n_routed_experts=EXPERTS),
    ),
}


def make_experts(family: str = "qwen3_moe", dtype: torch.dtype = torch.float64) -> Any:
    """A family's experts with random weights, frozen."""
    module, name, config = FAMILIES[family]
    config._experts_implementation = "eager"
    experts = getattr(getattr(transformers.models, module), f"modeling_{module}").__dict__[name](config).to(dtype)
    generator = torch.Generator().manual_seed(0)
    for parameter in experts.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.3)
    return experts.requires_grad_(False)


def make_inputs(dtype: torch.dtype, tokens: int = TOKENS, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens, their experts, and the router's weights."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, HIDDEN, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    experts = torch.rand(tokens, EXPERTS, generator=generator).topk(TOP_K).indices
    weights = torch.rand(tokens, TOP_K, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    return x, experts, weights


def make_factors(
    stack: ExpertStack, dtype: torch.dtype, *, rank: int = 3, shares_outer: bool = False
) -> dict[str, torch.Tensor]:
    """Random factors by name: ``gate_up_proj.A`` and so on."""
    generator = torch.Generator().manual_seed(2)
    factors = {}
    for matrix, (_, *shapes) in stack.factor_shapes({stack.first: rank, stack.second: rank}, shares_outer=shares_outer).items():
        for which, shape in zip("AB", shapes, strict=True):
            values = torch.randn(shape, generator=generator, dtype=torch.float64) * 0.3
            factors[f"{matrix}.{which}"] = values.to(dtype).requires_grad_()
    return factors


def factored(
    stack: ExpertStack, inputs: Any, factors: dict[str, torch.Tensor], *, shares_outer: bool = False, products: str = "auto"
) -> torch.Tensor:
    """The output by lorakit."""
    x, experts, weights = inputs
    matrices = list(dict.fromkeys(name[:-2] for name in factors))
    parts = [(stack.parameter_of(m), Part(i, stack.columns(m), SCALE, shares_outer)) for i, m in enumerate(matrices)]
    call = ExpertCall(
        stack.weights, stack.biases, stack.activate, experts, stack.num_experts,
        tuple(part for parameter, part in parts if parameter == stack.first),
        tuple(part for parameter, part in parts if parameter == stack.second),
        products=products,
    )  # fmt: skip
    return ExpertFunction.apply(x, weights, call, *factors.values())


def dense(stack: ExpertStack, inputs: Any, factors: dict[str, torch.Tensor], *, shares_outer: bool = False) -> torch.Tensor:
    """The same by W + s B A for every expert and one matrix-vector product for each pair of token and expert."""
    pairs = {(f"lora_{name[-1]}", name[:-2]): tensor for name, tensor in factors.items()}
    if shares_outer:
        pairs = expand_shared_outer(pairs, is_concatenated=stack.module.is_concatenated)
    matrices = {}
    for parameter in (stack.first, stack.second):
        weight = stack.weight(parameter)
        weight_EOI = weight.transpose(1, 2) if stack.module.is_transposed else weight
        delta = torch.einsum("eor,eri->eoi", pairs["lora_B", parameter], pairs["lora_A", parameter])
        matrices[parameter] = weight_EOI + SCALE * delta
    (b1, b2), (x, experts, weights) = stack.biases(), inputs
    rows = []
    for token in range(len(x)):
        total = torch.zeros(HIDDEN, dtype=x.dtype)
        for choice in range(experts.shape[1]):
            e = experts[token, choice]
            hidden = matrices[stack.first][e] @ x[token] + (0 if b1 is None else b1[e])
            y = matrices[stack.second][e] @ stack.activate(hidden[None])[0] + (0 if b2 is None else b2[e])
            total = total + weights[token, choice] * y
        rows.append(total)
    return torch.stack(rows)


def all_gradients(output: torch.Tensor, inputs: Any, factors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Output and gradients under a fixed random gradient of the output."""
    gradient = torch.randn(output.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64).to(output.dtype)
    wanted = {"x": inputs[0], "weights": inputs[2], **factors}
    found = torch.autograd.grad(output, list(wanted.values()), gradient)
    return {"output": output.detach(), **dict(zip(wanted, found, strict=True))}


def compare(family: str, dtype: torch.dtype, products: str, *, shares_outer: bool, inputs: Any = None, rank: int = 3) -> float:
    """The largest relative L2 distance to the dense reference, of the output and of each gradient."""
    stack = ExpertStack(make_experts(family, dtype))
    inputs = inputs or make_inputs(dtype)
    factors = make_factors(stack, dtype, rank=rank, shares_outer=shares_outer)
    ours = all_gradients(factored(stack, inputs, factors, shares_outer=shares_outer, products=products), inputs, factors)
    theirs = all_gradients(dense(stack, inputs, factors, shares_outer=shares_outer), inputs, factors)
    return max(relative_l2({name: ours[name]}, {name: theirs[name]}) for name in ours)


@pytest.mark.parametrize("shares_outer", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_loop_equals_dense_matrices_in_float64(family: str, shares_outer: bool) -> None:
    assert compare(family, torch.float64, "loop", shares_outer=shares_outer) < 1e-10


@pytest.mark.parametrize("rank", [1, 3, 4, 8])
@pytest.mark.parametrize("shares_outer", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_grouped_products_equal_dense_matrices_at_any_rank(family: str, shares_outer: bool, rank: int) -> None:
    assert compare(family, torch.float32, "grouped", shares_outer=shares_outer, rank=rank) < 1e-5
    assert compare(family, torch.float32, "loop", shares_outer=shares_outer, rank=rank) < 1e-5


def _routes() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(4)
    free = torch.rand(TOKENS, EXPERTS, generator=generator).topk(TOP_K).indices
    return {
        "one token": free[:1],
        "experts without a token": free % 2 + torch.tensor([0, 2]),
        "one expert gets all": torch.full((TOKENS, 1), 3),
        "the same expert twice": free[:, :1].repeat(1, 2),
        "all experts for every token": torch.arange(EXPERTS).repeat(TOKENS, 1),
    }


@pytest.mark.parametrize("shares_outer", [False, True])
@pytest.mark.parametrize("route", _routes())
def test_odd_routes(route: str, shares_outer: bool) -> None:
    experts = _routes()[route]
    for dtype, products, tolerance in ((torch.float64, "loop", 1e-10), (torch.float32, "grouped", 1e-5)):
        x, _, _ = make_inputs(dtype, tokens=len(experts))
        weights = torch.rand(experts.shape, generator=torch.Generator().manual_seed(5)).to(dtype).requires_grad_()
        difference = compare("qwen3_moe", dtype, products, shares_outer=shares_outer, inputs=(x, experts, weights))
        assert difference < tolerance


class _LargestTensor(TorchDispatchMode):
    """Remembers the largest tensor that any operation made, views aside."""

    def __init__(self) -> None:
        super().__init__()
        self.num_elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        known = {a.untyped_storage().data_ptr() for a in args if isinstance(a, torch.Tensor)}
        for tensor in result if isinstance(result, (list, tuple)) else [result]:
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in known:
                self.num_elements = max(self.num_elements, tensor.untyped_storage().nbytes() // tensor.element_size())
        return result


@pytest.mark.parametrize("products", ["loop", "grouped"])
@pytest.mark.parametrize("shares_outer", [False, True])
def test_no_tensor_of_the_size_of_the_stack_is_ever_made(products: str, shares_outer: bool) -> None:
    stack = ExpertStack(make_experts(dtype=torch.float32))
    inputs, factors = make_inputs(torch.float32, tokens=2), make_factors(stack, torch.float32, shares_outer=shares_outer)
    with _LargestTensor() as ours:
        all_gradients(factored(stack, inputs, factors, shares_outer=shares_outer, products=products), inputs, factors)
    with _LargestTensor() as theirs:  # the control: the dense form makes it
        all_gradients(dense(stack, inputs, factors, shares_outer=shares_outer), inputs, factors)
    stack_size = min(stack.weight(name).numel() for name in (stack.first, stack.second))
    assert ours.num_elements < 0.5 * stack_size <= stack_size <= theirs.num_elements


@pytest.mark.parametrize("products", ["loop", "grouped"])
def test_bf16_keeps_the_adapter_that_folding_rounds_away(products: str) -> None:
    """At |dW| / |W| = 1e-3 the fold's delta is 80% wrong in bf16; factored it is not."""
    exact, half = ExpertStack(make_experts()), ExpertStack(make_experts(dtype=torch.bfloat16))
    for name in (exact.first, exact.second):  # the base is the same number for number
        exact.weight(name).data.copy_(half.weight(name).data)
    inputs = tuple(t.detach().to(torch.bfloat16) if t.is_floating_point() else t for t in make_inputs(torch.float64))
    wide = tuple(t.double() if t.is_floating_point() else t for t in inputs)
    factors = {
        name: t.detach() * (0.1 if name.endswith("B") else 0.05) for name, t in make_factors(exact, torch.float64).items()
    }
    none = {name: torch.zeros_like(t) if name.endswith("B") else t for name, t in factors.items()}
    delta = dense(exact, wide, factors) - dense(exact, wide, none)
    ours = [factored(half, inputs, {n: t.float() for n, t in f.items()}, products=products).double() for f in (factors, none)]
    weights = {name: half.weight(name).data.clone() for name in (half.first, half.second)}
    assert float((ours[0] - ours[1] - delta).norm() / dense(exact, wide, none).norm()) < 5e-3
    assert all(torch.equal(half.weight(name), before) for name, before in weights.items())


def test_what_needs_no_gradient_gets_none() -> None:
    stack = ExpertStack(make_experts())
    x, experts, weights = make_inputs(torch.float64)
    factors = make_factors(stack, torch.float64)
    factors["gate_up_proj.A"].requires_grad_(False)
    output = factored(stack, (x.detach(), experts, weights.detach()), factors)
    output.sum().backward()
    assert x.grad is None and weights.grad is None and factors["gate_up_proj.A"].grad is None
    assert all(factors[name].grad is not None for name in ("gate_up_proj.B", "down_proj.A", "down_proj.B"))
    with torch.no_grad():
        assert not factored(stack, (x, experts, weights), factors).requires_grad

"""Wrap a model with the planned adapters and freeze the rest. PEFT is the container: its config,
its modules, its file format.
"""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch

from lorakit.lora.plan import LoRAPlan, matches, plan_lora
from lorakit.lora.spec import PER_EXPERT, SHARED_OUTER, LoRASpec
from lorakit.model.families import ExpertStack, find_targets
from lorakit.model.partition import own_weight, whole

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel

    from lorakit.lora.experts import ExpertLoraConfig


def inject(
    model: Any, spec: LoRASpec, *, base_name: str | None = None, adapter_name: str = "default"
) -> PeftModel:
    """Return ``model`` wrapped by PEFT, with exactly the planned adapters trainable and everything
    else frozen.

    The base's parameters are not copied. The global random state is as before.
    """
    import peft

    from lorakit.lora.tokens import use_token_rows

    planned = plan_lora(model, spec)
    model.requires_grad_(False)
    config = to_peft_config(planned, base_name=base_name)
    config.register(model)
    # Drawn on the CPU, whatever device Lightning makes the default for a model: the same adapter
    # everywhere.
    rows = [own_weight(model.get_submodule(name)) for name in planned.row_modules]
    with (
        torch.device("cpu"),
        torch.random.fork_rng(devices=[]),
        warnings.catch_warnings(),
        whole(rows),
        _rows_are_here(rows),
    ):
        warnings.simplefilter("ignore", UserWarning)  # about the base's name, which is set below
        # torch.manual_seed would start every GPU's generator anew too
        torch.default_generator.manual_seed(spec.seed)
        wrapped: Any = peft.get_peft_model(
            model, config, adapter_name=adapter_name, autocast_adapter_dtype=False
        )
    # PEFT puts the folder it was loaded from
    wrapped.peft_config[adapter_name].base_model_name_or_path = base_name
    use_token_rows(wrapped)
    dtype = getattr(torch, spec.dtype)
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
    num_trainable = sum(p.numel() for p in wrapped.parameters() if p.requires_grad)
    assert num_trainable == planned.num_params, (num_trainable, planned.num_params)
    return wrapped


def to_peft_config(planned: LoRAPlan, *, base_name: str | None = None) -> ExpertLoraConfig:
    """Return the PEFT config that wraps exactly the planned targets."""
    from lorakit.lora.experts import ExpertLoraConfig

    spec = planned.spec
    alpha: Any = spec.alpha if spec.alpha % 1 else int(spec.alpha)  # PEFT says int and takes both
    init: Any = True if spec.init == "default" else spec.init  # PEFT's name for its default is True
    return ExpertLoraConfig(
        task_type="CAUSAL_LM",
        base_model_name_or_path=base_name,
        r=spec.rank,
        lora_alpha=alpha,
        use_rslora=spec.rslora,
        use_dora=spec.dora,
        lora_dropout=spec.dropout,
        init_lora_weights=init,
        target_modules=[*planned.target_modules, *planned.expert_modules] or None,
        target_parameters=list(planned.target_parameters) or None,
        expert_parameters=list(planned.expert_parameters),
        expert_layout=spec.expert_layout,
        trainable_token_indices=_row_config(planned),
    )


def _row_config(planned: LoRAPlan) -> Any:
    """How PEFT is told which rows are trained: a list for a matrix that is embedding and
    unembedding, else by module.
    """
    ids, modules = list(planned.spec.token_ids), planned.row_modules
    if len(modules) > 1 or (modules and not planned.is_tied):
        return dict.fromkeys(modules, ids)
    return ids or None


@contextlib.contextmanager
def _rows_are_here(rows: list[torch.Tensor]) -> Iterator[None]:
    """Keep PEFT from gathering ``rows``, which are whole: it can on a GPU only."""
    from peft.tuners.trainable_tokens import layer

    found = layer.check_deepspeed_zero3_enabled
    if rows:
        layer.check_deepspeed_zero3_enabled = lambda: False
    try:
        yield
    finally:
        layer.check_deepspeed_zero3_enabled = found


def as_expert_config(
    config: LoraConfig, model: Any, matrices: Iterable[str] = ()
) -> ExpertLoraConfig:
    """Return PEFT's ``config`` of an adapter so that our layer, and not PEFT's, serves the stacks
    that it can serve.

    Args:
        matrices: of a shared-outer adapter, the names of its expert matrices
            (``…mlp.experts.gate_proj``).
    """
    from lorakit.lora.experts import ExpertLoraConfig

    fields = [field.name for field in dataclasses.fields(config) if field.init]
    settings = {name: getattr(config, name) for name in fields}
    stacks = [target for target in find_targets(model) if target.outer]
    if matrices:
        wanted = set(matrices)
        chosen = []
        for target in stacks:
            own = ExpertStack.matrices_of(str(target.parameter), target.num_matrices)
            if any(f"{target.module}.{matrix}" in wanted for matrix in own):
                chosen.append(target)
        leaves = {name.rpartition(".")[2] for name in matrices}
        modules = set(settings["target_modules"] or ()) - leaves
    else:
        names = set(settings["target_parameters"] or ())
        chosen = [target for target in stacks if any(matches(target.name, name) for name in names)]
        served = {name for name in names if any(matches(target.name, name) for target in chosen)}
        settings["target_parameters"] = sorted(names - served) or None
        modules = settings["target_modules"] or set()
    if not isinstance(modules, str):
        modules = {*modules, *(target.module for target in chosen)}
        settings["target_modules"] = sorted(modules) or None
    parameters = [target.name for target in chosen]
    layout = SHARED_OUTER if matrices else PER_EXPERT
    found = ExpertLoraConfig(**settings, expert_parameters=parameters, expert_layout=layout)
    found.register(model)
    return found

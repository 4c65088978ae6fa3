"""An optimiser's state that ZeRO has partitioned: gathered into the form of a run in one
process, and scattered from it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from lorakit.model.partition import full_shape
from lorakit.strategy.world import all_gather_object


class _Fragment(NamedTuple):
    """This process's part of a parameter: where it is in a flat partition, and where in the
    flattened parameter.
    """

    flat: torch.Tensor  # the partition, which is what the optimiser knows
    flat_start: int
    start: int
    length: int

    def of_flat(self, tensor: torch.Tensor) -> torch.Tensor:
        """The part within ``tensor``, which is shaped as the partition."""
        return tensor.narrow(0, self.flat_start, self.length)

    def of_full(self, tensor: torch.Tensor) -> torch.Tensor:
        """The part within ``tensor``, which is shaped as the parameter."""
        return tensor.flatten().narrow(0, self.start, self.length)


# the trained parameters, as the optimiser was given them
Groups = Sequence[Sequence[torch.nn.Parameter]]


def gather_optimizer_state(zero: Any, groups: Groups, stage: int) -> dict[str, Any]:
    """Return what the plain optimiser's ``state_dict()`` would be after the same steps. All
    processes must ask together.

    Args:
        zero: DeepSpeed's optimiser.
    """
    parameters = [parameter for group in groups for parameter in group]
    fragments = [_fragment(zero, parameter, stage) for parameter in parameters]
    states = zero.optimizer.state
    own: dict[str, Any] = next(
        (states[f.flat] for f in fragments if f is not None and f.flat in states), {}
    )
    # A process may own nothing of a small adapter, and must take part all the same.
    kinds = _union({name: _is_partitioned(value, fragments, states) for name, value in own.items()})
    found: dict[int, dict[str, Any]] = (
        {index: {} for index in range(len(parameters))} if kinds else {}
    )
    for name, is_partitioned in sorted(kinds.items()):
        if is_partitioned:
            for index, tensor in enumerate(_gather(name, fragments, parameters, states)):
                found[index][name] = tensor
        else:
            value = _first(own.get(name))
            for state in found.values():
                state[name] = value.clone() if isinstance(value, torch.Tensor) else value
    return {"state": found, "param_groups": _plain_groups(zero, groups)}


def scatter_optimizer_state(zero: Any, groups: Groups, stage: int, saved: dict[str, Any]) -> None:
    """Load what ``gather_optimizer_state``, or a run in one process, has saved."""
    parameters = [parameter for group in groups for parameter in group]
    for group, theirs in zip(zero.optimizer.param_groups, saved["param_groups"], strict=True):
        group.update({name: value for name, value in theirs.items() if name != "params"})
    states = zero.optimizer.state
    for index, parameter in enumerate(parameters):
        fragment, theirs = _fragment(zero, parameter, stage), saved["state"].get(index)
        if fragment is None or theirs is None:
            continue
        state = states[fragment.flat]
        for name, value in theirs.items():
            if isinstance(value, torch.Tensor) and value.shape == full_shape(parameter):
                if name not in state:
                    state[name] = torch.zeros_like(fragment.flat, dtype=value.dtype)
                fragment.of_flat(state[name]).copy_(fragment.of_full(value))
            else:
                state[name] = value.clone() if isinstance(value, torch.Tensor) else value


def _fragment(zero: Any, parameter: Any, stage: int) -> _Fragment | None:
    """Return this process's part of ``parameter``, or None where it has none."""
    if stage == 3:
        group, flat_start, _ = zero.grad_position[zero.get_param_id(parameter)]
        part = parameter.ds_tensor.ds_numel
        start = part * dist.get_rank(parameter.ds_process_group)
        length = min(part, parameter.ds_numel - start)
        if length > 0:
            return _Fragment(zero.fp32_partitioned_groups_flat[group], flat_start, start, length)
        return None
    mapping = parameter._hp_mapping
    if mapping is None:
        return None
    here, there = mapping.get_hp_fragment_address(), mapping.lp_fragment_address
    flat = zero.single_partition_of_fp32_groups[mapping.param_group_index]
    return _Fragment(flat, here.start, there.start, there.numel)


def _is_partitioned(value: Any, fragments: Sequence[_Fragment | None], states: Any) -> bool:
    flats = {fragment.flat.shape for fragment in fragments if fragment is not None}
    return isinstance(value, torch.Tensor) and value.ndim == 1 and value.shape in flats


def _union(own: dict[str, bool]) -> dict[str, bool]:
    return {name: kind for kinds in all_gather_object(own) for name, kind in kinds.items()}


def _first(value: Any) -> Any:
    return next((found for found in all_gather_object(value) if found is not None), None)


def _gather(
    name: str,
    fragments: Sequence[_Fragment | None],
    parameters: Sequence[torch.nn.Parameter],
    states: Any,
) -> Iterator[torch.Tensor]:
    """Yield one state of every parameter, whole: each process fills in its part of zeros, and
    all are summed.
    """
    sizes = [full_shape(parameter).numel() for parameter in parameters]
    device = next(
        (fragment.flat.device for fragment in fragments if fragment is not None),
        parameters[0].device,
    )
    total = torch.zeros(sum(sizes), device=parameters[0].device if device.type == "cpu" else device)
    for fragment, part in zip(fragments, total.split(sizes), strict=True):
        if fragment is not None and name in states[fragment.flat]:
            fragment.of_full(part).copy_(fragment.of_flat(states[fragment.flat][name]))
    dist.all_reduce(total)
    for parameter, part in zip(parameters, total.split(sizes), strict=True):
        yield part.view(full_shape(parameter)).cpu().clone()


def _plain_groups(zero: Any, groups: Groups) -> list[dict[str, Any]]:
    """The optimiser's groups, with parameters numbered through as torch does."""
    plain, first = [], 0
    for group, members in zip(zero.optimizer.param_groups, groups, strict=True):
        settings = {name: value for name, value in group.items() if name != "params"}
        plain.append({**settings, "params": list(range(first, first + len(members)))})
        first += len(members)
    return plain

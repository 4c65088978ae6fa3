"""Which matrices of a model get an adapter, and how PEFT finds exactly these."""

from __future__ import annotations

import difflib
import fnmatch
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lorakit.errors import ConfigError
from lorakit.lora.spec import SHARED_OUTER, LoRASpec
from lorakit.model.families import FAMILIES, OF_IMAGES, Target, find_targets, speaks_of_images
from lorakit.model.partition import full_shape, own_weight

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class LoRAPlan:
    """Which matrices get an adapter, made from a model that may be on the meta device."""

    spec: LoRASpec
    targets: tuple[Target, ...]
    target_modules: tuple[str, ...]  # how PEFT finds the linear modules among them, and no other
    # how PEFT finds the stacked parameters that its own layer adapts
    target_parameters: tuple[str, ...]
    # the stacked parameters that our factored layer adapts, as PEFT would find them
    expert_parameters: tuple[str, ...]
    expert_modules: tuple[str, ...]  # how PEFT finds the modules that hold these
    num_base_params: int
    is_tied: bool  # whether the unembedding shares its matrix with the embedding
    note: str = ""  # what the plan leaves out, and why
    # the embedding, and an unembedding of its own, where rows of ``spec.token_ids`` are trained
    row_modules: tuple[str, ...] = ()
    row_width: int = 0

    @property
    def num_params(self) -> int:
        """Trainable parameters."""
        dora = sum(target.out_features for target in self.targets) if self.spec.dora else 0
        return (
            dora + self.num_row_params + sum(self._num_params_of(target) for target in self.targets)
        )

    @property
    def num_row_params(self) -> int:
        """Trainable parameters in rows of the vocabulary."""
        return len(self.row_modules) * len(self.spec.token_ids) * self.row_width

    @property
    def num_peft_params(self) -> int:
        """Parameters of the adapter as PEFT's own layout holds it: more than are trained where
        factors are shared.
        """
        if self.spec.expert_layout != SHARED_OUTER:
            return self.num_params
        return self.num_row_params + sum(
            target.num_expanded_params(self.spec.rank) for target in self.targets
        )

    def _num_params_of(self, target: Target) -> int:
        rank = self.spec.rank
        shares = self.spec.expert_layout == SHARED_OUTER
        return target.num_shared_params(rank) if shares else target.num_adapter_params(rank)

    @property
    def trainable_share(self) -> float:
        return self.num_params / (self.num_base_params + self.num_params)

    def megabytes(self, bytes_per_param: int) -> float:
        """Size of the adapter file, in 10^6 bytes."""
        return self.num_params * bytes_per_param / 1e6

    def by_family(self) -> dict[str, list[Target]]:
        """Targets by family, in the order of the table."""
        groups: dict[str, list[Target]] = {}
        for target in self.targets:
            groups.setdefault(target.family, []).append(target)
        return groups

    def summary(self) -> str:
        """One line: parameters, share, size."""
        expanded, num = "", self.num_peft_params
        if num != self.num_params:
            expanded = f"; {num * 2 / 1e6:.1f} MB (bf16) when expanded to PEFT's layout"
        return (
            f"{self.num_params:,} trainable parameters, {self.trainable_share:.2%} of the model;"
            f" adapter {self.megabytes(4):.1f} MB in checkpoints (float32), {self.megabytes(2):.1f}"
            f" MB exported (bf16){expanded}"
        )

    def table(self) -> Table:
        """The plan as a table: one line per family and kind of matrix."""
        from rich.table import Table

        title = f"LoRA plan: rank {self.spec.rank}, scale {self.spec.scale:g}"
        if self.spec.expert_layout == SHARED_OUTER:
            title += ", factors on the hidden width shared by all experts"
        table = Table(title=title, title_justify="left")
        for column in ("family", "matrix", "count", "experts", "in", "out", "parameters"):
            table.add_column(column, justify="left" if column in ("family", "matrix") else "right")
        kinds: Counter[tuple[Any, ...]] = Counter()
        for target in self.targets:
            size = (target.num_experts, target.in_features, target.out_features)
            kinds[target.family, target.leaf, *size, self._num_params_of(target)] += 1
        for (family, leaf, experts, in_features, out_features, num_params), count in kinds.items():
            num = f"{count * num_params:,}"
            cells = (count, experts if experts > 1 else "", in_features, out_features, num)
            table.add_row(family, leaf, *(str(cell) for cell in cells))
        if self.row_modules:
            leaves = ", ".join(name.rsplit(".", 1)[-1] for name in self.row_modules)
            num = f"{self.num_row_params:,}"
            cells = (len(self.row_modules), "", len(self.spec.token_ids), self.row_width, num)
            table.add_row("new tokens", leaves, *(str(cell) for cell in cells))
        return table


def plan_lora(model: Any, spec: LoRASpec) -> LoRAPlan:
    """Return which matrices of ``model`` get an adapter under ``spec``.

    Raises:
        ConfigError: a family that is switched on, or a pattern, matches nothing; or PEFT cannot do
            what is asked.
    """
    found = find_targets(model)
    chosen = _by_pattern(found, spec.targets) if spec.targets else _by_family(found, spec)
    chosen, note = _without_misread(model, chosen, spec)
    experts = [target for target in chosen if target.parameter]
    factored = [target for target in experts if target.outer]
    folded = [target for target in experts if not target.outer]  # PEFT's own layer serves these
    if folded and spec.dropout:
        raise ConfigError(
            f"lora.dropout={spec.dropout} does not work on {folded[0].name}, which PEFT's own layer"
            " adapts; set lora.dropout=0, or leave it out of lora.targets"
        )
    if spec.expert_layout == SHARED_OUTER and not factored:
        raise ConfigError(
            "lora.expert_layout=shared_outer: this model has no experts that it could serve; set it"
            " to per_expert"
        )
    if spec.token_ids and any(target.family == "unembedding" for target in chosen):
        raise ConfigError(
            "lora.targets: an adapter on the unembedding does not go with rows of it that are"
            " trained (model.add_tokens)"
        )
    refused = "dora=true" if spec.dora else "init=orthogonal" if spec.init == "orthogonal" else ""
    if experts and refused:
        raise ConfigError(
            f"lora.{refused} does not work on stacked experts ({experts[0].name}); set"
            " lora.experts=false"
        )
    modules = [name for name, _ in model.named_modules()]
    parameters = [name for name, _ in model.named_parameters()]
    linear = [target.name for target in chosen if not target.parameter]
    return LoRAPlan(
        spec,
        tuple(chosen),
        target_modules=_shorten(linear, modules),
        target_parameters=_shorten([target.name for target in folded], parameters, depth=3),
        expert_parameters=_shorten([target.name for target in factored], parameters, depth=3),
        expert_modules=_shorten([target.module for target in factored], modules, depth=2),
        num_base_params=sum(full_shape(parameter).numel() for parameter in model.parameters()),
        is_tied=_is_tied(model),
        note=note,
        **_rows(model, spec),
    )


def _rows(model: Any, spec: LoRASpec) -> dict[str, Any]:
    """Where the rows of ``spec.token_ids`` lie, and how wide they are."""
    if not spec.token_ids:
        return {}
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    modules = [embedding] if head is None or _is_tied(model) else [embedding, head]
    names = {module: name for name, module in model.named_modules()}
    width = full_shape(own_weight(embedding))[1]
    return {"row_modules": tuple(names[module] for module in modules), "row_width": width}


def _by_family(found: list[Target], spec: LoRASpec) -> list[Target]:
    present = {target.family for target in found}
    switches = {family: getattr(spec, family) for family in FAMILIES}
    missing = [
        family for family, switch in switches.items() if switch is True and family not in present
    ]
    if missing:
        there = ", ".join(sorted(present & set(FAMILIES))) or "none"
        settings = ", ".join(f"lora.{family}=true" for family in missing)
        raise ConfigError(
            f"{settings}: this model has no such matrices (it has: {there}); set to false or auto"
        )
    chosen = [target for target in found if switches.get(target.family)]
    if not chosen:
        raise ConfigError(
            "LoRA would adapt nothing: switch on lora.attention, lora.mlp, lora.experts or"
            " lora.unembedding"
        )
    return chosen


def _by_pattern(found: list[Target], patterns: Iterable[str]) -> list[Target]:
    chosen: dict[str, Target] = {}
    for pattern in patterns:
        is_glob, leaf = any(char in pattern for char in "*?["), pattern.rsplit(".", 1)[-1]
        matched = [
            target
            for target in found
            if matches(target.name, pattern) or matches(target.module, pattern)
            if target.family not in OF_IMAGES or speaks_of_images(pattern)
            # a router only where it is written out
            if target.family != "router"
            or not is_glob
            or leaf in (target.module.rsplit(".", 1)[-1], target.parameter)
        ]
        if not matched:
            names = {target.name.removeprefix("model.") for target in found}
            names |= {target.leaf for target in found}
            near = difflib.get_close_matches(pattern, sorted(names), n=3, cutoff=0.3)
            raise ConfigError(
                f"lora.targets: {pattern!r} matches nothing in this model (near:"
                f" {', '.join(near) or 'nothing'})"
            )
        chosen |= {target.name: target for target in matched}
    return [target for target in found if target.name in chosen]


def matches(name: str, pattern: str) -> bool:
    """Whether ``pattern``, a suffix or a glob, means the module or parameter ``name``."""
    if any(char in pattern for char in "*?["):
        return fnmatch.fnmatchcase(name, pattern)
    return name == pattern or name.endswith(f".{pattern}")


def _without_misread(model: Any, chosen: list[Target], spec: LoRASpec) -> tuple[list[Target], str]:
    """Leave out linear modules that PEFT would take for something else, where nobody insists on
    them.

    For some mixtures of experts PEFT reads names like ``gate_proj`` as those of the experts before
    transformers stacked them, so that an adapter for a shared expert lands on all experts, with
    twice the rank.
    """
    linear = [target for target in chosen if target.parameter is None]
    misread = {leaf for leaf in {t.leaf for t in linear} if _is_misread(model, leaf)}
    lost = [target for target in linear if target.leaf in misread]
    if not lost:
        return chosen, ""
    what = f"{len(lost)} linear modules ({', '.join(sorted(misread))}) such as {lost[0].name}"
    why = f"PEFT takes these names for the stacked experts of {model.config.model_type}"
    insisted = spec.targets or any(getattr(spec, target.family, "auto") is True for target in lost)
    if insisted or len(lost) == len(chosen):
        raise ConfigError(
            f"LoRA on {what} is not possible: {why}; set lora.mlp=auto, or leave them out of"
            " lora.targets"
        )
    return [target for target in chosen if target not in lost], f"left out: {what}: {why}"


def _is_misread(model: Any, leaf: str) -> bool:
    import peft
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

    config = peft.LoraConfig(target_modules=[leaf])
    try:
        convert_peft_config_for_transformers(config, model, None)
    except ValueError:  # it needs the other half of a fused pair
        return True
    return set(config.target_modules or ()) != {leaf}


def _is_tied(model: Any) -> bool:
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    return head is not None and embedding is not None and head.weight is embedding.weight


def _shorten(names: list[str], all_names: list[str], depth: int = 1) -> tuple[str, ...]:
    """Suffixes of ``depth`` parts that match exactly ``names`` among ``all_names``, as other
    tools expect them, else ``names``.
    """
    suffixes = tuple(sorted({".".join(name.split(".")[-depth:]) for name in names}))
    matched = {
        name
        for name in all_names
        if any(name == suffix or name.endswith(f".{suffix}") for suffix in suffixes)
    }
    return suffixes if matched == set(names) else tuple(names)

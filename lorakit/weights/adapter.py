"""PEFT's adapter folder, read and written. `peft` itself loads what is written here, and the
other way round.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from lorakit.errors import AdapterError, report
from lorakit.lora.spec import BASE_CHANGING_INITS, PER_EXPERT, SHARED_OUTER, LoRASpec
from lorakit.lora.state import adapter_state, load_adapter_state

CONFIG_FILE, TENSOR_FILE = "adapter_config.json", "adapter_model.safetensors"


@dataclass(frozen=True)
class AdapterFiles:
    """An adapter folder: its config as plain data, and its tensors when asked for."""

    folder: Path
    config: dict[str, Any]

    @classmethod
    def open(cls, folder: str | Path) -> AdapterFiles:
        """Read the config of the adapter in ``folder``. Raises AdapterError where there is none
        that can be used.
        """
        folder = Path(folder).expanduser()
        for name in (CONFIG_FILE, TENSOR_FILE):
            if not (folder / name).is_file():
                raise AdapterError(
                    f"{folder}: no {name} here, so this is not a PEFT adapter in safetensors format"
                )
        try:
            config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        except (ValueError, OSError) as error:
            raise AdapterError(f"{folder / CONFIG_FILE}: cannot be read: {error}") from error
        if not isinstance(config, dict):
            raise AdapterError(f"{folder / CONFIG_FILE}: not a JSON object")
        if config.get("peft_type") != "LORA":
            raise AdapterError(
                f"{folder}: peft_type is {config.get('peft_type')!r}, but only LORA can be used"
            )
        return cls(folder, config)

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return all tensors by PEFT's names. Raises AdapterError for a torn file."""
        with self._opened() as file:
            return {_to_field_names(name): file.get_tensor(name) for name in list(file.keys())}

    @contextlib.contextmanager
    def _opened(self) -> Iterator[Any]:
        try:
            with safe_open(self.folder / TENSOR_FILE, framework="pt") as file:
                yield file
        except (SafetensorError, OSError) as error:
            raise AdapterError(
                f"{self.folder / TENSOR_FILE}: torn or not a safetensors file: {error}"
            ) from error

    def expert_matrices(self) -> list[str]:
        """The names of a shared-outer adapter's expert matrices
        (``…mlp.experts.gate_proj``); else nothing.
        """
        ending = ".lora_A.weight"
        with self._opened() as file:
            factors = [name for name in list(file.keys()) if name.endswith(ending)]
            stacked = [name for name in factors if len(file.get_slice(name).get_shape()) == 3]
        return [
            _to_field_names(name).removeprefix("base_model.model.").removesuffix(ending)
            for name in stacked
        ]

    def find_init_problem(self) -> str | None:
        """Return why the adapter does not fit the original base, or None."""
        init = str(self.config.get("init_lora_weights")).lower()
        if init.startswith(BASE_CHANGING_INITS):
            return (
                f"it was made with init {init}, which fits only a base that was changed to match;"
                " convert it with peft first"
            )
        return None

    @property
    def num_bytes(self) -> int:
        """Size of the tensor file."""
        return (self.folder / TENSOR_FILE).stat().st_size


def save_adapter(model: Any, folder: Path, *, dtype: torch.dtype | None = None) -> int:
    """Write the adapter of ``model`` to the existing ``folder`` and return the bytes of its
    tensors' file.

    The same adapter gives the same bytes. ``dtype`` None keeps the adapter's own.
    """
    return write_adapter(adapter_state(model), active_config(model), folder, dtype=dtype)


def active_config(model: Any) -> Any:
    """PEFT's config of the adapter of ``model``."""
    return model.peft_config[model.active_adapter]


def write_adapter(
    tensors: Mapping[str, torch.Tensor],
    peft_config: Any,
    folder: Path,
    *,
    dtype: torch.dtype | None = None,
) -> int:
    """Write ``tensors``, named as PEFT does in files, as ``save_adapter`` does; one process
    alone can do that.
    """
    plain = {
        name: tensor.to("cpu", dtype or tensor.dtype).contiguous().clone()
        for name, tensor in tensors.items()
    }
    try:
        save_file(dict(sorted(plain.items())), folder / TENSOR_FILE, metadata={"format": "pt"})
    except SafetensorError as error:  # how safetensors reports a full disk
        raise OSError(f"{folder / TENSOR_FILE}: {error}") from error
    config = peft_config.to_dict() | {"inference_mode": True}
    text = json.dumps(config, indent=2, sort_keys=True, default=_plain)
    (folder / CONFIG_FILE).write_text(text + "\n", encoding="utf-8")
    return (folder / TENSOR_FILE).stat().st_size


def start_from(model: Any, spec: LoRASpec, *, base: str) -> None:
    """Load ``spec.init_from`` into the adapter of ``model`` after checking base, rank, scale,
    targets and tensors.

    Raises:
        AdapterError: with every difference between the adapter and the plan.
    """
    adapter = open_init(spec, base=base)
    load_adapter_state(model, adapter.tensors(), source=str(adapter.folder))


def open_init(spec: LoRASpec, *, base: str) -> AdapterFiles:
    """Return ``spec.init_from`` after checking base, rank and scale. Raises AdapterError with
    every difference.
    """
    assert spec.init_from is not None
    adapter = AdapterFiles.open(spec.init_from)
    config, problems = adapter.config, []
    theirs = str(config.get("base_model_name_or_path") or "")
    if not spec.any_base and _last_part(theirs) != _last_part(base):
        problems.append(
            f"it was trained on base {theirs!r}, this run has {base!r} (lora.any_base=true accepts"
            " that)"
        )
    if config.get("r") != spec.rank:
        problems.append(f"it has rank {config.get('r')}, this run lora.rank={spec.rank}")
    if config.get("lora_alpha") != spec.alpha:
        problems.append(
            f"it has alpha {config.get('lora_alpha')}, this run lora.alpha={spec.alpha:g}"
        )
    if problem := adapter.find_init_problem():
        problems.append(problem)
    for key, ours in (("use_rslora", spec.rslora), ("use_dora", spec.dora)):
        if bool(config.get(key)) != ours:
            problems.append(f"it has {key}={bool(config.get(key))}, this run {ours}")
    theirs = SHARED_OUTER if adapter.expert_matrices() else PER_EXPERT
    if theirs != spec.expert_layout and (theirs == SHARED_OUTER or config.get("target_parameters")):
        problems.append(
            f"its experts have the layout {theirs}, this run"
            f" lora.expert_layout={spec.expert_layout}"
        )
    if (ids := _row_ids(config)) != sorted(spec.token_ids):
        problems.append(
            f"it has trained rows of the tokens {ids or 'none'}, this run of"
            f" {sorted(spec.token_ids) or 'none'}"
        )
    for key in ("rank_pattern", "alpha_pattern"):
        if config.get(key):
            problems.append(f"it has a {key}, which lora.init_from does not support")
    if problems:
        raise AdapterError(
            report(f"lora.init_from={spec.init_from} does not fit this run:", problems)
        )
    return adapter


def _row_ids(config: dict[str, Any]) -> list[int]:
    """The tokens whose rows an adapter has trained."""
    found = config.get("trainable_token_indices") or []
    return sorted(next(iter(found.values())) if isinstance(found, dict) else found)


# what tinker's archives call the experts' matrices
TINKER_LEAVES = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}


def _to_field_names(name: str) -> str:
    """Return a tensor's name with experts' matrices called as the model calls them."""
    for theirs, ours in TINKER_LEAVES.items():
        name = name.replace(f".experts.{theirs}.", f".experts.{ours}.")
    return name


def _last_part(name: str) -> str:
    return name.rstrip("/").rsplit("/", 1)[-1]


def _plain(value: Any) -> Any:
    return sorted(value) if isinstance(value, set) else str(value)

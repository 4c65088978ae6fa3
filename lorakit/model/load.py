"""A base model by path, by hub name, or by the name of a bundled one."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from lorakit.errors import ConfigError
from lorakit.hub import cached_model, explain_hub_error, find_hub_problem
from lorakit.model import tokens

BUNDLED = {
    "tiny": Path(__file__).parent / "tiny" / "text",
    "tiny-vl": Path(__file__).parent / "tiny" / "vl",
}
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tekken.json")
DTYPES = ("float32", "bfloat16", "float16")


def resolve_model_path(path: str, revision: str | None = None) -> str:
    """Return the folder of a bundled model, an existing folder, or ``path`` itself as a name of the
    hub.

    Raises:
        ConfigError: ``path`` looks like a folder and there is none, the folder holds no model, or
            is given a ``revision``.
    """
    if revision and (path in BUNDLED or Path(path).expanduser().is_dir()):
        raise ConfigError(
            f"model.revision={revision} has no effect: model.path={path} is not a model of the hub"
        )
    if path in BUNDLED:
        return str(BUNDLED[path])
    folder = Path(path).expanduser()
    if folder.is_dir():
        if (folder / "adapter_config.json").is_file():
            raise ConfigError(
                f"model.path={path}: this folder holds an adapter; give its base, and the adapter"
                " as lora.init_from"
            )
        if not (folder / "config.json").is_file():
            raise ConfigError(
                f"model.path={path}: this folder holds no config.json, so it is not a model in the"
                " hub's layout"
            )
        return str(folder)
    if path.startswith((".", "/", "~")) or path.count("/") > 1 or not path:
        raise ConfigError(
            f"model.path={path}: no such folder (bundled models: {', '.join(BUNDLED)})"
        )
    if (problem := find_hub_problem()) is None:
        return path
    if (cached := cached_model(path, revision)) is None:
        at = f" (revision {revision})" if revision else ""
        option = f" --revision {revision}" if revision else ""
        raise ConfigError(
            f"model.path={path}: no such folder (bundled models: {', '.join(BUNDLED)}), and not in"
            f" the hub's cache{at}; {problem}. Give the folder of a model, or download it where"
            f" there is a network: `hf download {path}{option}`"
        )
    return cached


def load_config(path: str, *, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """Return the model's transformers config."""
    from transformers import AutoConfig

    return _read(AutoConfig, path, revision, trust_remote_code)


def _read(
    build: Any, path: str, revision: str | None, trust_remote_code: bool, **options: Any
) -> Any:
    """What ``build``, an auto class of transformers, makes of the files of a model."""
    with _explained(path):
        return build.from_pretrained(
            resolve_model_path(path, revision),
            revision=revision,
            trust_remote_code=trust_remote_code,
            **options,
        )


def load_tokenizer(
    path: str,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    add_tokens: Sequence[str] | None = None,
) -> Any:
    """Return the model's tokenizer, with the new tokens ``add_tokens``."""
    tokenizer = _load_tokenizer(path, revision, trust_remote_code)
    if add_tokens:
        tokens.add_tokens(tokenizer, add_tokens)
    return tokenizer


def pieces_of(
    path: str,
    add_tokens: Sequence[str],
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> dict[int, list[int]]:
    """Return, by the id of each new token, the tokens of which its text was made before."""
    return tokens.add_tokens(_load_tokenizer(path, revision, trust_remote_code), add_tokens)


def _load_tokenizer(path: str, revision: str | None, trust_remote_code: bool) -> Any:
    from transformers import AutoTokenizer

    folder = Path(resolve_model_path(path, revision))
    if folder.is_dir() and not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        raise ConfigError(
            f"model.path={path}: no tokenizer in this folder ({', '.join(_TOKENIZER_FILES)}); copy"
            " the model's there"
        )
    return _read(AutoTokenizer, path, revision, trust_remote_code)


def load_image_processor(
    path: str, *, revision: str | None = None, trust_remote_code: bool = False
) -> Any:
    """Return the model's image processor, None for a model of text. It computes with PIL, the same
    on every machine.

    Raises:
        ConfigError: the model takes images, and its folder has no settings for them.
    """
    from transformers import AutoImageProcessor

    config = load_config(path, revision=revision, trust_remote_code=trust_remote_code)
    if getattr(config, "vision_config", None) is None:
        return None
    return _read(AutoImageProcessor, path, revision, trust_remote_code, backend="pil")


def load_model(
    path: str,
    *,
    dtype: str = "float32",
    attention: str = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
    device: str | None = None,
    add_tokens: Sequence[str] | None = None,
) -> Any:
    """Return the causal language model in ``dtype``, in evaluation mode, every parameter frozen.

    Args:
        add_tokens: new tokens, for which it gets rows; see ``model/tokens.py``.
        attention: transformers' name of an implementation; auto is sdpa, or eager for the families
            that sdpa cannot compute (Gemma 2's soft-capping, gpt-oss's sinks).
    """
    import torch

    if dtype not in DTYPES:
        raise ConfigError(f"model.dtype={dtype} is unknown; choose one of {', '.join(DTYPES)}")
    is_partitioned = _prepare_partitions(dtype)
    config = load_config(path, revision=revision, trust_remote_code=trust_remote_code)
    if is_partitioned:
        check_experts_as_on_the_hub(path, config, Path(resolve_model_path(path, revision)))
    with quiet_transformers():
        model, info = _read(
            model_class(config),
            path,
            revision,
            trust_remote_code,
            dtype=getattr(torch, dtype),
            attn_implementation=None if attention == "auto" else attention,
            # DeepSpeed itself puts the parts where they belong
            device_map=None if is_partitioned else device,
            output_loading_info=True,
        )
    lost = sorted(
        str(key) for kind in ("missing_keys", "mismatched_keys") for key in info.get(kind, ())
    )
    if lost:
        raise ConfigError(
            f"model.path={path}: {len(lost)} tensors are not in its files, or in another shape, and"
            f" would be random: {', '.join(lost[:5])}{' …' if len(lost) > 5 else ''}"
        )
    if is_partitioned:
        _check_kept_in_float32(model, path, dtype)
    if add_tokens:
        pieces = pieces_of(path, add_tokens, revision=revision, trust_remote_code=trust_remote_code)
        tokens.make_rows(model, pieces)
    return model.requires_grad_(False).eval()


def _prepare_partitions(dtype: str) -> bool:
    """Whether ZeRO-3 partitions what is loaded. It makes every tensor in the dtype of its own
    config, which is set here.
    """
    from transformers.integrations import deepspeed

    if not deepspeed.is_deepspeed_zero3_enabled():
        return False
    settings = deepspeed.deepspeed_config()
    settings.update(bf16={"enabled": dtype == "bfloat16"}, fp16={"enabled": dtype == "float16"})
    return True


def check_experts_as_on_the_hub(path: str, config: Any, folder: Path) -> None:
    """transformers under ZeRO-3 turns the experts of Qwen3-VL-MoE round, whatever way a file has
    them.

    Raises:
        ConfigError: a file has them as the model holds them, (E, 2I, H), and not as the hub does,
            (E, H, 2I).
    """
    from safetensors import safe_open

    if config.model_type != "qwen3_vl_moe":
        return
    text = config.get_text_config()
    as_held = [text.num_experts, 2 * text.moe_intermediate_size, text.hidden_size]
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            names = [
                name for name in list(opened.keys()) if name.endswith(".mlp.experts.gate_up_proj")
            ]
            if names and list(opened.get_slice(names[0]).get_shape()) == as_held:
                raise ConfigError(
                    f"model.path={path}: {file.name} has {names[0]} as {tuple(as_held)}, as"
                    " save_pretrained writes it; ZeRO-3 reads such experts only as the hub has"
                    " them, (E, H, 2I). Set strategy=zero2, or write the files again with `lorakit"
                    " merge`, which does as the hub"
                )


def _check_kept_in_float32(model: Any, path: str, dtype: str) -> None:
    """DeepSpeed rounds tensors that transformers holds in float32 whatever the model's number
    format, some versions and some tensors.

    Raises:
        ConfigError: it has.
    """
    patterns = [
        re.compile(pattern.replace("*", ".*"))
        for pattern in model._keep_in_fp32_modules_strict or ()
    ]
    held = [] if dtype == "float32" else [*model.named_parameters(), *model.named_buffers()]
    rounded = [
        name
        for name, tensor in held
        if tensor.dtype.itemsize == 2 and any(pattern.search(name) for pattern in patterns)
    ]
    if rounded:
        raise ConfigError(
            f"model.path={path}: ZeRO-3 would round {rounded[0]} to {dtype}, which this model needs"
            " in float32; set strategy=zero2, or model.dtype=float32"
        )


def model_class(config: Any) -> Any:
    """The auto class that builds a model with a language model's head from ``config``."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    if type(config) in AutoModelForCausalLM._model_mapping or hasattr(config, "auto_map"):
        return AutoModelForCausalLM
    return AutoModelForImageTextToText


def load_skeleton(
    path: str,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    add_tokens: Sequence[str] | None = None,
) -> Any:
    """Return the model on the meta device, from its config alone: every shape, no weight."""
    config = load_config(path, revision=revision, trust_remote_code=trust_remote_code)
    with _explained(path):
        skeleton = skeleton_of(config, trust_remote_code=trust_remote_code)
    if add_tokens:
        tokens.make_rows(
            skeleton,
            pieces_of(path, add_tokens, revision=revision, trust_remote_code=trust_remote_code),
        )
    return skeleton


def skeleton_of(config: Any, *, trust_remote_code: bool = False) -> Any:
    """Return the model of a transformers config on the meta device."""
    import torch

    with torch.device("meta"):
        model = model_class(config).from_config(config, trust_remote_code=trust_remote_code)
    model.tie_weights()
    return model


def base_name(path: str) -> str:
    """The model's name in adapters and reports: bundled, of the hub, or an absolute folder."""
    folder = Path(path).expanduser()
    return str(folder.resolve()) if folder.is_dir() and path not in BUNDLED else path


def needed_files(path: str, revision: str | None = None) -> dict[str, int]:
    """Bytes of each weight file of a model on disk; empty for one of the hub that is not here."""
    folder = Path(resolve_model_path(path, revision))
    return {file.name: file.stat().st_size for file in folder.glob("*.safetensors")}


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep the progress bars of transformers off a run's output for models that load at once."""
    from transformers.utils import logging

    was_on = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_on:
            logging.enable_progress_bar()


@contextlib.contextmanager
def _explained(path: str) -> Iterator[None]:
    """Turn what transformers and the hub raise into one message that says what to do."""
    try:
        yield
    except (OSError, ValueError, KeyError, ImportError, SafetensorError) as error:
        if isinstance(error, ConfigError):
            raise
        if meaning := explain_hub_error(path, error):
            raise ConfigError(f"model.path={meaning}") from error
        reason = " ".join(str(error).split())[:400]
        remedy = ""
        is_here = Path(path).expanduser().is_dir() or path in BUNDLED
        if not is_here and os.environ.get("HF_HUB_OFFLINE") == "1":
            remedy = "\nHF_HUB_OFFLINE=1 is set, so nothing is downloaded."
        elif not is_here:
            remedy = (
                "\nCheck the name and the network; for a gated model log in with `hf auth"
                f" login`, then `hf download {path}`."
            )
        elif "trust_remote_code" in str(error):
            remedy = (
                "\nThe model brings its own code. If you trust it, set"
                " model.trust_remote_code=true."
            )
        raise ConfigError(f"model.path={path}: cannot be loaded: {reason}{remedy}") from error


def base_of(model: Any) -> Any:
    """The base of a model that PEFT has wrapped; ``model`` itself where it has not."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model

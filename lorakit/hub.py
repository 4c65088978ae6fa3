"""The hub: whether it can be reached, what it holds, and what its refusals mean."""

from __future__ import annotations

import functools
import os
import socket
import urllib.parse
from pathlib import Path


@functools.cache
def find_hub_problem() -> str | None:
    """Return why the hub cannot be reached, or None where it may be (its address is known, or a proxy asks for it).

    Asked before anything of the hub's own libraries is, which retry for a minute.
    """
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE=1 is set"
    if {"https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"} & os.environ.keys():
        return None
    host = urllib.parse.urlsplit(constants.ENDPOINT).hostname
    try:
        socket.getaddrinfo(host, 443)
    except OSError as error:
        return f"{host} cannot be reached ({error.strerror})"
    return None


def stay_offline() -> None:
    """Keep the hub's libraries from asking a hub that cannot be reached: what they need is in the cache."""
    import datasets
    from huggingface_hub import constants

    constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True


def cached_model(name: str, revision: str | None) -> str | None:
    """The folder of a model in the hub's cache, or None where it is not there."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(name, "config.json", revision=revision)
    return str(Path(found).parent) if isinstance(found, str) else None


def fetch_model(name: str, revision: str | None, *, with_code: bool = False) -> Path:
    """Bring a model's config, tokenizer, processor and weights into the hub's cache and return their folder.

    Args:
        with_code: bring Python files too, for a model whose code is trusted.
    """
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.jinja", "*.model", "*.txt", "*.safetensors", *(["*.py"] if with_code else [])]
    return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))


def explain_hub_error(name: str, error: BaseException | None) -> str | None:
    """What the hub's refusal of ``name`` means and what to do, or None where it was not the hub that refused."""
    from huggingface_hub import errors

    from_hub = error
    while from_hub is not None:
        is_of_datasets = type(from_hub).__name__ == "DatasetNotFoundError"
        if isinstance(from_hub, errors.GatedRepoError) or (is_of_datasets and "gated" in str(from_hub)):
            return f"{name} is gated: accept its terms on its page of the hub, then `hf auth login` and `hf download {name}`"
        if isinstance(from_hub, errors.RevisionNotFoundError):
            return f"{name} has no such revision; its page of the hub lists branches, tags and commits"
        if isinstance(from_hub, errors.RepositoryNotFoundError) or is_of_datasets:
            return f"{name}: the hub has no such name, or shows it to others only: check it, or `hf auth login`"
        from_hub = from_hub.__cause__ or from_hub.__context__
    return None

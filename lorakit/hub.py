"""The hub: whether it can be reached, what it holds, and what its refusals mean."""

from __future__ import annotations

import contextlib
import functools
import os
import socket
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lorakit.errors import ConfigError


@functools.cache
def find_hub_problem() -> str | None:
    """Return why the hub cannot be reached, or None where it may be (its address is known, or a
    proxy asks for it).

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
    """Keep the hub's libraries from asking the hub: what they need is in the cache."""
    import datasets
    from huggingface_hub import constants

    constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True


def cached_model(name: str, revision: str | None) -> str | None:
    """The folder of a model in the hub's cache, or None where it is not there."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(name, "config.json", revision=revision)
    return str(Path(found).parent) if isinstance(found, str) else None


def fetch_model(name: str, revision: str | None, *, with_code: bool = False) -> Path:
    """Bring a model's config, tokenizer, processor and weights into the hub's cache and return
    their folder.

    Args:
        with_code: bring Python files too, for a model whose code is trusted.
    """
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.jinja", "*.model", "*.txt", "*.safetensors"]
    if with_code:
        patterns.append("*.py")
    return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))


def open_repository(name: str, *, is_public: bool) -> None:
    """Make the repository ``name`` on the hub, where there is none, for ``upload``.

    Raises:
        ConfigError: the hub cannot be reached, or refuses.
    """
    from huggingface_hub import HfApi, errors, get_token
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except errors.HFValidationError as error:
        raise ConfigError(f"push={name}: {error}") from error
    if name.count("/") != 1:
        raise ConfigError(f"push={name}: write USER/NAME")
    if problem := find_hub_problem():
        raise ConfigError(
            f"push={name}: {problem}; leave push out, and upload the folder with `hf upload {name}"
            " FOLDER`"
        )
    if get_token() is None:
        raise ConfigError(f"push={name}: nobody is logged in; `hf auth login`, or set HF_TOKEN")
    with _push_explained(name):
        api = HfApi()
        api.create_repo(name, private=not is_public, exist_ok=True)
        if is_public and api.model_info(name).private:
            raise ConfigError(
                f"push={name} is there and private: its page of the hub makes it public"
            )
        if not is_public and not api.model_info(name).private:
            raise ConfigError(
                f"push={name} is there and public: --public says that anybody may see what is"
                " uploaded"
            )


def upload(folder: Path, name: str, *, message: str) -> str:
    """Upload ``folder`` to the repository ``name``; return its address. Raises ConfigError."""
    from huggingface_hub import HfApi

    with _push_explained(name, remedy=f"; {folder} is whole: `hf upload {name} {folder}`"):
        HfApi().upload_folder(repo_id=name, folder_path=folder, commit_message=message)
        return f"{HfApi().endpoint}/{name}"


def _http_error() -> type[Exception]:
    """What the hub's HTTP library raises where a connection fails; versions differ."""
    from huggingface_hub import errors

    kind: Any = errors.HfHubHTTPError.__mro__[1]
    return kind


@contextlib.contextmanager
def _push_explained(name: str, remedy: str = "") -> Iterator[None]:
    try:
        yield
    except ConfigError:
        raise
    except (_http_error(), OSError, ValueError) as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        meaning = {
            401: "the hub does not know this token; `hf auth login` again",
            403: "this token may not write there; is the name yours, and may the token write?",
        }.get(status or 0, " ".join(str(error).split())[:300])
        raise ConfigError(f"push={name}: {meaning}{remedy}") from error


def explain_hub_error(name: str, error: BaseException | None) -> str | None:
    """What the hub's refusal of ``name`` means and what to do; None for other errors."""
    from huggingface_hub import errors

    from_hub = error
    while from_hub is not None:
        is_of_datasets = type(from_hub).__name__ == "DatasetNotFoundError"
        is_gated = is_of_datasets and "gated" in str(from_hub)
        if is_gated or isinstance(from_hub, errors.GatedRepoError):
            return (
                f"{name} is gated: accept its terms on its page of the hub, then `hf auth login`"
                f" and `hf download {name}`"
            )
        if isinstance(from_hub, errors.RevisionNotFoundError):
            return (
                f"{name} has no such revision; its page of the hub lists branches, tags and commits"
            )
        if isinstance(from_hub, errors.RepositoryNotFoundError) or is_of_datasets:
            return (
                f"{name}: the hub has no such name, or shows it to others only: check it, or `hf"
                " auth login`"
            )
        from_hub = from_hub.__cause__ or from_hub.__context__
    return None

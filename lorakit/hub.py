"""The hub's address, asked for before anything of the hub's own libraries is, which retry for a minute."""

from __future__ import annotations

import functools
import os
import socket
import urllib.parse


@functools.cache
def find_hub_problem() -> str | None:
    """Return why the hub cannot be reached, or None where it may be (its address is known, or a proxy asks for it)."""
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

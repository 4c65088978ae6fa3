"""Who may ask: keys, of which only digests are kept."""

from __future__ import annotations

import hashlib
import hmac
import secrets

from lorakit.errors import ConfigError
from lorakit.service.checkpoints import LOCAL_OWNER
from lorakit.service.database import ApiKey, Database, now

KEY_PREFIX = "tml-"  # the SDK refuses others


class ApiKeyStore:
    """The keys of a server's users."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._known: list[ApiKey] = []

    def make(self, user: str) -> str:
        """Return a new key of ``user``, kept nowhere. Raises ConfigError where the user has one."""
        if not user or user == LOCAL_OWNER:
            raise ConfigError(f"{user!r} cannot be a user's name")
        if self._database.get(ApiKey, user) is not None:
            raise ConfigError(f"{user} has a key already")
        key = KEY_PREFIX + secrets.token_urlsafe(32)
        self._database.add(ApiKey(user=user, digest=_digest(key), created=now()))
        return key

    def user_of(self, key: str) -> str | None:
        """Return whose key it is, or None; one that another process has made is found too."""
        if (user := self._find(key)) is None and key.startswith(KEY_PREFIX):
            self._known = self._database.select(ApiKey)
            user = self._find(key)
        return user

    def _find(self, key: str) -> str | None:
        """Every digest is compared, each in constant time."""
        digest, found = _digest(key), None
        for known in self._known:
            if hmac.compare_digest(known.digest, digest):
                found = known.user
        return found


def _digest(key: str) -> str:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()

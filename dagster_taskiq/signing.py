"""Signatures: how a worker and a run know that a message was written by somebody with the key.

Tasks, results and control messages are JSON objects; each may carry an HMAC-SHA256 of what the
reader acts on. It is made over the decoded values in one fixed spelling, so that what was verified
and what is used cannot be two readings of the same bytes. Into it go also

* what it is (``Purpose``), so that a result cannot be passed off as a task;
* the deployment (the key prefix), so that what was signed for one is nothing to another;
* its subject: a result is the result of one task, an order is for one worker or one task.

Without a key nothing is signed and nothing verified; signatures are ignored.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from enum import Enum
from typing import Any

from dagster_taskiq.defaults import KEY_PREFIX
from dagster_taskiq.errors import ConfigError, UntrustedError

#: The shortest key: 128 bits in hexadecimal digits.
MIN_KEY_CHARACTERS = 32

#: The field of a JSON object that its signature stands in.
SIGNATURE = "signature"

#: Characters of a key's public name.
_KEY_ID_CHARACTERS = 12


class Purpose(str, Enum):
    """What is signed."""

    TASK = "task"
    RESULT = "result"
    CONTROL = "control"
    KEY_ID = "key-id"


class Signer:
    """Signs with the first of its keys and verifies with all.

    Args:
        keys: none turns it off; see ``parse_keys``.
        scope: of the deployment, its key prefix.
    """

    def __init__(self, keys: Sequence[str] = (), scope: str = KEY_PREFIX) -> None:
        self._keys = tuple(key.encode() for key in keys)
        self._scope = scope
        #: A name for each key, which tells nothing of it: people see that two sides have another.
        self.key_ids = tuple(
            _mac(key, self._canonical(Purpose.KEY_ID, "", {}))[:_KEY_ID_CHARACTERS]
            for key in self._keys
        )

    def __repr__(self) -> str:
        return f"Signer(key_ids={self.key_ids})"

    @property
    def is_active(self) -> bool:
        """Whether there is a key."""
        return bool(self._keys)

    def is_accepted_by(self, key_ids: Sequence[str]) -> bool:
        """Whether somebody with these keys, or with none, takes what we sign."""
        return not key_ids or (self.is_active and self.key_ids[0] in key_ids)

    def sign(self, purpose: Purpose, subject: str, content: Mapping[str, Any]) -> str | None:
        """The signature of a JSON object; None without a key."""
        if not self._keys:
            return None
        return _mac(self._keys[0], self._canonical(purpose, subject, content))

    def verify(
        self, purpose: Purpose, subject: str, content: Mapping[str, Any], signature: Any
    ) -> None:
        """Check the signature of a JSON object; without a key any will do.

        Raises:
            UntrustedError: there is none, or it is not of one of the keys.
        """
        if not self._keys:
            return
        if not isinstance(signature, str) or not signature:
            raise UntrustedError(
                "it is not signed, and a signing_key is set here: set the same where it comes from"
            )
        try:
            text, given = self._canonical(purpose, subject, content), signature.encode()
        except (ValueError, TypeError, RecursionError):
            raise UntrustedError("it cannot have been signed: it is no plain JSON") from None
        # all of them, so that the time says nothing of which one it is
        matches = [hmac.compare_digest(_mac(key, text).encode(), given) for key in self._keys]
        if not any(matches):
            raise UntrustedError(
                "its signature was made with another signing_key, or for something else"
            )

    def signed(self, purpose: Purpose, subject: str, content: Mapping[str, Any]) -> dict[str, Any]:
        """The object with its signature in it, where there is a key."""
        signature = self.sign(purpose, subject, content)
        return {**content, **({SIGNATURE: signature} if signature else {})}

    def verified(self, purpose: Purpose, subject: str, signed: Mapping[str, Any]) -> dict[str, Any]:
        """What ``signed`` was made of.

        Raises:
            UntrustedError: see ``verify``.
        """
        content = {key: value for key, value in signed.items() if key != SIGNATURE}
        self.verify(purpose, subject, content, signed.get(SIGNATURE))
        return content

    def _canonical(self, purpose: Purpose, subject: str, content: Mapping[str, Any]) -> bytes:
        parts = ["dagster-taskiq", 1, purpose.value, self._scope, subject, content]
        return json.dumps(parts, sort_keys=True, separators=(",", ":")).encode()


def parse_keys(where: str, texts: Iterable[Any]) -> tuple[str, ...]:
    """The keys in texts of a configuration; each may hold several, between commas or white space.

    Args:
        where: what to name in an error, which never shows a key.

    Raises:
        ConfigError: a text is none, holds no key, or one that is too short.
    """
    keys: list[str] = []
    for text in texts:
        found = re.split(r"[\s,]+", text.strip(" \t\r\n,")) if isinstance(text, str) else [""]
        if found == [""]:
            raise ConfigError(f"{where} is empty or no text; {_HOW_TO_MAKE_ONE}")
        keys += found
    for number, key in enumerate(keys, start=1):
        if len(key) < MIN_KEY_CHARACTERS:
            raise ConfigError(
                f"{where}: key {number} has {len(key)} characters, it must have at least "
                f"{MIN_KEY_CHARACTERS}; {_HOW_TO_MAKE_ONE}"
            )
    return tuple(dict.fromkeys(keys))


_HOW_TO_MAKE_ONE = "make one by: openssl rand -hex 32"


def _mac(key: bytes, text: bytes) -> str:
    return hmac.new(key, text, hashlib.sha256).hexdigest()

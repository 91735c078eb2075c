"""Signatures: how a worker and a run know that a message was written by somebody with the key.

Tasks, results, orders and workers' records are texts; each may have a first line with an
HMAC-SHA256 of all the bytes that follow. A reader checks the length, then the HMAC, and parses
only what has passed both. Into the HMAC also go

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
from collections.abc import Iterable, Sequence
from enum import Enum
from typing import Any

from dagster_taskiq.defaults import KEY_PREFIX, MAX_MESSAGE_BYTES
from dagster_taskiq.errors import ConfigError, TooLargeError, UntrustedError

#: The shortest key: 128 bits in hexadecimal digits.
MIN_KEY_CHARACTERS = 32

#: The line that a signed text begins with; no unsigned one does, since those begin with JSON.
_SIGNATURE_LINE = re.compile(rb"signature ([0-9a-f]{64})\n")

#: Characters of a key's public name.
_KEY_ID_CHARACTERS = 12


class Purpose(str, Enum):
    """What is signed."""

    TASK = "task"
    RESULT = "result"
    CONTROL = "control"
    WORKER = "worker"
    NOTE = "note"
    PAUSE = "pause"
    HISTORY = "history"
    WITHHELD = "withheld"
    KEY_ID = "key-id"


class Signer:
    """Signs with the first of its keys and verifies with all.

    Args:
        keys: none turns it off; see ``parse_keys``.
        scope: of the deployment, its key prefix.
        max_bytes: the longest text that is written or read.
    """

    def __init__(
        self,
        keys: Sequence[str] = (),
        scope: str = KEY_PREFIX,
        max_bytes: int = MAX_MESSAGE_BYTES,
    ) -> None:
        self._keys = tuple(key.encode() for key in keys)
        self._scope = scope
        self._max_bytes = max_bytes
        #: A name for each key, which tells nothing of it: people see that two sides have another.
        self.key_ids = tuple(
            self._mac(key, Purpose.KEY_ID, "", b"")[:_KEY_ID_CHARACTERS] for key in self._keys
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

    def seal(self, purpose: Purpose, subject: str, text: bytes) -> bytes:
        """The text as it is to be sent: with its signature where there is a key.

        Raises:
            TooLargeError: it is longer than ``max_bytes``.
        """
        self._check_size(text)
        if not self._keys:
            return text
        mac = self._mac(self._keys[0], purpose, subject, text)
        return b"signature " + mac.encode() + b"\n" + text

    def unseal(self, purpose: Purpose, subject: str, sealed: bytes) -> bytes:
        """The text that was sealed for this purpose and subject; without a key for any.

        Raises:
            TooLargeError: it is longer than ``max_bytes``.
            UntrustedError: it is not signed, or not with one of the keys.
        """
        match = _SIGNATURE_LINE.match(sealed)
        text = sealed[match.end() :] if match else sealed
        self._check_size(text)
        if not self._keys:
            return text
        if match is None:
            raise UntrustedError(
                "it is not signed, and a signing_key is set here: set the same where it comes from"
            )
        # all of them, so that the time says nothing of which one it is
        macs = [self._mac(key, purpose, subject, text).encode() for key in self._keys]
        matches = [hmac.compare_digest(mac, match[1]) for mac in macs]
        if not any(matches):
            raise UntrustedError(
                "its signature was made with another signing_key, or for something else"
            )
        return text

    def _check_size(self, text: bytes) -> None:
        if len(text) > self._max_bytes:
            raise TooLargeError(len(text), self._max_bytes)

    def _mac(self, key: bytes, purpose: Purpose, subject: str, text: bytes) -> str:
        # a line of JSON, which holds no line break: it cannot run into the text
        context = json.dumps(["dagster-taskiq", 2, purpose.value, self._scope, subject])
        mac = hmac.new(key, context.encode() + b"\n", hashlib.sha256)
        mac.update(text)
        return mac.hexdigest()


def without_signature(sealed: bytes) -> bytes:
    """The text of what was verified before."""
    match = _SIGNATURE_LINE.match(sealed)
    return sealed[match.end() :] if match else sealed


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

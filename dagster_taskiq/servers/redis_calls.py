"""Lua scripts and other commands, sent to Redis or Valkey in one round trip."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from typing import Any, TypeAlias

from redis.asyncio import Redis
from redis.exceptions import NoScriptError

#: One command with its arguments, as redis-py's ``execute_command`` takes it.
Command: TypeAlias = Sequence[Any]

#: How many keys one step of a scan looks at.
SCAN_COUNT = 1000

_texts: dict[str, str] = {}


class Script:
    """A Lua script, called by its digest.

    Attributes:
        text: the script itself.
    """

    def __init__(self, text: str) -> None:
        self.text = text
        self._digest = hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()
        _texts[self._digest] = text

    def __call__(self, keys: Sequence[str], *arguments: str | bytes | int) -> Command:
        """The command that runs it."""
        return ("EVALSHA", self._digest, len(keys), *keys, *arguments)


def literal_pattern(text: str) -> str:
    """The pattern, for a scan of keys, that matches a text and nothing else."""
    return re.sub(r"([*?\[\]\\^-])", r"\\\1", text)


async def call(redis: Redis, commands: Sequence[Command]) -> list[Any]:
    """Run commands in one round trip; their replies, in their order.

    A server that was restarted, or whose scripts were flushed, has run none of the scripts: they
    are loaded, and all commands are sent again. So a command beside a script is one that may be
    repeated.

    Raises:
        RedisError: the first of the replies that is an error.
    """
    try:
        return await _round_trip(redis, commands)
    except NoScriptError:
        digests = dict.fromkeys(words[1] for words in commands if words[0] == "EVALSHA")
        loads = [("SCRIPT LOAD", _texts[digest]) for digest in digests]
        return (await _round_trip(redis, [*loads, *commands]))[len(loads) :]


async def _round_trip(redis: Redis, commands: Sequence[Command]) -> list[Any]:
    if len(commands) == 1:
        return [await redis.execute_command(*commands[0])]  # type: ignore[no-untyped-call]
    pipeline = redis.pipeline(transaction=False)
    for command in commands:
        pipeline.execute_command(*command)
    # not raise_on_error, which would put the command with its payload into the message
    replies: list[Any] = await pipeline.execute(raise_on_error=False)
    for reply in replies:
        if isinstance(reply, Exception):
            raise reply
    return replies

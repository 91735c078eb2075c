"""Whether a user of Redis or Valkey may do what we do, found out before it is needed."""

from __future__ import annotations

import re
from collections.abc import Iterable

from redis import exceptions
from redis.asyncio import Redis
from redis.asyncio.connection import AbstractConnection

from dagster_taskiq.servers.kinds import REDIS
from dagster_taskiq.servers.redis_client import server_errors
from dagster_taskiq.servers.server_refusals import find_refusal, refusal_error

#: Arguments with which the server takes each command that we use, beside its key.
_ARGUMENTS: dict[str, tuple[str | int, ...]] = {
    "BLPOP": (1,),
    "DEL": (),
    "EXISTS": (),
    "EXPIRE": (1,),
    "GET": (),
    "HDEL": ("f",),
    "HEXISTS": ("f",),
    "HGET": ("f",),
    "HGETALL": (),
    "HINCRBY": ("f", 1),
    "HMGET": ("f",),
    "HSET": ("f", "v"),
    "HSETNX": ("f", "v"),
    "INCR": (),
    "LLEN": (),
    "LPOP": (),
    "LPUSH": ("v",),
    "LTRIM": (0, 0),
    "MGET": (),
    "PEXPIRE": (1,),
    "PTTL": (),
    "RPUSH": ("v",),
    "SET": ("v",),
    "UNLINK": (),
    "ZADD": (0, "m"),
    "ZCARD": (),
    "ZPOPMIN": (),
    "ZRANGE": (0, 0),
    "ZRANGEBYSCORE": (0, 0),
    "ZREM": ("m",),
    "ZREMRANGEBYSCORE": (0, 0),
    "ZSCORE": ("m",),
}
_WITHOUT_KEY: dict[str, tuple[str | int, ...]] = {
    "EVALSHA": ("0" * 40, 0),
    "INFO": ("server",),
    "PING": (),
    "SCRIPT": ("LOAD", "return 1"),
    "TIME": (),
}


def commands_of(scripts: Iterable[str]) -> set[str]:
    """Which commands some Lua scripts call."""
    return {name for text in scripts for name in re.findall(r"redis\.call\('(\w+)'", text)}


async def check_rights(redis: Redis, address: str, key: str, commands: Iterable[str]) -> None:
    """Raise unless the user may use some commands, in scripts too, on keys such as one.

    The server looks at rights when it queues a command of a transaction, and this one is discarded.

    Raises:
        RefusedByServerError: the message names the commands that are not allowed.
        UnreachableServerError: the server has gone.
    """
    names = sorted(commands)
    calls = [
        (name, *_WITHOUT_KEY[name]) if name in _WITHOUT_KEY else (name, key, *_ARGUMENTS[name])
        for name in names
    ]
    with server_errors(address):
        connection = await redis.connection_pool.get_connection()  # type: ignore[no-untyped-call]
    try:
        with server_errors(address):
            await connection.send_command("MULTI")
            await connection.read_response()
            await connection.send_packed_command(connection.pack_commands([*calls, ("DISCARD",)]))
            denied = [name for name in names if await _is_denied(connection)]
            await connection.read_response()
    except BaseException:
        await connection.disconnect()  # with a transaction that may be open
        raise
    finally:
        await redis.connection_pool.release(connection)
    if denied:
        sentence = f"{address} does not allow its user {', '.join(denied)} on keys such as {key}."
        raise refusal_error(address, find_refusal(REDIS.refusals, "NOPERM"), sentence)


async def _is_denied(connection: AbstractConnection) -> bool:
    try:
        await connection.read_response()
    except exceptions.NoPermissionError:
        return True
    except exceptions.ResponseError:
        pass  # it is full, say, which is told when something is written
    return False

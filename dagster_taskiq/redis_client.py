"""Connections to Redis and Valkey, and what their errors mean for people."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from ssl import SSLContext
from typing import Any

from redis import exceptions
from redis.asyncio import ConnectionPool, Redis, SSLConnection
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from dagster_taskiq.errors import RefusedByServerError, ServerError, UnreachableServerError
from dagster_taskiq.servers import ServerOptions, redact, reset_hint, tls_refusal

#: One more try, for a connection that the server closed while it was idle.
_RETRIES = 1


def connection_arguments(options: ServerOptions, *, timeout_seconds: float) -> dict[str, Any]:
    """What redis-py must be told beside the URL.

    Args:
        timeout_seconds: for the answer to one command; longer than any blocking one waits.
    """
    arguments: dict[str, Any] = {
        "socket_timeout": timeout_seconds,
        "socket_connect_timeout": options.connect_timeout_seconds,
        "retry": Retry(NoBackoff(), _RETRIES),
        "protocol": 2,
    }
    return arguments


def open_redis(options: ServerOptions, *, timeout_seconds: float) -> Redis:
    """A client with its own connections; nothing is sent yet."""
    arguments = connection_arguments(options, timeout_seconds=timeout_seconds)
    client = Redis.from_url(options.url, **arguments)
    use_tls(client.connection_pool, options)
    return client


def use_tls(pool: ConnectionPool, options: ServerOptions) -> None:
    """Have a pool's connections verify the server of a ``rediss://`` URL as the options say.

    Raises:
        ConfigError: a TLS file cannot be loaded.
    """
    if options.url.lower().startswith("rediss://"):
        pool.connection_class = _TlsConnection
        pool.connection_kwargs["context"] = options.tls.context()


class _TlsConnection(SSLConnection):
    """With our context: what redis-py makes of a CA file trusts all of the system's too."""

    def __init__(self, *, context: SSLContext, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.ssl_context.context = context


@contextmanager
def server_errors(address: str) -> Iterator[None]:
    """Turn redis-py's errors into ours, with the address and without the password.

    Raises:
        UnreachableServerError: no connection, no answer in time, or a refusal that will pass.
        RefusedByServerError: the server answered with another error.
    """
    try:
        yield
    except (exceptions.AuthenticationError, exceptions.AuthorizationError) as error:
        raise RefusedByServerError(
            address, f"{address} refuses the credentials: {redact(str(error))}. Check the URL."
        ) from error
    except exceptions.NoScriptError as error:
        # scripts are loaded when they are missing: it went away again before the next command
        raise UnreachableServerError(
            address, f"{address} was restarted in the middle of a command."
        ) from error
    except (exceptions.ConnectionError, exceptions.TimeoutError, OSError) as error:
        if refusal := tls_refusal(address, error):
            raise refusal from error
        raise UnreachableServerError(
            address, f"Cannot reach {address}: {_sentence(error)}.{reset_hint(address, error)}"
        ) from error
    except exceptions.RedisError as error:
        raise _refusal(address, error) from error


#: What a server says that takes nothing just now: its disk is full, it is a replica (of a primary
#: that is away), it has too few replicas, or a script keeps it busy.
_PASSING = ("MISCONF", "READONLY", "MASTERDOWN", "NOREPLICAS", "BUSY ")


def _refusal(address: str, error: exceptions.RedisError) -> ServerError:
    text = redact(str(error))
    passing = (exceptions.ReadOnlyError, exceptions.MasterDownError)
    if isinstance(error, passing) or any(word in text for word in _PASSING):
        return UnreachableServerError(address, f"{address} takes nothing now: {_sentence(error)}.")
    if "OOM" in text or isinstance(error, exceptions.OutOfMemoryError):
        text += " (raise maxmemory; the policy must be noeviction)"
    return RefusedByServerError(address, f"{address} refused a command: {text}.")


def _sentence(error: BaseException) -> str:
    text = redact(str(error)).strip().rstrip(".")
    return text or type(error).__name__

"""Connections to Redis and Valkey, and what their errors mean for people."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from ssl import SSLContext
from typing import Any

from redis import exceptions
from redis.asyncio import ConnectionPool, Redis, SSLConnection
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from dagster_taskiq.errors import ServerError, UnreachableServerError
from dagster_taskiq.servers.kinds import REDIS, ServerOptions, uses_tls
from dagster_taskiq.servers.server_refusals import Outlook, find_refusal, refusal_error
from dagster_taskiq.servers.tls import reset_hint, tls_refusal
from dagster_taskiq.servers.urls import redact

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
    client = Redis.from_url(options.client_url, **arguments)
    use_tls(client.connection_pool, options)
    return client


def use_tls(pool: ConnectionPool, options: ServerOptions) -> None:
    """Have a pool's connections verify a server with TLS as the options say.

    Raises:
        ConfigError: a TLS file cannot be loaded.
    """
    if options.uses_tls:
        pool.connection_class = _TlsConnection
        pool.connection_kwargs["context"] = options.tls.context()


class _TlsConnection(SSLConnection):
    """With our context: what redis-py makes of a CA file trusts all of the system's too."""

    def __init__(self, *, context: SSLContext, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.ssl_context.context = context


def product_of(info: Mapping[str, Any]) -> str:
    """Name and version of a server by its answer to ``INFO server``."""
    if "valkey_version" in info:
        return f"Valkey {info['valkey_version']}"
    return f"Redis {info.get('redis_version', 'of an unknown version')}"


@contextmanager
def server_errors(address: str) -> Iterator[None]:
    """Turn redis-py's errors into ours, with the address and without the password.

    Raises:
        UnreachableServerError: no connection, no answer in time, or a refusal that will pass.
        RefusedByServerError: the server answered with another error.
    """
    try:
        yield
    except (exceptions.RedisError, OSError) as error:
        raise _ours(address, error) from error


def _ours(address: str, error: Exception) -> ServerError:
    text = _sentence(error)
    if _is_answer(error):
        code = getattr(error, "status_code", None)
        refusal = find_refusal(REDIS.refusals, f"{code or ''} {text}")
        is_passing = refusal.outlook is Outlook.PASSES
        verb = "takes nothing now" if is_passing else "refused a command"
        if isinstance(error, exceptions.AuthenticationError):
            verb = "refuses the credentials"
        return refusal_error(address, refusal, f"{address} {verb}: {text}.")
    if refused := tls_refusal(address, error):
        return refused
    hint = reset_hint(error) if uses_tls(address) else ""
    return UnreachableServerError(address, f"Cannot reach {address}: {text}.{hint}")


def _is_answer(error: Exception) -> bool:
    """Whether the server has said it; redis-py makes connection errors of some answers."""
    if isinstance(error, exceptions.AuthenticationError | exceptions.BusyLoadingError):
        return True
    is_lost = isinstance(error, exceptions.ConnectionError | exceptions.TimeoutError | OSError)
    return not is_lost or getattr(error, "status_code", None) is not None


def _sentence(error: BaseException) -> str:
    text = redact(str(error)).strip().rstrip(".")
    return text or type(error).__name__

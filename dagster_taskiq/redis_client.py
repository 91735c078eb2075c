"""Connections to Redis and Valkey, and what their errors mean for people."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from redis import exceptions
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from dagster_taskiq.errors import RefusedByServerError, ServerError, UnreachableServerError
from dagster_taskiq.servers import ServerOptions, redact

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
    if options.url.startswith("rediss://"):
        tls = options.tls
        arguments |= {
            "ssl_ca_certs": tls.ca_file,
            "ssl_certfile": tls.cert_file,
            "ssl_keyfile": tls.key_file,
            "ssl_cert_reqs": "required" if tls.verify else "none",
            "ssl_check_hostname": tls.verify,
        }
    return arguments


def open_redis(options: ServerOptions, *, timeout_seconds: float) -> Redis:
    """A client with its own connections; nothing is sent yet."""
    arguments = connection_arguments(options, timeout_seconds=timeout_seconds)
    return Redis.from_url(options.url, **arguments)


@contextmanager
def server_errors(address: str) -> Iterator[None]:
    """Turn redis-py's errors into ours, with the address and without the password.

    Raises:
        UnreachableServerError: no connection, or no answer in time.
        RefusedByServerError: the server answered with an error.
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
        raise UnreachableServerError(
            address, f"Cannot reach {address}: {_sentence(error)}."
        ) from error
    except exceptions.RedisError as error:
        raise _refusal(address, error) from error


def _refusal(address: str, error: exceptions.RedisError) -> ServerError:
    text = redact(str(error))
    if "OOM" in text or isinstance(error, exceptions.OutOfMemoryError):
        text += " (raise maxmemory; the policy must be noeviction)"
    return RefusedByServerError(address, f"{address} refused a command: {text}.")


def _sentence(error: BaseException) -> str:
    text = redact(str(error)).strip().rstrip(".")
    return text or type(error).__name__

"""The URLs of broker and backend: as they are given, by environment variables, or as Celery does.

What dagster-celery's users have is read for what it means here, or answered: the host of the
default broker, ``rpc://``, and several servers in one URL.
"""

from __future__ import annotations

import os
import re
import warnings

from dagster_taskiq.defaults import BACKEND_URL_VARIABLE, BROKER_HOST_VARIABLES, BROKER_URL_VARIABLE
from dagster_taskiq.errors import ConfigError
from dagster_taskiq.servers.kinds import BACKEND_KINDS, kind_of, one_of, schemes_of
from dagster_taskiq.servers.urls import redact_url

#: The backend where Dagster's instance is, under dagster-celery's name of the backend that needs
#: no server: PostgreSQL where the instance has one, else the embedded server of its host.
WITH_THE_INSTANCE = "rpc://"

#: The broker that is the PostgreSQL of Dagster's instance, and the backend too.
DATABASE_OF_THE_INSTANCE = "dagster"

#: Kombu's sign between the servers of one URL, where another URL follows.
_NEXT_URL = re.compile(r";(?=[a-z][a-z0-9+.-]*://)", re.IGNORECASE)


def find_broker_url(configured: str | None) -> str | None:
    """The broker's URL: the configured one, that of its variable, or the host of one.

    Returns:
        None where nothing names a broker; ``DATABASE_OF_THE_INSTANCE`` as it is.

    Raises:
        ConfigError: it is no URL of a broker.
    """
    url = configured or os.getenv(BROKER_URL_VARIABLE)
    if not url:
        return _url_of_host()
    return url if url == DATABASE_OF_THE_INSTANCE else _first_of("broker", url)


def find_backend_url(configured: str | None, broker_url: str | None) -> str | None:
    """The backend's URL: the configured one, or that of its variable.

    Returns:
        None where it is the broker's own server, and ``WITH_THE_INSTANCE`` for ``rpc://`` and for a
        RabbitMQ without any, which cannot keep the state.

    Raises:
        ConfigError: it is none, or ``rpc://`` beside another broker than RabbitMQ.
    """
    is_rpc = configured is not None and configured.startswith("rpc")
    url = (None if is_rpc else configured) or os.getenv(BACKEND_URL_VARIABLE)
    has_own = (
        broker_url in (None, DATABASE_OF_THE_INSTANCE) or kind_of(str(broker_url)) in BACKEND_KINDS
    )
    if not url:
        if is_rpc and has_own:
            raise ConfigError(
                "backend 'rpc://' is for RabbitMQ as the broker: leave 'backend' out, and the "
                "broker keeps results and claims too; or set 'broker' to an amqp:// URL."
            )
        return None if has_own else WITH_THE_INSTANCE
    if is_rpc:
        warnings.warn(
            f"{BACKEND_URL_VARIABLE} keeps results and claims, in place of backend 'rpc://'.",
            stacklevel=2,
        )
    url = _first_of("backend", url)
    kind = kind_of(url)
    if kind not in BACKEND_KINDS:
        ways = [f"a {it.name} ({one_of(schemes_of([it]))})" for it in BACKEND_KINDS]
        raise ConfigError(f"backend must be {one_of(ways)}, not {kind.name}.")
    return url


def _url_of_host() -> str | None:
    """dagster-celery's default broker, on the host that a variable names."""
    for variable in BROKER_HOST_VARIABLES:
        host = os.getenv(variable)
        if host:
            if not re.fullmatch(r"[\w.-]+|\[[\da-fA-F:.]+\]", host):
                raise ConfigError(
                    f"{variable} must be the name of a host alone. Set {BROKER_URL_VARIABLE} to a "
                    "URL for anything else."
                )
            return f"pyamqp://guest@{host}:5672//"
    return None


def _first_of(name: str, url: str) -> str:
    """The first of Celery's list of servers that stand in for each other, with a warning."""
    first, *others = _NEXT_URL.split(url)
    for one in (first, *others):
        kind_of(one)
    if others:
        warnings.warn(
            f"'{name}' has {len(others) + 1} servers, but only the first, {redact_url(first)}, is "
            "used, also while it is away. Use a host name or a load balancer that stands for all.",
            stacklevel=2,
        )
    return first

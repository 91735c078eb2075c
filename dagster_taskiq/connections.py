"""Which servers the settings mean, here and now."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass, replace
from pathlib import Path

from dagster_taskiq._dagster.storage import has_database_server, postgresql_of
from dagster_taskiq.config.server_urls import WITH_THE_INSTANCE
from dagster_taskiq.config.settings import Settings
from dagster_taskiq.defaults import BACKEND_URL_VARIABLE, BROKER_URL_VARIABLE
from dagster_taskiq.errors import ConfigError
from dagster_taskiq.messages.envelope import QueueKind, physical_queue
from dagster_taskiq.messages.signing import Signer
from dagster_taskiq.servers.embedded.server import find_embedded_server, use_embedded_server
from dagster_taskiq.servers.kinds import (
    BACKEND_KINDS,
    BROKER_KINDS,
    ServerOptions,
    one_of,
    schemes_of,
)


@dataclass(frozen=True)
class Servers:
    """The broker and the backend, which may be the same server.

    Attributes:
        signer: of what is written there.
        embedded_home: the DAGSTER_HOME whose embedded server it is; None for others.
    """

    broker: ServerOptions
    backend: ServerOptions
    signer: Signer
    embedded_home: Path | None = None

    def physical_queue(self, kind: QueueKind, queue: str) -> str:
        """The name on the broker of this deployment's queue for tasks of one kind.

        Args:
            queue: as people name it.
        """
        return physical_queue(self.broker.key_prefix, kind, queue)

    def queue_of(self, physical: str) -> tuple[QueueKind, str] | None:
        """The kind and the name of a queue by its name on the broker; None for another's."""
        for kind in QueueKind:
            name = physical.removeprefix(self.physical_queue(kind, ""))
            if name != physical:
                return kind, name
        return None

    def revive(self) -> None:
        """After a connection was lost: start the embedded server again if it is gone.

        It restarts by itself, but not when its keeper was killed too.

        Raises:
            EmbeddedServerError: it cannot be started.
        """
        if self.embedded_home is not None:
            use_embedded_server(self.embedded_home)


def find_servers(settings: Settings) -> Servers:
    """The servers of the settings; starts the embedded one where they name none.

    Raises:
        ConfigError: no broker is configured and there is no DAGSTER_HOME to keep one in.
        EmbeddedServerError: the embedded server cannot be started.
    """
    source = settings.source
    home = None if settings.broker_url else _dagster_home()
    if home is not None:
        broker = settings.server_options(use_embedded_server(home), None)
    else:
        broker = settings.server_options(str(settings.broker_url), source.broker_use_ssl)
    if settings.backend_url is None:
        return Servers(broker, broker, settings.signer(), home)
    if settings.backend_url == WITH_THE_INSTANCE:
        return _with_the_instance(settings, broker)
    backend = settings.server_options(settings.backend_url, source.redis_backend_use_ssl)
    return Servers(broker, backend, settings.signer(), home)


def _with_the_instance(settings: Settings, broker: ServerOptions) -> Servers:
    """The servers of a broker that cannot keep the state: it is where Dagster's instance is."""
    home = _home_of_instance()
    if database := postgresql_of(home):
        backend = settings.server_options(database.url, None)
        backend = replace(backend, fresh_password=database.fresh_password)
        return Servers(broker, backend, settings.signer())
    if has_database_server(home):
        raise ConfigError(
            f"{broker.kind.name} alone ({broker.address}) cannot keep results and claims, nor can "
            f"the database that {home / 'dagster.yaml'} names: {_set_backend()}"
        )
    backend = settings.server_options(use_embedded_server(home), None)
    return Servers(broker, backend, settings.signer(), home)


def _home_of_instance() -> Path:
    home = os.getenv("DAGSTER_HOME")
    if not home:
        raise ConfigError(
            "RabbitMQ alone cannot keep results and claims. They are kept where Dagster's instance "
            f"is, and there is no DAGSTER_HOME to find it by: set DAGSTER_HOME, or {_set_backend()}"
        )
    return Path(home).expanduser().resolve()


def _set_backend() -> str:
    ways = [f"the {schemes_of([it])[0]} URL of a {it.name}" for it in BACKEND_KINDS]
    return f"set 'backend' or {BACKEND_URL_VARIABLE} to {one_of(ways)}."


def embedded_notice(servers: Servers) -> str:
    """What to say where several hosts may share an instance and each has a broker of its own.

    Returns:
        empty where the broker is not embedded, or the instance is in files of this host.

    Raises:
        ConfigError: Dagster cannot use its dagster.yaml.
    """
    home = servers.embedded_home
    if home is None or servers.broker != servers.backend or not has_database_server(home):
        return ""
    return (
        f"No broker is set, so the embedded server of this host, {socket.gethostname()}, is used, "
        "which other hosts cannot reach, though dagster.yaml names a database server. For workers "
        f"on other hosts set 'broker' or {BROKER_URL_VARIABLE}."
    )


def find_running_backend(settings: Settings) -> ServerOptions | None:
    """The backend of the settings, to look at; None where it is an embedded one that rests.

    Raises:
        ConfigError: see ``find_servers``.
    """
    if settings.backend_url == WITH_THE_INSTANCE:
        home = _home_of_instance()
        is_embedded = not has_database_server(home)
    else:
        is_embedded = settings.broker_url is None and settings.backend_url is None
        home = _dagster_home() if is_embedded else Path()
    if not is_embedded:
        return find_servers(settings).backend
    url = find_embedded_server(home)
    return settings.server_options(url, None) if url else None


def _dagster_home() -> Path:
    home = os.getenv("DAGSTER_HOME")
    if not home:
        raise ConfigError(
            "No broker is configured, and the embedded server needs a DAGSTER_HOME to live in: "
            f"set DAGSTER_HOME, or set 'broker' or {BROKER_URL_VARIABLE} to the URL of a "
            f"{one_of([kind.names[0] for kind in BROKER_KINDS])}."
        )
    return Path(home).expanduser().resolve()

"""Which servers the settings mean, here and now."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from dagster_taskiq._dagster.storage import has_database_server, postgresql_of
from dagster_taskiq.config.server_urls import DATABASE_OF_THE_INSTANCE, WITH_THE_INSTANCE
from dagster_taskiq.config.settings import Settings
from dagster_taskiq.defaults import BACKEND_URL_VARIABLE, BROKER_URL_VARIABLE
from dagster_taskiq.errors import ConfigError
from dagster_taskiq.messages.envelope import QueueKind, physical_queue
from dagster_taskiq.messages.signing import Signer
from dagster_taskiq.servers.embedded.identity import embedded_identity
from dagster_taskiq.servers.embedded.server import find_embedded_server, use_embedded_server
from dagster_taskiq.servers.kinds import (
    BACKEND_KINDS,
    KINDS,
    ServerOptions,
    one_of,
    schemes_of,
)

#: Finds the embedded server of a DAGSTER_HOME.
_FindEmbedded = Callable[[Settings, Path], ServerOptions]


@dataclass(frozen=True)
class Servers:
    """The broker and the backend, which may be the same server.

    Attributes:
        signer: of what is written there.
        embedded_home: the DAGSTER_HOME whose embedded server it is; None for others.
        notice: what to say in a log of servers that nobody has named; often nothing.
    """

    broker: ServerOptions
    backend: ServerOptions
    signer: Signer
    embedded_home: Path | None = None
    notice: str = ""

    @property
    def notice_level(self) -> int:
        """Of the log: a warning where other hosts may be left out."""
        return logging.INFO if self.embedded_home is None else logging.WARNING

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
    """The servers of the settings; starts the embedded one where it is meant.

    Where nothing is named, the PostgreSQL of Dagster's instance is broker and backend, so that
    workers on several hosts meet there; and the embedded server where the instance is on none.

    Raises:
        ConfigError: what is named cannot be used, or nothing is and there is no DAGSTER_HOME.
        EmbeddedServerError: the embedded server cannot be started.
    """
    return _find(settings, _started)


def name_servers(settings: Settings) -> Servers:
    """The same without starting any: an embedded one has the URL of a socket that is not there.

    Raises:
        ConfigError: see ``find_servers``.
    """
    return _find(settings, lambda at, _home: at.server_options("unix:///embedded", None))


def find_running_servers(settings: Settings) -> Servers | None:
    """The servers of the settings, to look at; None where an embedded one is meant that rests.

    Raises:
        ConfigError, EmbeddedServerError: see ``find_servers``.
    """
    try:
        return _find(settings, _running)
    except _RestsError:
        return None


class _RestsError(Exception):
    """No process uses the embedded server."""


def _started(settings: Settings, home: Path) -> ServerOptions:
    """The embedded server of a DAGSTER_HOME, which runs from now on."""
    return _embedded(settings, home, use_embedded_server(home))


def _running(settings: Settings, home: Path) -> ServerOptions:
    """The embedded server of a DAGSTER_HOME, as others use it."""
    url = find_embedded_server(home)
    if url is None:
        raise _RestsError
    return _embedded(settings, home, url)


def _embedded(settings: Settings, home: Path, url: str) -> ServerOptions:
    return replace(settings.server_options(url, None), identity=embedded_identity(home))


def _find(settings: Settings, embedded: _FindEmbedded) -> Servers:
    """The servers, where ``embedded`` finds a DAGSTER_HOME's embedded one."""
    if settings.broker_url is None:
        return _unnamed(settings, embedded)
    if settings.broker_url == DATABASE_OF_THE_INSTANCE:
        broker = _named_database(settings)
    else:
        broker = settings.server_options(settings.broker_url, settings.source.broker_use_ssl)
    if settings.backend_url is None:
        return Servers(broker, broker, settings.signer())
    if settings.backend_url == WITH_THE_INSTANCE:
        return _with_the_instance(settings, broker, embedded)
    return Servers(broker, _named_backend(settings), settings.signer())


def _unnamed(settings: Settings, embedded: _FindEmbedded) -> Servers:
    """The servers of settings without a broker."""
    home = _dagster_home()
    if settings.backend_url is None and (database := _database_of(settings, home)):
        notice = (
            f"No broker is set: queues, claims and results are in the PostgreSQL of Dagster's "
            f"instance, {database.address}, as with 'broker: {DATABASE_OF_THE_INSTANCE}'."
        )
        return Servers(database, database, settings.signer(), notice=notice)
    broker = embedded(settings, home)
    if settings.backend_url is not None:
        return Servers(broker, _named_backend(settings), settings.signer(), home)
    notice = ""
    if has_database_server(home):
        notice = (
            f"No broker is set, so the embedded server of this host, {socket.gethostname()}, is "
            "used, which other hosts cannot reach, though dagster.yaml names a database server. "
            f"For workers on other hosts set 'broker' or {BROKER_URL_VARIABLE}."
        )
    return Servers(broker, broker, settings.signer(), home, notice)


def _named_backend(settings: Settings) -> ServerOptions:
    url = str(settings.backend_url)
    return settings.server_options(url, settings.source.redis_backend_use_ssl)


def _named_database(settings: Settings) -> ServerOptions:
    """The database that ``broker: dagster`` stands for."""
    name = f"The broker {DATABASE_OF_THE_INSTANCE!r} is the PostgreSQL of Dagster's instance"
    home = _home_of_instance(f"{name}.", f"set 'broker' to {_a_broker()}.")
    database = _database_of(settings, home)
    if database is None:
        where = "another server" if has_database_server(home) else "files"
        raise ConfigError(
            f"{name}, and the event log of the one in {home} is in {where}: set 'storage: "
            f"postgres:' in {home / 'dagster.yaml'}, or set 'broker' or {BROKER_URL_VARIABLE} to "
            f"{_a_broker()}."
        )
    return database


def _database_of(settings: Settings, home: Path) -> ServerOptions | None:
    """The database of the instance of a DAGSTER_HOME, if that is a PostgreSQL."""
    database = postgresql_of(home)
    if database is None:
        return None
    options = settings.server_options(database.url, None)
    return replace(options, fresh_password=database.fresh_password)


def _with_the_instance(
    settings: Settings, broker: ServerOptions, embedded: _FindEmbedded
) -> Servers:
    """The servers of a broker that cannot keep the state: it is where Dagster's instance is."""
    home = _home_of_state()
    if backend := _database_of(settings, home):
        return Servers(broker, backend, settings.signer())
    if has_database_server(home):
        raise ConfigError(
            f"{broker.kind.name} alone ({broker.address}) cannot keep results and claims, nor can "
            f"the database that {home / 'dagster.yaml'} names: {_set_backend()}"
        )
    return Servers(broker, embedded(settings, home), settings.signer(), home)


def _home_of_state() -> Path:
    why = "RabbitMQ alone cannot keep results and claims. They are kept where Dagster's instance is"
    return _home_of_instance(f"{why}.", _set_backend())


def _home_of_instance(why: str, otherwise: str) -> Path:
    home = os.getenv("DAGSTER_HOME")
    if not home:
        raise ConfigError(
            f"{why} There is no DAGSTER_HOME to find the instance by: set DAGSTER_HOME, or "
            f"{otherwise}"
        )
    return Path(home).expanduser().resolve()


def _set_backend() -> str:
    ways = [f"the {schemes_of([it])[0]} URL of a {it.name}" for it in BACKEND_KINDS]
    return f"set 'backend' or {BACKEND_URL_VARIABLE} to {one_of(ways)}."


def _a_broker() -> str:
    return f"the URL of a {one_of([kind.names[0] for kind in KINDS])}"


def _dagster_home() -> Path:
    otherwise = f"set 'broker' or {BROKER_URL_VARIABLE} to {_a_broker()}."
    return _home_of_instance(
        "No broker is configured, and what stands in for it is found by DAGSTER_HOME.", otherwise
    )

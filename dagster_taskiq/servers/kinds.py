"""Kinds of servers: one row says all that is known of a kind.

A new kind takes a row in ``KINDS``, and the modules of ``brokers/`` and ``backend/`` that it names.
Everything else reads the rows: which URLs there are, what a URL means, who speaks with the server,
and what an error of it means.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pkgutil import resolve_name
from typing import Any
from urllib.parse import unquote, urlsplit

from dagster_taskiq.defaults import CONNECT_TIMEOUT_SECONDS, KEY_PREFIX
from dagster_taskiq.errors import ConfigError
from dagster_taskiq.servers.server_refusals import (
    AMQP_REFUSALS,
    POSTGRESQL_SERVER_REFUSALS,
    REDIS_REFUSALS,
    Refusal,
)
from dagster_taskiq.servers.tls import Tls, take_ssl_parameters
from dagster_taskiq.servers.urls import (
    normalize_amqp,
    normalize_postgresql,
    redact_url,
    split_url,
    with_scheme,
)


@dataclass(frozen=True)
class Scheme:
    """What a URL's scheme means.

    Attributes:
        port: of a URL that names none; None where the scheme has no ports.
        tls_scheme: the scheme of the same server with TLS, which for one with TLS is itself; None
            where there is no TLS.
        stands_for: the scheme that this one is another name of.
    """

    port: int | None = None
    tls_scheme: str | None = None
    stands_for: str | None = None


@dataclass(frozen=True)
class ServerKind:
    """One kind of server, and everything that depends on it.

    Attributes:
        names: of the products, as people call them.
        schemes: of its URLs, by their names in lower case.
        default_path: the path, without slashes, of a URL that has none: the virtual host or the
            number of the database.
        refusals: what the server's errors mean.
        broker: module and class in ``brokers/``, as ``module:Class``.
        backend: the same in ``backend/``; None for a server that cannot be the backend.
        extra: of our package, which brings the client library; empty where that is always there.
        bell: the same in ``brokers/``, of what tells runs' loops of results; None without.
        is_woken_by_broker: whether, as the backend, it had better leave that to the broker's bell.
        facts: module and function in ``servers/`` that tell how the server is set, see
            ``facts.read_facts``; empty where nothing is asked.
        has_ssl_parameters: whether TLS may be set in the URL, by kombu's ``ssl_`` parameters.
        client_url: the URL as the client library reads it.
    """

    names: Sequence[str]
    schemes: Mapping[str, Scheme]
    default_path: str
    refusals: Sequence[Refusal]
    broker: str
    backend: str | None
    extra: str = ""
    bell: str | None = None
    is_woken_by_broker: bool = False
    facts: str = ""
    has_ssl_parameters: bool = False
    client_url: Callable[[str], str] = str

    @property
    def name(self) -> str:
        """What people call it."""
        return " or ".join(self.names)


RABBITMQ = ServerKind(
    names=("RabbitMQ",),
    schemes={
        "amqp": Scheme(5672, "amqps"),
        "amqps": Scheme(5671, "amqps"),
        "pyamqp": Scheme(5672, "amqps", stands_for="amqp"),
    },
    default_path="",
    refusals=AMQP_REFUSALS,
    broker="amqp:AmqpTaskBroker",
    backend=None,
    bell="amqp_bell:AmqpBell",
    client_url=normalize_amqp,
)

REDIS = ServerKind(
    names=("Redis", "Valkey"),
    schemes={
        "redis": Scheme(6379, "rediss"),
        "rediss": Scheme(6379, "rediss"),
        "unix": Scheme(),
    },
    default_path="0",
    refusals=REDIS_REFUSALS,
    broker="redis:RedisTaskBroker",
    backend="redis:RedisBackend",
    facts="dagster_taskiq.servers.redis_facts:read_redis_facts",
    has_ssl_parameters=True,
)

POSTGRESQL = ServerKind(
    names=("PostgreSQL",),
    # TLS is libpq's own: ``?sslmode=``
    schemes={
        "postgresql": Scheme(5432),
        "postgres": Scheme(5432, stands_for="postgresql"),
        "postgresql+psycopg2": Scheme(5432, stands_for="postgresql"),
        "postgresql+psycopg": Scheme(5432, stands_for="postgresql"),
    },
    default_path="",
    refusals=POSTGRESQL_SERVER_REFUSALS,
    broker="postgresql:PostgresqlTaskBroker",
    backend="postgresql:PostgresqlBackend",
    facts="dagster_taskiq.servers.postgresql_facts:read_postgresql_facts",
    extra="postgres",
    is_woken_by_broker=True,
    client_url=normalize_postgresql,
)

KINDS = (RABBITMQ, REDIS, POSTGRESQL)

#: The kinds that can be the backend; each can be the broker.
BACKEND_KINDS = tuple(kind for kind in KINDS if kind.backend is not None)


def kind_of(url: str) -> ServerKind:
    """The kind of server that a URL names.

    Raises:
        ConfigError: it cannot be read, or its scheme is of no kind; see ``split_url``.
    """
    kind = _find_kind(url)
    if kind is None:
        known = ", ".join(schemes_of(KINDS))
        raise ConfigError(f"The URL of a server must start with {known}, and this one does not.")
    split_url(url)
    return kind


def uses_tls(url: str) -> bool:
    """Whether the URL, or address, says that the connection is made with TLS."""
    kind, scheme = _find_kind(url), _scheme_of(url)
    return kind is not None and kind.schemes[scheme].tls_scheme == scheme


def read_tls(url: str, tls: Tls | None) -> tuple[str, Tls]:
    """The URL without what it says of TLS beside its scheme, and how its server is verified.

    Args:
        tls: of the settings; with it a URL without TLS becomes one with it. What the URL itself
            says goes before it.

    Raises:
        ConfigError: the URL's scheme is unknown, or a parameter of it cannot be used.
    """
    kind = kind_of(url)
    tls_scheme = kind.schemes[_scheme_of(url)].tls_scheme
    if tls is not None and tls_scheme is not None:
        url = with_scheme(url, tls_scheme)
    if kind.has_ssl_parameters and uses_tls(url):
        return take_ssl_parameters(url, tls)
    return url, tls or Tls()


def is_same_address(one: str, other: str) -> bool:
    """Whether two addresses name the same server, and the same virtual host or database there.

    Who logs in makes no difference. Different names of one host count as different servers.
    """
    return _place_of(one) == _place_of(other)


def _place_of(address: str) -> tuple[object, ...]:
    kind, scheme = _find_kind(address), _scheme_of(address)
    try:
        parts = urlsplit(address)
        port = parts.port
    except ValueError:  # an address that a stranger has written
        return (address,)
    if kind is None:
        return (scheme, parts.hostname, port, parts.path, parts.query)
    meaning = kind.schemes[scheme]
    path = unquote(parts.path).strip("/") or kind.default_path
    query = parts.query if meaning.port is None else ""
    return meaning.stands_for or scheme, parts.hostname, port or meaning.port, path, query


def _scheme_of(url: str) -> str:
    return url.partition("://")[0].lower()


def _find_kind(url: str) -> ServerKind | None:
    scheme = _scheme_of(url)
    if "://" not in url:
        return None
    return next((kind for kind in KINDS if scheme in kind.schemes), None)


def schemes_of(kinds: Iterable[ServerKind]) -> list[str]:
    """How the URLs of some kinds begin, each as ``scheme://``; SQLAlchemy's spellings go unsaid."""
    schemes = [scheme for kind in kinds for scheme in kind.schemes]
    return [f"{scheme}://" for scheme in schemes if "+" not in scheme]


def one_of(items: Sequence[str]) -> str:
    """Several things as a sentence offers them: ``a, b or c``."""
    return " or ".join(filter(None, (", ".join(items[:-1]), items[-1])))


@dataclass(frozen=True)
class ServerOptions:
    """What it takes to reach a broker or backend.

    Attributes:
        url: with its password; never log it, log ``address``.
        key_prefix: start of the name of every key and physical queue of ours.
        connect_timeout_seconds: after which a server that does not answer is unreachable.
        heartbeat_seconds: of an AMQP connection; None is the server's own.
        tls: for a URL with TLS.
        identity: what the server's state is known by, where the server itself does not tell; see
            ``Backend.identity``.
        fresh_password: makes the password of each new connection, in place of the URL's; for
            PostgreSQL alone. It may take its time.
    """

    url: str
    key_prefix: str = KEY_PREFIX
    connect_timeout_seconds: float = CONNECT_TIMEOUT_SECONDS
    heartbeat_seconds: int | None = None
    tls: Tls = Tls()
    identity: str = ""
    fresh_password: Callable[[], str] | None = None

    @property
    def kind(self) -> ServerKind:
        """The row of the server's kind.

        Raises:
            ConfigError: see ``kind_of``.
        """
        return kind_of(self.url)

    @property
    def client_url(self) -> str:
        """The URL as the client library reads it, with its password."""
        return self.kind.client_url(self.url)

    @property
    def uses_tls(self) -> bool:
        """Whether the connection is made with TLS."""
        return uses_tls(self.url)

    @property
    def address(self) -> str:
        """The URL without its password."""
        return redact_url(self.url)

    def load(self, name: str, role: str) -> Any:
        """What speaks with the server, by name, so that nobody loads what it does not use.

        Args:
            name: ``module:Class``.
            role: of the server, for the error.

        Raises:
            ConfigError: its client library is not installed.
        """
        try:
            return resolve_name(name)
        except ImportError as error:
            if not self.kind.extra:
                raise
            raise ConfigError(
                f"The {role} {self.address} needs a package that is not here ({error}): "
                f"pip install 'dagster-taskiq[{self.kind.extra}]'."
            ) from error

    def __repr__(self) -> str:
        return f"ServerOptions({self.address!r}, key_prefix={self.key_prefix!r})"

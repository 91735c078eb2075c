"""Settings: what executor, launcher and workers are configured with, checked once, then frozen.

One class serves them all, so that the YAML of a run and the YAML of its workers are the same text.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dagster_taskiq import defaults
from dagster_taskiq.config import parsers
from dagster_taskiq.config.config_source import ConfigSource
from dagster_taskiq.config.server_urls import (
    DATABASE_OF_THE_INSTANCE,
    find_backend_url,
    find_broker_url,
)
from dagster_taskiq.config.setting import nearest_hint, setting, settings_of
from dagster_taskiq.config.shapes import (
    Anything,
    Choice,
    Integer,
    ListOf,
    Nullable,
    Number,
    Options,
    TagLimit,
    Text,
)
from dagster_taskiq.errors import ConfigError
from dagster_taskiq.messages.signing import Signer, parse_keys
from dagster_taskiq.servers.kinds import (
    BACKEND_KINDS,
    KINDS,
    ServerKind,
    ServerOptions,
    one_of,
    read_tls,
    schemes_of,
)
from dagster_taskiq.servers.tls import Tls
from dagster_taskiq.servers.urls import redact


def _urls(kinds: tuple[ServerKind, ...]) -> str:
    return one_of([f"`{scheme}`" for scheme in schemes_of(kinds)])


def _both() -> str:
    """The servers that can be broker and backend at once."""
    return one_of([name for kind in BACKEND_KINDS for name in kind.names])


@dataclass(frozen=True)
class Settings:
    """The whole configuration of an executor, a launcher or a worker.

    ``broker_url`` None means that nothing names one, ``DATABASE_OF_THE_INSTANCE`` the PostgreSQL of
    Dagster's instance. ``backend_url`` None means the broker's own server, ``WITH_THE_INSTANCE``
    the one where Dagster's instance is.
    ``signing_variables`` are the environment variables that may hold signing keys.
    """

    broker_url: str | None = setting(
        None,
        None,
        f"URL of the broker: {_urls(KINDS)}; or `{DATABASE_OF_THE_INSTANCE}`, the PostgreSQL of "
        "Dagster's instance.",
        name="broker",
        shape=Nullable(Text()),
        variable=defaults.BROKER_URL_VARIABLE,
        default_text="`dagster` where the instance is on PostgreSQL, else the embedded server of "
        "`$DAGSTER_HOME`",
        is_secret=True,
    )
    backend_url: str | None = setting(
        None,
        None,
        f"URL of the server that keeps results and claims: {_urls(BACKEND_KINDS)}.",
        name="backend",
        shape=Nullable(Text()),
        variable=defaults.BACKEND_URL_VARIABLE,
        default_text=f"the broker if that is {_both()}, else where Dagster's instance is",
        is_secret=True,
    )
    signing_keys: tuple[str, ...] = setting(
        (),
        None,
        "Key that signs and verifies tasks, results and orders to workers, best as `{env: NAME}`; "
        "or a list of keys: the first one signs, all verify. Without any nothing is signed.",
        name="signing_key",
        shape=Nullable(Anything()),
        variable=defaults.SIGNING_KEY_VARIABLE,
        is_secret=True,
    )
    include: tuple[str, ...] = setting(
        (),
        parsers.items,
        "Modules that every worker imports before it takes a task.",
        shape=ListOf(Text()),
    )
    source: ConfigSource = setting(
        ConfigSource,
        None,
        "More settings, under Celery's names where it knows them; the README has a table of them.",
        name="config_source",
        shape=Nullable(Options()),
        default_text="none",
    )
    default_queue: str = setting(
        defaults.DEFAULT_QUEUE,
        None,
        "Queue of a step or run without a queue tag.",
        shape=Nullable(Text()),
    )
    retries: str = setting(
        "enabled",
        parsers.retry_mode,
        "Whether steps are retried: `disabled: {}` ignores retry policies, `deferred: {}` leaves "
        "them to whoever started the run.",
        shape=Choice(("enabled", "disabled", "deferred")),
        schema_default={"enabled": {}},
        default_text="`enabled: {}`",
        is_of_launcher=False,
    )
    max_concurrent: int | None = setting(
        None,
        parsers.positive_integer,
        "How many steps of one run may be queued or running at once.",
        shape=Nullable(Integer()),
        default_text="no limit",
        is_of_launcher=False,
    )
    tag_concurrency_limits: tuple[Mapping[str, Any], ...] = setting(
        (),
        parsers.items,
        "How many steps of one run with a tag may be queued or running at once, as in Dagster's "
        "other executors.",
        shape=ListOf(TagLimit()),
        is_of_launcher=False,
    )
    lease_seconds: float = setting(
        defaults.LEASE_SECONDS,
        parsers.lease_seconds,
        "How long a worker may be silent before its steps and runs count as lost.",
        shape=Number(),
        schema_default=defaults.LEASE_SECONDS,
    )
    cancel_grace_seconds: float = setting(
        defaults.CANCEL_GRACE_SECONDS,
        parsers.seconds,
        "How long a cancelled step may clean up before it is killed; at most 5 s where the process "
        "of its run is dead.",
        shape=Number(),
        schema_default=defaults.CANCEL_GRACE_SECONDS,
    )
    server_patience_seconds: float = setting(
        defaults.SERVER_PATIENCE_SECONDS,
        parsers.seconds,
        "How long a run that begins or is launched, or a worker that starts, waits for a broker, "
        "backend or database that is away. 0 is to fail at once.",
        shape=Number(),
        schema_default=defaults.SERVER_PATIENCE_SECONDS,
    )
    max_message_bytes: int = setting(
        defaults.MAX_MESSAGE_BYTES,
        parsers.positive_integer,
        "The longest task or result that is sent or read; workers and runs need the same value. A "
        "run that has to send a longer task fails and names the step; of a longer result it reads "
        "in Dagster's log what came of the step. RabbitMQ has a limit of its own, "
        "`max_message_size`.",
        shape=Integer(),
        schema_default=defaults.MAX_MESSAGE_BYTES,
        default_text=f"{defaults.MAX_MESSAGE_BYTES} ({defaults.MAX_MESSAGE_BYTES // 2**20} MiB)",
    )
    dashboard_url: str = setting(
        "",
        None,
        "Where people reach `dagster-taskiq dashboard`, such as `https://host/taskiq`: each run's "
        "log in Dagster's UI has a link to its page there.",
        shape=Nullable(Text()),
        variable=defaults.DASHBOARD_URL_VARIABLE,
        default_text="no link",
    )
    signing_variables: tuple[str, ...] = (defaults.SIGNING_KEY_VARIABLE,)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Settings:
        """Settings from a value of the schema, as Dagster hands it over or ``load_yaml`` reads it.

        Raises:
            ConfigError: something in it cannot be used; the message names it.
        """
        source = ConfigSource.read(config.get("config_source"))
        keys, variables = _signing_keys(config.get("signing_key"))
        broker_url = find_broker_url(config.get("broker"))
        backend_url = find_backend_url(config.get("backend"), broker_url)
        queue = config.get("default_queue") or source.task_default_queue or defaults.DEFAULT_QUEUE
        others = {
            row.field: row.read(config[row.name])
            for row in settings_of(cls)
            if row.parse is not None and config.get(row.name) is not None
        }
        return cls(
            broker_url=broker_url,
            backend_url=backend_url,
            source=source,
            default_queue=queue,
            signing_keys=keys,
            signing_variables=variables,
            dashboard_url=_dashboard_url(config.get("dashboard_url")),
            **others,
        )

    def signer(self) -> Signer:
        """Signs and verifies with these settings' keys, for their deployment."""
        return Signer(self.signing_keys, self.source.key_prefix, self.max_message_bytes)

    def page_of(self, run_id: str) -> str:
        """The address of a run's page in the dashboard; empty where that has none."""
        return f"{self.dashboard_url}/runs/{run_id}" if self.dashboard_url else ""

    def server_options(self, url: str, tls: Tls | None) -> ServerOptions:
        """How to reach one of the servers with these settings; see ``read_tls``."""
        url, tls = read_tls(url, tls)
        return ServerOptions(
            url=url,
            key_prefix=self.source.key_prefix,
            connect_timeout_seconds=self.source.broker_connection_timeout,
            heartbeat_seconds=self.source.broker_heartbeat,
            tls=tls,
        )


def check_config(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Settings of a YAML file as Dagster hands them over: of the right shapes, ``env:`` resolved.

    Args:
        where: what to name in an error: a file or an argument.

    Raises:
        ConfigError: in one line, with everything that is wrong.
    """
    _check_keys(where, config)
    known = {row.name: row for row in settings_of(Settings)}
    checked: dict[str, Any] = {}
    problems = []
    for key, value in config.items():
        if key not in known:
            problems.append(f"There is no setting {key!r}.{nearest_hint(key, known)}")
            continue
        try:
            checked[key] = known[key].check(value)
        except ConfigError as error:
            problems.append(str(error))
    if problems:
        raise ConfigError(redact(f"{where}: {' '.join(problems)}"))
    return checked


def _check_keys(where: str, value: Any) -> None:
    """Refuse keys that YAML reads as numbers, dates, ...: Dagster fails at them."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            if not isinstance(key, str):
                raise ConfigError(f"{where}: the key {key!r} is no text; quote it.")
            _check_keys(where, inner)
    elif isinstance(value, list):
        for inner in value:
            _check_keys(where, inner)


def _dashboard_url(value: Any) -> str:
    if value is None:
        name = defaults.DASHBOARD_URL_VARIABLE
        return parsers.web_address(f"${name}", os.getenv(name) or None)
    return parsers.web_address("dashboard_url", parsers.from_env(value))


def _signing_keys(value: Any) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The keys, and the environment variables that may hold some."""
    variables = [defaults.SIGNING_KEY_VARIABLE]
    if value is None:
        text = os.getenv(defaults.SIGNING_KEY_VARIABLE)
        keys = parse_keys(f"${defaults.SIGNING_KEY_VARIABLE}", [text]) if text else ()
        return keys, tuple(variables)
    items = value if isinstance(value, list) else [value]
    if not items:
        raise ConfigError("signing_key is an empty list: leave it out to sign nothing.")
    variables += [str(item["env"]) for item in items if isinstance(item, Mapping) and "env" in item]
    keys = parse_keys("signing_key", [parsers.from_env(item) for item in items])
    return keys, tuple(dict.fromkeys(variables))

"""Settings: what executor, launcher and workers are configured with, checked once, then frozen.

One schema serves them all, so that the YAML of a run and the YAML of its workers are the same
text. ``config_source`` holds what Celery's users know under Celery's names. Each key is a field of
``ConfigSource``; any other is answered: one of Celery's that means nothing here with a warning, a
misspelt one with an error that names the nearest right one.
"""

from __future__ import annotations

import difflib
import math
import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import yaml
from dagster import Any as AnyType
from dagster import (
    Array,
    Field,
    IntSource,
    Noneable,
    Permissive,
    ScalarUnion,
    Selector,
    StringSource,
)

from dagster_taskiq import defaults
from dagster_taskiq._dagster.names import process_schema, tag_concurrency_limits_field
from dagster_taskiq.config.celery_names import CELERY_SETTINGS
from dagster_taskiq.errors import ConfigError
from dagster_taskiq.messages.plain_text import yaml_problem
from dagster_taskiq.messages.signing import Signer, parse_keys
from dagster_taskiq.servers.kinds import ServerOptions, Tls, redact
from dagster_taskiq.servers.tls import parse_tls, read_tls
from dagster_taskiq.servers.urls import find_backend_url, find_broker_url

_SECONDS = ScalarUnion(scalar_type=float, non_scalar_schema={"env": str})

#: The part of the schema that executor, launcher and workers share.
CONNECTION_SCHEMA: dict[str, Field] = {
    "broker": Field(
        Noneable(StringSource),
        is_required=False,
        description=(
            "URL of the broker: amqp://, amqps://, redis://, rediss:// or unix://. Default: "
            f"${defaults.BROKER_URL_VARIABLE}, else the embedded server of this DAGSTER_HOME."
        ),
    ),
    "backend": Field(
        Noneable(StringSource),
        is_required=False,
        description=(
            "URL of the Redis or Valkey that keeps results and claims. Default: "
            f"${defaults.BACKEND_URL_VARIABLE}, else the broker's own server when that is Redis."
        ),
    ),
    "signing_key": Field(
        Noneable(AnyType),
        is_required=False,
        description=(
            "Key that signs and verifies tasks, results and control messages, best as {env: NAME}; "
            "or a list of keys: the first one signs, all verify. Default: "
            f"${defaults.SIGNING_KEY_VARIABLE}; without any nothing is signed or verified."
        ),
    ),
    "include": Field(
        Array(StringSource),
        is_required=False,
        description="Modules that every worker imports before it takes a task.",
    ),
    "config_source": Field(
        Noneable(Permissive()),
        is_required=False,
        description="More settings, under Celery's names; see the README's table.",
    ),
    "default_queue": Field(
        Noneable(StringSource),
        is_required=False,
        description=f"Queue of what names none. Default: '{defaults.DEFAULT_QUEUE}'.",
    ),
    "lease_seconds": Field(
        _SECONDS,
        is_required=False,
        default_value=defaults.LEASE_SECONDS,
        description="After how long without a sign of life a worker's task counts as lost.",
    ),
    "max_message_bytes": Field(
        IntSource,
        is_required=False,
        default_value=defaults.MAX_MESSAGE_BYTES,
        description=(
            "The longest task or result that is sent or read. Workers and runs need the same value."
        ),
    ),
    "cancel_grace_seconds": Field(
        _SECONDS,
        is_required=False,
        default_value=defaults.CANCEL_GRACE_SECONDS,
        description="Time that a cancelled step has for its clean-up before it is killed.",
    ),
    "server_patience_seconds": Field(
        _SECONDS,
        is_required=False,
        default_value=defaults.SERVER_PATIENCE_SECONDS,
        description=(
            "How long a run that begins or is launched, or a worker that starts, waits for a "
            "broker, backend or database that is away. 0 is to fail at once."
        ),
    ),
}

EXECUTOR_SCHEMA: dict[str, Field] = {
    **CONNECTION_SCHEMA,
    "retries": Field(
        Selector({"enabled": {}, "disabled": {}, "deferred": {}, "env": str}),
        is_required=False,
        default_value={"enabled": {}},
        description="Whether steps are retried. By default they are.",
    ),
    "max_concurrent": Field(
        Noneable(IntSource),
        is_required=False,
        description="How many steps of one run may be queued or running at once. Default: all.",
    ),
    "tag_concurrency_limits": tag_concurrency_limits_field(),  # type: ignore[no-untyped-call]
}


@dataclass(frozen=True)
class ConfigSource:
    """The settings of ``config_source``; the names are Celery's, but for ``key_prefix``.

    Attributes:
        task_default_priority: of a step without a priority tag.
        task_default_queue: of what names none, when ``default_queue`` is not given.
        task_always_eager: run the steps in the calling process, for tests without a broker.
        result_expires: seconds that an unread result is kept.
        broker_connection_timeout: seconds until a server that does not answer is unreachable.
        broker_heartbeat: seconds between the heartbeats of an AMQP connection.
        broker_use_ssl, redis_backend_use_ssl: TLS of broker and backend, also where the URL does
            not say so.
        worker_concurrency: slots of a worker.
        worker_max_tasks_per_child: tasks after which a slot's child process is replaced.
        worker_max_memory_per_child: KiB of memory above which it is replaced.
        task_soft_time_limit, task_time_limit: seconds that a step may take on a worker, until it
            gets an exception and until it is killed; 0 is no limit.
        database_short_lived_sessions: open a connection to Dagster's database for each statement,
            as Dagster does, rather than keep one.
        key_prefix: start of the name of every key and queue on the servers.
    """

    task_default_priority: int = defaults.DEFAULT_STEP_PRIORITY
    task_default_queue: str | None = None
    task_always_eager: bool = False
    result_expires: float = defaults.RESULT_EXPIRES_SECONDS
    broker_connection_timeout: float = defaults.CONNECT_TIMEOUT_SECONDS
    broker_heartbeat: int | None = None
    broker_use_ssl: Tls | None = None
    redis_backend_use_ssl: Tls | None = None
    worker_concurrency: int | None = None
    worker_max_tasks_per_child: int | None = None
    worker_max_memory_per_child: int | None = None
    task_soft_time_limit: float | None = None
    task_time_limit: float | None = None
    database_short_lived_sessions: bool = False
    key_prefix: str = defaults.KEY_PREFIX

    @classmethod
    def from_mapping(cls, source: Mapping[str, Any]) -> ConfigSource:
        """Check every key and value.

        Raises:
            ConfigError: a key is misspelt or a value of the wrong type.
        """
        values = {}
        for key, raw in source.items():
            if key in _CONFIG_SOURCE_PARSERS:
                values[key] = _CONFIG_SOURCE_PARSERS[key](f"config_source.{key}", _from_env(raw))
            else:
                _answer_unknown_key(key)
        return cls(**values)


@dataclass(frozen=True)
class Settings:
    """The whole configuration of an executor, a launcher or a worker; see the schema's texts.

    ``broker_url`` None means the embedded server, ``backend_url`` None the broker's own server.
    ``signing_variables`` are the environment variables that may hold signing keys.
    """

    broker_url: str | None = field(default=None, repr=False)
    backend_url: str | None = field(default=None, repr=False)
    include: tuple[str, ...] = ()
    source: ConfigSource = field(default_factory=ConfigSource)
    default_queue: str = defaults.DEFAULT_QUEUE
    retries: str = "enabled"
    max_concurrent: int | None = None
    tag_concurrency_limits: tuple[Mapping[str, Any], ...] = ()
    lease_seconds: float = defaults.LEASE_SECONDS
    cancel_grace_seconds: float = defaults.CANCEL_GRACE_SECONDS
    server_patience_seconds: float = defaults.SERVER_PATIENCE_SECONDS
    max_message_bytes: int = defaults.MAX_MESSAGE_BYTES
    signing_keys: tuple[str, ...] = field(default=(), repr=False)
    signing_variables: tuple[str, ...] = (defaults.SIGNING_KEY_VARIABLE,)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Settings:
        """Settings from a value of the schema, as Dagster hands it over or ``load_yaml`` reads it.

        Raises:
            ConfigError: something in it cannot be used; the message names it.
        """
        source = ConfigSource.from_mapping(_config_source(config.get("config_source")))
        keys, variables = _signing_keys(config.get("signing_key"))
        broker_url = find_broker_url(config.get("broker"))
        settings = cls(
            broker_url=broker_url,
            backend_url=find_backend_url(
                config.get("backend"), broker_url, is_needed=not source.task_always_eager
            ),
            include=tuple(config.get("include") or ()),
            source=source,
            default_queue=(
                config.get("default_queue") or source.task_default_queue or defaults.DEFAULT_QUEUE
            ),
            retries=_retries(config.get("retries") or {"enabled": {}}),
            max_concurrent=config.get("max_concurrent"),
            tag_concurrency_limits=tuple(config.get("tag_concurrency_limits") or ()),
            lease_seconds=_seconds(config, "lease_seconds", defaults.LEASE_SECONDS),
            cancel_grace_seconds=_seconds(
                config, "cancel_grace_seconds", defaults.CANCEL_GRACE_SECONDS
            ),
            server_patience_seconds=_seconds(
                config, "server_patience_seconds", defaults.SERVER_PATIENCE_SECONDS
            ),
            max_message_bytes=_positive_integer(
                "max_message_bytes",
                config.get("max_message_bytes", defaults.MAX_MESSAGE_BYTES),
            ),
            signing_keys=keys,
            signing_variables=variables,
        )
        settings.check()
        return settings

    def check(self) -> None:
        """Raise ConfigError for a value that its type allows and its meaning does not."""
        if self.lease_seconds < defaults.MIN_LEASE_SECONDS:
            raise ConfigError(
                f"lease_seconds is {self.lease_seconds:g}, it must be at least "
                f"{defaults.MIN_LEASE_SECONDS:g}: a shorter lease is lost by a busy machine."
            )
        for name in ("cancel_grace_seconds", "server_patience_seconds"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} must not be negative.")
        for name in ("lease_seconds", "cancel_grace_seconds", "server_patience_seconds"):
            if getattr(self, name) > defaults.LONGEST_SECONDS:
                raise ConfigError(f"{name} must be at most {defaults.LONGEST_SECONDS:g}.")
        if self.max_concurrent is not None and self.max_concurrent < 1:
            raise ConfigError(f"max_concurrent is {self.max_concurrent}, it must be at least 1.")

    def signer(self) -> Signer:
        """Signs and verifies with these settings' keys, for their deployment."""
        return Signer(self.signing_keys, self.source.key_prefix, self.max_message_bytes)

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
    """A value of the executor's schema with its ``env:`` parts resolved and its defaults set.

    Args:
        where: what to name in an error: a file or an argument.

    Raises:
        ConfigError: in one line.
    """
    _check_keys(where, config)
    value, problems = process_schema(EXECUTOR_SCHEMA, config)
    if problems:
        hints = "".join(_hint(key, EXECUTOR_SCHEMA) for key in config if key not in EXECUTOR_SCHEMA)
        raise ConfigError(redact(f"{where}: {' '.join(problems)}{hints}"))
    return dict(value)


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


def _config_source(value: Any) -> Mapping[str, Any]:
    """The mapping, or the one that an environment variable holds as YAML or JSON."""
    text = _from_env(value)
    if isinstance(text, str):
        try:
            text = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ConfigError(
                f"config_source in ${value['env']} is not YAML: {yaml_problem(error)}."
            ) from None
    return mapping("config_source", text)


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
    keys = parse_keys("signing_key", [_from_env(item) for item in items])
    return keys, tuple(dict.fromkeys(variables))


def _retries(config: Mapping[str, Any]) -> str:
    choice = next(iter(config), "enabled")
    if choice == "env":
        choice = _variable(config["env"])
    if choice not in ("enabled", "disabled", "deferred"):
        raise ConfigError(f"retries is {choice!r}, expected enabled, disabled or deferred.")
    return choice


def _seconds(config: Mapping[str, Any], key: str, default: float) -> float:
    value = config.get(key)
    return default if value is None else _number(key, _from_env(value))


def _from_env(value: Any) -> Any:
    """The value, or what the environment variable says that it names as ``{env: NAME}``."""
    if isinstance(value, Mapping) and set(value) == {"env"}:
        return _variable(value["env"])
    return value


def _variable(name: Any) -> str:
    value = os.getenv(str(name))
    if value is None:
        raise ConfigError(f"The environment variable {name} is not set, but the settings use it.")
    return value


def _answer_unknown_key(key: str) -> None:
    if key in CELERY_SETTINGS:
        warnings.warn(
            f"config_source.{key} is a setting of Celery that means nothing here; it is ignored.",
            stacklevel=2,
        )
        return
    raise ConfigError(f"config_source has no setting {key!r}.{_hint(key, _CONFIG_SOURCE_PARSERS)}")


def _hint(key: str, known: Mapping[str, Any]) -> str:
    nearest = difflib.get_close_matches(str(key), known, n=1, cutoff=0.5)
    return f" Did you mean {nearest[0]!r}?" if nearest else f" Known are: {', '.join(known)}."


def mapping(name: str, value: Any) -> Mapping[str, Any]:
    """The mapping that something is; empty for None.

    Raises:
        ConfigError: it is something else.
    """
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise ConfigError(f"{name} must be a mapping, not a {type(value).__name__}.")
    return value


def _number(name: str, value: Any) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise ConfigError(f"{name} is {value!r}, expected a number.")
    return number


def _positive_number(name: str, value: Any) -> float:
    number = _number(name, value)
    if number <= 0:
        raise ConfigError(f"{name} is {value!r}, it must be greater than 0.")
    return number


def _time_limit(name: str, value: Any) -> float:
    seconds = _number(name, value)
    if not 0 <= seconds <= defaults.LONGEST_TIME_LIMIT_SECONDS:
        raise ConfigError(f"{name} is {value!r}, expected seconds, 0 for no limit.")
    return seconds


def _integer(name: str, value: Any) -> int:
    try:
        if isinstance(value, bool):
            raise TypeError
        return int(str(value))
    except (TypeError, ValueError):
        raise ConfigError(f"{name} is {value!r}, expected an integer.") from None


def _positive_integer(name: str, value: Any) -> int:
    number = _integer(name, value)
    if number < 1:
        raise ConfigError(f"{name} is {value!r}, it must be at least 1.")
    return number


def _boolean(name: str, value: Any) -> bool:
    if isinstance(value, bool):
        return value
    if str(value).lower() in ("true", "1", "yes", "false", "0", "no"):
        return str(value).lower() in ("true", "1", "yes")
    raise ConfigError(f"{name} is {value!r}, expected true or false.")


def _text(name: str, value: Any) -> str:
    if isinstance(value, str) and value.strip():
        return value.strip()
    raise ConfigError(f"{name} is {value!r}, expected a text that is not empty.")


def _tls(name: str, value: Any) -> Tls | None:
    if isinstance(value, Mapping):
        value = {key: _from_env(option) for key, option in value.items()}
    return parse_tls(name, value)


_CONFIG_SOURCE_PARSERS: dict[str, Callable[[str, Any], Any]] = {
    "task_default_priority": _integer,
    "task_default_queue": _text,
    "task_always_eager": _boolean,
    "database_short_lived_sessions": _boolean,
    "result_expires": _positive_number,
    "broker_connection_timeout": _positive_number,
    "broker_heartbeat": _positive_integer,
    "broker_use_ssl": _tls,
    "redis_backend_use_ssl": _tls,
    "worker_concurrency": _positive_integer,
    "worker_max_tasks_per_child": _positive_integer,
    "worker_max_memory_per_child": _positive_integer,
    "task_soft_time_limit": _time_limit,
    "task_time_limit": _time_limit,
    "key_prefix": _text,
}
if set(_CONFIG_SOURCE_PARSERS) != {item.name for item in fields(ConfigSource)}:
    raise AssertionError("each field of ConfigSource has one parser")

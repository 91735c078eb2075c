"""``config_source``: what Celery's users know under Celery's names.

Each key is a field of ``ConfigSource``. Another setting of Celery's gets a warning that it means
nothing here, and a misspelt one an error with the nearest name.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from dagster_taskiq import defaults
from dagster_taskiq.config import parsers
from dagster_taskiq.config.celery_names import CELERY_SETTINGS
from dagster_taskiq.config.setting import nearest_hint, setting, settings_of
from dagster_taskiq.errors import ConfigError
from dagster_taskiq.messages.plain_text import yaml_problem
from dagster_taskiq.servers.tls import Tls

_NO_LIMIT = "no limit"


@dataclass(frozen=True)
class ConfigSource:
    """The settings of ``config_source``; the names are Celery's, but for the last three."""

    task_default_priority: int = setting(
        defaults.DEFAULT_STEP_PRIORITY,
        parsers.integer,
        "Priority of a step without a priority tag.",
    )
    task_default_queue: str | None = setting(
        None,
        parsers.text,
        "The same as `default_queue`, which comes first.",
        default_text=f"`{defaults.DEFAULT_QUEUE}`",
    )
    task_always_eager: bool = setting(
        False,
        parsers.boolean,
        "Run the steps in the run's own process: for tests, without any broker.",
    )
    result_expires: float = setting(
        defaults.RESULT_EXPIRES_SECONDS,
        parsers.positive_number,
        "Seconds that a result is kept that nobody has read.",
    )
    broker_connection_timeout: float = setting(
        defaults.CONNECT_TIMEOUT_SECONDS,
        parsers.positive_number,
        "Seconds until a server that does not answer is unreachable.",
    )
    broker_heartbeat: int | None = setting(
        None,
        parsers.positive_integer,
        "Seconds between the heartbeats of a RabbitMQ connection.",
        default_text="60",
    )
    broker_use_ssl: Tls | None = setting(
        None,
        parsers.tls,
        "TLS of the broker, also where its URL has none: `ca_certs`, `certfile`, `keyfile`, "
        "`cert_reqs`, `check_hostname`, each also with `ssl_` in front.",
        default_text="with a URL of TLS: verify by the system's CAs",
    )
    redis_backend_use_ssl: Tls | None = setting(
        None,
        parsers.tls,
        "TLS of the backend, as `broker_use_ssl`.",
        default_text="with a URL of TLS: verify by the system's CAs",
    )
    worker_concurrency: int | None = setting(
        None,
        parsers.positive_integer,
        "Slots of a worker, as `-c`.",
        default_text="the number of cores",
    )
    worker_max_tasks_per_child: int | None = setting(
        None,
        parsers.positive_integer,
        "Tasks after which a slot's child process is replaced, as `--max-tasks-per-child`.",
        default_text=_NO_LIMIT,
    )
    worker_max_memory_per_child: int | None = setting(
        None,
        parsers.positive_integer,
        "KiB of memory above which a slot's child process is replaced, as "
        "`--max-memory-per-child`.",
        default_text=_NO_LIMIT,
    )
    task_soft_time_limit: float | None = setting(
        None,
        parsers.time_limit,
        "Seconds after which a step gets an exception, as `--soft-time-limit`; 0 is no limit.",
        default_text=_NO_LIMIT,
    )
    task_time_limit: float | None = setting(
        None,
        parsers.time_limit,
        "Seconds after which a step is killed, as `--time-limit`; 0 is no limit.",
        default_text=_NO_LIMIT,
    )
    database_short_lived_sessions: bool = setting(
        False,
        parsers.boolean,
        "The same as `database_idle_seconds: 0`; true wins over that.",
    )
    code_max_age_seconds: float | None = setting(
        None,
        parsers.positive_number,
        "Age above which code that a worker has loaded is not executed by a new run: it is loaded "
        "anew. For definitions that come from elsewhere than files, such as an API.",
        default_text=_NO_LIMIT,
    )
    database_idle_seconds: float = setting(
        defaults.DATABASE_IDLE_SECONDS,
        parsers.seconds,
        "Seconds that a slot, a run or the launcher keeps its connection to Dagster's database "
        "when it does not use it; 0 is to connect anew for each statement, as Dagster does.",
    )
    key_prefix: str = setting(
        defaults.KEY_PREFIX,
        parsers.text,
        "Start of the name of every key and queue on the servers: give two deployments two.",
    )

    @property
    def kept_connection_seconds(self) -> float:
        """``database_idle_seconds``, under whichever name it was given."""
        return 0.0 if self.database_short_lived_sessions else self.database_idle_seconds

    @classmethod
    def read(cls, value: Any) -> ConfigSource:
        """The mapping, or the one that an environment variable holds as YAML or JSON.

        Raises:
            ConfigError: it is neither, or see ``from_mapping``.
        """
        found = parsers.from_env(value)
        if isinstance(found, str):
            try:
                found = yaml.safe_load(found)
            except yaml.YAMLError as error:
                raise ConfigError(
                    f"config_source in ${value['env']} is not YAML: {yaml_problem(error)}."
                ) from None
        return cls.from_mapping(parsers.mapping("config_source", found))

    @classmethod
    def from_mapping(cls, source: Mapping[str, Any]) -> ConfigSource:
        """Check every key and value.

        Raises:
            ConfigError: a key is misspelt or a value of the wrong type.
        """
        known = {row.name: row for row in settings_of(cls)}
        values = {}
        for key, given in source.items():
            if key in known:
                values[key] = known[key].read(given, "config_source.")
            elif key in CELERY_SETTINGS:
                warnings.warn(
                    f"config_source.{key} is a setting of Celery that means nothing here; "
                    "it is ignored.",
                    stacklevel=2,
                )
            else:
                hint = nearest_hint(key, known)
                raise ConfigError(f"config_source has no setting {key!r}.{hint}")
        return cls(**values)

"""Parsers of values: each takes a setting's name and what was given, and returns what it means.

All of them raise ``ConfigError``, which names the setting and what is allowed.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

from dagster_taskiq import defaults
from dagster_taskiq.errors import ConfigError
from dagster_taskiq.servers.tls import Tls, parse_tls


def from_env(value: Any) -> Any:
    """The value, or what the environment variable says that it names as ``{env: NAME}``.

    Raises:
        ConfigError: the variable is not set.
    """
    if not isinstance(value, Mapping) or set(value) != {"env"}:
        return value
    name = str(value["env"])
    text = os.getenv(name)
    if text is None:
        raise ConfigError(f"The environment variable {name} is not set, but the settings use it.")
    return text


def mapping(name: str, value: Any) -> Mapping[str, Any]:
    """A mapping; empty for None."""
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise ConfigError(f"{name} must be a mapping, not a {type(value).__name__}.")
    return value


def items(_name: str, value: Any) -> tuple[Any, ...]:
    """The items of a list that Dagster has checked."""
    return tuple(value)


def text(name: str, value: Any) -> str:
    """A text that is not empty, without the white space around it."""
    if isinstance(value, str) and value.strip():
        return value.strip()
    raise ConfigError(f"{name} is {value!r}, expected a text that is not empty.")


def web_address(name: str, value: Any) -> str:
    """An address for people's browsers, without a slash at its end; empty for None.

    It is shown in Dagster's UI, so it has no password.
    """
    if value is None:
        return ""
    parts = urlsplit(text(name, value))
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.password:
        raise ConfigError(
            f"{name} must be an address such as https://dashboard.example.com/taskiq, with "
            "neither user nor password."
        )
    return parts.geturl().rstrip("/")


def boolean(name: str, value: Any) -> bool:
    """True or false, in YAML's words too."""
    if isinstance(value, bool):
        return value
    if str(value).lower() in ("true", "1", "yes", "false", "0", "no"):
        return str(value).lower() in ("true", "1", "yes")
    raise ConfigError(f"{name} is {value!r}, expected true or false.")


def integer(name: str, value: Any) -> int:
    """An integer."""
    try:
        if isinstance(value, bool):
            raise TypeError
        return int(str(value))
    except (TypeError, ValueError):
        raise ConfigError(f"{name} is {value!r}, expected an integer.") from None


def positive_integer(name: str, value: Any) -> int:
    """An integer from 1."""
    number = integer(name, value)
    if number < 1:
        raise ConfigError(f"{name} is {value!r}, it must be at least 1.")
    return number


def number(name: str, value: Any) -> float:
    """A finite number."""
    try:
        found = float(value)
    except (TypeError, ValueError, OverflowError):
        found = math.nan
    if not math.isfinite(found):
        raise ConfigError(f"{name} is {value!r}, expected a number.")
    return found


def positive_number(name: str, value: Any) -> float:
    """A finite number above 0."""
    found = number(name, value)
    if found <= 0:
        raise ConfigError(f"{name} is {value!r}, it must be greater than 0.")
    return found


def seconds(name: str, value: Any) -> float:
    """Seconds, from none to a day."""
    found = number(name, value)
    if found < 0:
        raise ConfigError(f"{name} must not be negative.")
    if found > defaults.LONGEST_SECONDS:
        raise ConfigError(f"{name} must be at most {defaults.LONGEST_SECONDS:g}.")
    return found


def lease_seconds(name: str, value: Any) -> float:
    """Seconds, as long as a busy machine needs to renew a lease in time."""
    found = number(name, value)
    if found < defaults.MIN_LEASE_SECONDS:
        raise ConfigError(
            f"{name} is {found:g}, it must be at least {defaults.MIN_LEASE_SECONDS:g}: "
            "a shorter lease is lost by a busy machine."
        )
    return seconds(name, found)


def time_limit(name: str, value: Any) -> float:
    """Seconds that a step may take; 0 is no limit."""
    found = number(name, value)
    if not 0 <= found <= defaults.LONGEST_TIME_LIMIT_SECONDS:
        raise ConfigError(f"{name} is {value!r}, expected seconds, 0 for no limit.")
    return found


def retry_mode(name: str, value: Any) -> str:
    """Dagster's selector ``{enabled: {}}``, or the word alone."""
    choice = value if isinstance(value, str) else next(iter(value), "enabled")
    if choice not in ("enabled", "disabled", "deferred"):
        raise ConfigError(f"{name} is {choice!r}, expected enabled, disabled or deferred.")
    return str(choice)


def tls(name: str, value: Any) -> Tls | None:
    """How a server is verified, in kombu's words; None for no TLS."""
    if isinstance(value, Mapping):
        value = {key: from_env(option) for key, option in value.items()}
    return parse_tls(name, value)

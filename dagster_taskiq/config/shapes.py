"""Shapes of settings: what may be given for one, before anybody asks what it means.

They say what Dagster's config types say, and ``schema`` makes those of them. Here they are checked
without Dagster, whose import takes longer than all that ``worker ping`` has to do; a test compares
the two.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dagster_taskiq.config.parsers import from_env
from dagster_taskiq.errors import ConfigError


class Shape(ABC):
    """What may be given for one setting."""

    @abstractmethod
    def check(self, name: str, value: Any) -> Any:
        """The value, with what it takes from environment variables put in.

        Args:
            name: of the setting, for the error, which never shows the value: it may be a password.

        Raises:
            ConfigError: it is of another shape, or a variable is not set.
        """


@dataclass(frozen=True)
class Nullable(Shape):
    """What ``inner`` says, or nothing."""

    inner: Shape

    def check(self, name: str, value: Any) -> Any:
        """See ``Shape``."""
        return None if value is None else self.inner.check(name, value)


class Anything(Shape):
    """What only the setting's own parser can check."""

    def check(self, name: str, value: Any) -> Any:
        """See ``Shape``."""
        return value


class Options(Shape):
    """A mapping whose keys the setting's own parser checks."""

    def check(self, name: str, value: Any) -> Any:
        """See ``Shape``."""
        if not isinstance(value, Mapping):
            raise _refusal(name, value, "a mapping")
        return value


class Text(Shape):
    """A text, or the environment variable that has it."""

    def check(self, name: str, value: Any) -> Any:
        """See ``Shape``."""
        if isinstance(value, str) or _names_variable(value):
            return from_env(value)
        raise _refusal(name, value, "a text or {env: NAME}")


class Integer(Shape):
    """An integer, or the environment variable that has it."""

    def check(self, name: str, value: Any) -> Any:
        """See ``Shape``."""
        if isinstance(value, int) and not isinstance(value, bool):
            return value
        if not _names_variable(value):
            raise _refusal(name, value, "an integer or {env: NAME}")
        try:
            return int(from_env(value))
        except ValueError:
            variable = value["env"]
            raise ConfigError(f"{name}: the variable {variable} has no integer.") from None


class Number(Shape):
    """A number, or the environment variable that has it."""

    def check(self, name: str, value: Any) -> Any:
        """See ``Shape``."""
        if isinstance(value, (int, float)) or _names_variable(value):
            return from_env(value)
        raise _refusal(name, value, "a number or {env: NAME}")


@dataclass(frozen=True)
class ListOf(Shape):
    """A list of one shape."""

    item: Shape

    def check(self, name: str, value: Any) -> Any:
        """See ``Shape``."""
        if not isinstance(value, list):
            raise _refusal(name, value, "a list")
        return [self.item.check(f"{name}[{place}]", item) for place, item in enumerate(value)]


@dataclass(frozen=True)
class Choice(Shape):
    """One of some names, each as a mapping without values: ``{name: {}}``."""

    names: tuple[str, ...]

    def check(self, name: str, value: Any) -> Any:
        """See ``Shape``."""
        if _names_variable(value):
            return from_env(value)
        if isinstance(value, Mapping) and len(value) == 1:
            ((chosen, inner),) = value.items()
            if chosen in self.names and inner in (None, {}):
                return {chosen: {}}
        allowed = ", ".join(f"{{{name}: {{}}}}" for name in self.names)
        raise _refusal(name, value, f"{allowed} or {{env: NAME}}")


class TagLimit(Shape):
    """A limit of Dagster's executors to the steps with a tag."""

    def check(self, name: str, value: Any) -> Any:
        """See ``Shape``."""
        if not isinstance(value, Mapping):
            raise _refusal(name, value, "a mapping of key, limit and perhaps value")
        if not {"key", "limit"} <= set(value) <= {"key", "limit", "value"}:
            raise _refusal(name, value, "a mapping of key, limit and perhaps value")
        limit, of = value["limit"], value.get("value", "")
        if not isinstance(value["key"], str):
            raise ConfigError(f"{name}.key: expected a text.")
        if not isinstance(limit, int) or isinstance(limit, bool):
            raise ConfigError(f"{name}.limit: expected an integer.")
        is_unique = isinstance(of, Mapping) and set(of) == {"applyLimitPerUniqueValue"}
        if not isinstance(of, str) and not (
            is_unique and isinstance(of["applyLimitPerUniqueValue"], bool)
        ):
            raise ConfigError(
                f"{name}.value: expected a text or {{applyLimitPerUniqueValue: true}}."
            )
        return value


def _names_variable(value: Any) -> bool:
    return isinstance(value, Mapping) and set(value) == {"env"} and isinstance(value["env"], str)


def _refusal(name: str, value: Any, expected: str) -> ConfigError:
    given = "nothing" if value is None else f"a value of type {type(value).__name__}"
    return ConfigError(f"{name}: expected {expected}, not {given}.")

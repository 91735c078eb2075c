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

    #: In words, to end a sentence with.
    words: str

    @abstractmethod
    def check(self, name: str, value: Any) -> Any:
        """The value, with what it takes from environment variables put in.

        Args:
            name: of the setting, for the error, which never shows the value: it may be a password.

        Raises:
            ConfigError: it is of another shape, or a variable is not set.
        """

    def refusal(self, name: str, value: Any) -> ConfigError:
        """That something else was expected."""
        given = "nothing" if value is None else f"a value of type {type(value).__name__}"
        return ConfigError(f"{name}: expected {self.words}, not {given}.")


@dataclass(frozen=True)
class Nullable(Shape):
    """What ``inner`` says, or nothing."""

    inner: Shape

    @property
    def words(self) -> str:  # type: ignore[override]
        """Those of ``inner``."""
        return self.inner.words

    def check(self, name: str, value: Any) -> Any:
        """See ``Shape``."""
        return None if value is None else self.inner.check(name, value)


class Anything(Shape):
    """What only the setting's own parser can check."""

    words = "anything"

    def check(self, name: str, value: Any) -> Any:
        """See ``Shape``."""
        return value


class Options(Shape):
    """A mapping whose keys the setting's own parser checks."""

    words = "a mapping"

    def check(self, name: str, value: Any) -> Any:
        """See ``Shape``."""
        if not isinstance(value, Mapping):
            raise self.refusal(name, value)
        return value


class Text(Shape):
    """A text, or the environment variable that has it."""

    words = "a text or {env: NAME}"

    def check(self, name: str, value: Any) -> Any:
        """See ``Shape``."""
        if isinstance(value, str) or _names_variable(value):
            return from_env(value)
        raise self.refusal(name, value)


class Integer(Shape):
    """An integer, or the environment variable that has it."""

    words = "an integer or {env: NAME}"

    def check(self, name: str, value: Any) -> Any:
        """See ``Shape``."""
        if isinstance(value, int) and not isinstance(value, bool):
            return value
        if not _names_variable(value):
            raise self.refusal(name, value)
        try:
            return int(from_env(value))
        except ValueError:
            variable = value["env"]
            raise ConfigError(f"{name}: the variable {variable} has no integer.") from None


class Number(Shape):
    """A number, or the environment variable that has it."""

    words = "a number or {env: NAME}"

    def check(self, name: str, value: Any) -> Any:
        """See ``Shape``."""
        if isinstance(value, (int, float)) or _names_variable(value):
            return from_env(value)
        raise self.refusal(name, value)


@dataclass(frozen=True)
class ListOf(Shape):
    """A list of one shape."""

    item: Shape

    @property
    def words(self) -> str:  # type: ignore[override]
        """Such as "a list"."""
        return "a list"

    def check(self, name: str, value: Any) -> Any:
        """See ``Shape``."""
        if not isinstance(value, list):
            raise self.refusal(name, value)
        return [self.item.check(f"{name}[{place}]", item) for place, item in enumerate(value)]


@dataclass(frozen=True)
class Choice(Shape):
    """One of some names, each as a mapping without values: ``{name: {}}``."""

    names: tuple[str, ...]

    @property
    def words(self) -> str:  # type: ignore[override]
        """All that is allowed."""
        allowed = ", ".join(f"{{{name}: {{}}}}" for name in self.names)
        return f"{allowed} or {{env: NAME}}"

    def check(self, name: str, value: Any) -> Any:
        """See ``Shape``."""
        if _names_variable(value):
            return from_env(value)
        if not isinstance(value, Mapping) or len(value) != 1:
            raise self.refusal(name, value)
        ((chosen, inner),) = value.items()
        if chosen not in self.names or inner not in (None, {}):
            raise self.refusal(name, value)
        return {chosen: {}}


class TagLimit(Shape):
    """A limit of Dagster's executors to the steps with a tag."""

    words = "a mapping of key, limit and perhaps value"

    def check(self, name: str, value: Any) -> Any:
        """See ``Shape``."""
        if not isinstance(value, Mapping):
            raise self.refusal(name, value)
        if not {"key", "limit"} <= set(value) <= {"key", "limit", "value"}:
            raise self.refusal(name, value)
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

"""A setting: one field of a class of settings, which says everything about it.

Dagster's schema, the reading of values, the hints at misspelt names and the README's tables are
made of these fields. A new setting is a new field, and nothing else.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from typing import Any

from dagster_taskiq.config.parsers import from_env
from dagster_taskiq.config.shapes import Shape

#: Takes a setting's name and what was given; raises ``ConfigError``.
Parser = Callable[[str, Any], Any]

_METADATA = "setting"


@dataclass(frozen=True)
class Setting:
    """What is known of a setting beside the type of its field.

    Attributes:
        field: of the class of settings.
        name: as people write it.
        default: of the field.
        default_text: the default in words.
        text: what it means, in sentences.
        parse: makes the field's value of one that is given; None where the class does it, since
            the value depends on other settings.
        shape: what may be given; None where ``parse`` alone says it.
        schema_default: the default as the schema has it; None where it has none.
        variable: the environment variable that counts where the setting is not given.
        is_of_launcher: whether the launcher takes it too.
    """

    field: str
    name: str
    default: Any
    default_text: str
    text: str
    parse: Parser | None
    shape: Shape | None
    schema_default: Any
    variable: str
    is_of_launcher: bool

    def check(self, value: Any) -> Any:
        """What is given, of the right shape and with ``env:`` resolved.

        Raises:
            ConfigError: see ``Shape``.
        """
        return value if self.shape is None else self.shape.check(self.name, value)

    def read(self, value: Any, where: str = "") -> Any:
        """The field's value for what was given, which may be ``{env: NAME}``.

        Args:
            where: what stands before the name in an error.

        Raises:
            ConfigError: it cannot be used.
        """
        assert self.parse is not None
        return self.parse(f"{where}{self.name}", from_env(value))


def setting(
    default: Any,
    parse: Parser | None,
    text: str,
    *,
    default_text: str = "",
    name: str = "",
    shape: Shape | None = None,
    schema_default: Any = None,
    variable: str = "",
    is_of_launcher: bool = True,
    is_secret: bool = False,
) -> Any:
    """A field of a class of settings; see ``Setting``.

    Args:
        default: of the field, or a class that makes it.
        default_text: where the default itself does not say it.
        name: where it differs from the field's.
        is_secret: whether the value is left out of texts.
    """
    known = {
        "parse": parse,
        "text": text,
        "default_text": default_text,
        "name": name,
        "shape": shape,
        "schema_default": schema_default,
        "variable": variable,
        "is_of_launcher": is_of_launcher,
    }
    arguments: dict[str, Any] = {"metadata": {_METADATA: known}, "repr": not is_secret}
    if isinstance(default, type):
        return dataclasses.field(default_factory=default, **arguments)
    return dataclasses.field(default=default, **arguments)


def settings_of(owner: type) -> tuple[Setting, ...]:
    """The settings of a class, in the order of its fields."""
    return tuple(_setting_of(field) for field in fields(owner) if _METADATA in field.metadata)


def _setting_of(field: dataclasses.Field[Any]) -> Setting:
    known = dict(field.metadata[_METADATA])
    has_default = field.default is not dataclasses.MISSING
    default = field.default if has_default else None
    known["name"] = known["name"] or field.name
    words = known["default_text"] or _in_words(default)
    known["default_text"] = f"`${known['variable']}`, else {words}" if known["variable"] else words
    return Setting(field=field.name, default=default, **known)


def _in_words(default: Any) -> str:
    if isinstance(default, bool):
        return str(default).lower()
    if isinstance(default, str):
        return f"`{default}`"
    return "none" if default in (None, ()) else f"{default:g}"


def nearest_hint(name: str, known: Iterable[str]) -> str:
    """A sentence, with a space before it, that names what a misspelt name is most like.

    It lists the known names where it is like none of them.
    """
    known = list(known)
    nearest = difflib.get_close_matches(str(name), known, n=1, cutoff=0.5)
    return f" Did you mean {nearest[0]!r}?" if nearest else f" Known are: {', '.join(known)}."

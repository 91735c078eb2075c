"""The YAML file with the settings that ``-y`` names: a run's config, or the same of a worker."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from dagster_taskiq.config.parsers import mapping
from dagster_taskiq.config.setting import settings_of
from dagster_taskiq.config.settings import Settings, check_config
from dagster_taskiq.errors import ConfigError
from dagster_taskiq.messages.plain_text import yaml_problem

#: The keys of ``execution`` that may hold the settings; the first that is given counts. ``celery``
#: is dagster-celery's older form, which names the executor, and ``taskiq`` the same of ours.
_BLOCKS = ("config", "taskiq", "celery")


def load_yaml(path: str | Path) -> dict[str, Any]:
    """The ``execution: config:`` of a YAML file, checked as the executor's is.

    dagster-celery's files work as they are. The other parts of a run's config may stand beside it.

    Raises:
        ConfigError: the file cannot be read, is not YAML, has an option that does not exist, or
            holds something, but no settings where they belong.
    """
    return check_config(read_block(path), str(path))


def read_block(path: str | Path) -> Mapping[str, Any]:
    """The same as it stands there, with what is ``{env: NAME}`` unread.

    Raises:
        ConfigError: the file cannot be read, is not YAML, or has settings where none belong.
    """
    where = str(path)
    document = mapping(where, _read(path))
    _refuse_settings(where, document, place="at the top level")
    if document and "execution" not in document:
        hint = _hint(document, ("execution",))
        raise ConfigError(f"{where} has no 'execution: config:' with settings.{hint}")
    execution = mapping(f"{where}: execution", document.get("execution"))
    _refuse_settings(where, execution, place="directly below 'execution'")
    for key in execution:
        if key not in _BLOCKS:
            raise ConfigError(f"{where}: execution has no {key!r}.{_hint([key], _BLOCKS)}")
    name = next((name for name in _BLOCKS if execution.get(name)), "config")
    block = mapping(f"{where}: execution.{name}", execution.get(name))
    if name != "config" and set(block) == {"config"}:
        block = mapping(f"{where}: execution.{name}.config", block["config"])
    return block


def _read(path: str | Path) -> Any:
    try:
        return yaml.safe_load(Path(path).read_text(encoding="utf8"))
    except OSError as error:
        raise ConfigError(f"Cannot read the settings file {path}: {error.strerror}.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"The settings file {path} is not YAML: {yaml_problem(error)}.") from None


def _refuse_settings(where: str, found: Mapping[Any, Any], place: str) -> None:
    """Refuse keys that mean something in ``execution: config:`` and nothing where they stand."""
    known = {row.name for row in settings_of(Settings)}
    for key in found:
        if key in known:
            raise ConfigError(
                f"{where}: {key!r} stands {place}; it belongs below 'execution: config:'."
            )


def _hint(found: Iterable[Any], known: Sequence[str]) -> str:
    """Which key was meant for a known one; else the known ones."""
    for key in found:
        nearest = difflib.get_close_matches(str(key), known, n=1, cutoff=0.5)
        if nearest:
            return f" Did you mean {nearest[0]!r} by {key!r}?"
    return f" Known are: {', '.join(known)}."

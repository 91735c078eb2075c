"""The DAGSTER_HOME of ``dev``, whose dagster.yaml names our run launcher.

The user's own file is never written. Where it names another launcher, a temporary home serves: its
dagster.yaml is a copy with our launcher, and everything else in it is a link into the user's home.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from dagster_taskiq.aio.private_files import own_directory
from dagster_taskiq.config.parsers import mapping
from dagster_taskiq.errors import ConfigError
from dagster_taskiq.messages.plain_text import yaml_problem

_FILE = "dagster.yaml"

#: Dagster's own name for such a directory, so that what ignores the one ignores the other.
_PREFIX = ".tmp_dagster_home_"

#: Our launcher's class, and the modules that it may be imported from.
_CLASS, _MODULES = "TaskiqRunLauncher", ("dagster_taskiq.launcher", "dagster_taskiq")

#: What Dagster and we make in a home. They are made before they are linked, so that they are the
#: user's own afterwards.
_DIRECTORIES = ("history", "schedules", "storage", "dagster_taskiq")


@dataclass(frozen=True)
class DevHome:
    """The DAGSTER_HOME that serves.

    Attributes:
        path: of it.
        is_private: whether its embedded server is used by this command alone.
        notice: which it is and why, a sentence.
        launcher_config: of the user's own launcher, where that serves.
    """

    path: Path
    is_private: bool
    notice: str
    launcher_config: Mapping[str, Any] = field(default_factory=dict)


@contextmanager
def dev_home(launcher_config: Mapping[str, Any]) -> Iterator[DevHome]:
    """A home with our launcher; a temporary one is removed at the end.

    Args:
        launcher_config: of a launcher that the user's dagster.yaml does not name.

    Raises:
        ConfigError: DAGSTER_HOME is no directory, or its dagster.yaml cannot be read.
    """
    launcher = {"module": _MODULES[0], "class": _CLASS, "config": dict(launcher_config)}
    given = os.getenv("DAGSTER_HOME")
    if not given:
        with _temporary(_PREFIX, Path.cwd()) as path:
            # as for ``dagster dev``, a dagster.yaml beside the code counts
            _write(path, {**_read(Path.cwd()), "run_launcher": launcher})
            yield DevHome(
                path, True, f"DAGSTER_HOME is not set: {path} serves, and is removed at the end."
            )
        return
    home = Path(given).expanduser().resolve()
    if not home.is_dir():
        raise ConfigError(f"DAGSTER_HOME is {home}, and there is no such directory: make it.")
    config = _read(home)
    present = mapping(f"{home / _FILE}: run_launcher", config.get("run_launcher"))
    if present.get("class") == _CLASS and present.get("module") in _MODULES:
        notice = f"DAGSTER_HOME is {home}, whose own run launcher serves."
        own = mapping(f"{home / _FILE}: run_launcher.config", present.get("config"))
        yield DevHome(home, False, notice, own)
        return
    with _temporary("taskiq-dev-", None) as path:
        _link(home, path)
        _write(path, {**config, "run_launcher": launcher})
        named = f"names {present['class']}" if present.get("class") else "names no run launcher"
        yield DevHome(
            path,
            False,
            f"{home / _FILE} {named}: {path} serves, which is the same with {_CLASS}, and is "
            "removed at the end.",
        )


@contextmanager
def _temporary(prefix: str, directory: Path | None) -> Iterator[Path]:
    try:
        made = tempfile.TemporaryDirectory(prefix=prefix, dir=directory)
    except OSError as error:
        raise ConfigError(
            f"There can be no temporary DAGSTER_HOME here ({error.strerror}): set DAGSTER_HOME."
        ) from error
    with made as name:
        yield Path(name).resolve()


def _read(home: Path) -> dict[str, Any]:
    """What a dagster.yaml says; nothing where there is none."""
    path = home / _FILE
    try:
        found = yaml.safe_load(path.read_text(encoding="utf8"))
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise ConfigError(f"Cannot read {path}: {error.strerror}.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not YAML: {yaml_problem(error)}.") from None
    return dict(mapping(str(path), found))


def _write(home: Path, config: Mapping[str, Any]) -> None:
    (home / _FILE).write_text(yaml.safe_dump(dict(config)), encoding="utf8")


def _link(home: Path, path: Path) -> None:
    """Make everything in a home, and what will be, reachable in another one."""
    for name in _DIRECTORIES:
        own_directory(home / name)
    for entry in home.iterdir():
        if entry.name != _FILE:
            (path / entry.name).symlink_to(entry)

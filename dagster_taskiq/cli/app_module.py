"""The module of ``worker start -A``, in which a team sets up its workers' processes."""

from __future__ import annotations

import importlib
import sys
import traceback
from pathlib import Path

from dagster_taskiq.errors import ConfigError

#: What ``-A`` names on the command lines of both packages, and which is nothing to import.
_OWN_APPS = ("dagster_taskiq.app", "dagster_celery.app")


def app_module(app: str | None) -> str:
    """The module that ``-A`` names, as Celery writes it (``module:name``); empty for none."""
    module = (app or "").partition(":")[0]
    return "" if module in _OWN_APPS else module


def import_app(module: str) -> None:
    """Import the module in this process, as each child will: its set-up is for both.

    It may lie in the present directory. A process that was forked before has nothing of it.

    Raises:
        ConfigError: it is not there, or raises; the traceback is printed then.
    """
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        importlib.import_module(module)
    except Exception as error:
        if not (isinstance(error, ModuleNotFoundError) and error.name == module):
            traceback.print_exc()
        raise ConfigError(
            f"The module {module!r} of -A cannot be imported: {type(error).__name__}: {error}. "
            "Start the worker in its directory, or install it as a package."
        ) from error
    finally:
        # what it imports later is found, and hides nothing that the worker itself imports
        sys.path.remove(here)
        sys.path.append(here)

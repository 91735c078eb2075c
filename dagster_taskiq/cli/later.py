"""Commands whose modules are imported when they are called.

To import Dagster takes most of a second, for which a health check, ``--help`` and a shell that
completes a word must not wait.
"""

from __future__ import annotations

import gc
from pkgutil import resolve_name
from typing import Any

import click


class Later(click.Command):
    """Stands for a command, or a group of them, of another module.

    Args:
        name: of the command.
        where: ``module:attribute`` in this package.
        short_help: the first sentence of its help, which listings show.
    """

    def __init__(self, name: str, where: str, short_help: str) -> None:
        super().__init__(name, short_help=short_help)
        self._where = where

    def load(self) -> click.Command:
        """The command itself."""
        command: click.Command = resolve_name(f"{__package__}.{self._where}")
        if not gc.isenabled():
            # the modules are there: from now on there is something to collect; see ``__main__``
            gc.freeze()
            gc.enable()
        return command

    def make_context(self, *args: Any, **kwargs: Any) -> click.Context:
        """The context of the command itself, in which click goes on."""
        return self.load().make_context(*args, **kwargs)

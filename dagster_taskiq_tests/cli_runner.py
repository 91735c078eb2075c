"""Click's runner of commands for tests, the same in every release of Click."""

from __future__ import annotations

import inspect

from click.testing import CliRunner


def cli_runner() -> CliRunner:
    """One that keeps standard error apart, which Click 8.1 does only when it is told to."""
    is_old = "mix_stderr" in inspect.signature(CliRunner).parameters
    return CliRunner(**{"mix_stderr": False} if is_old else {})

"""What an embedded server is known by: the same for whatever uses its home, and for nobody else."""

from __future__ import annotations

import os
import uuid
from contextlib import suppress
from pathlib import Path

from dagster_taskiq.errors import EmbeddedServerError
from dagster_taskiq.servers.embedded.server import embedded_directory

#: The file in the server's directory.
_NAME = "identity"


def embedded_identity(home: Path) -> str:
    """The identity of the home's server, which keeps it in a file; the first question makes it.

    Homes of one path on two hosts have two, and a home that moves keeps its own.

    Args:
        home: whose server this process uses.

    Raises:
        EmbeddedServerError: it can neither be read nor be made.
    """
    path = embedded_directory(home) / _NAME
    try:
        if not path.exists():
            _make(path)
        return path.read_text("utf8").strip()
    except (OSError, ValueError) as error:
        raise EmbeddedServerError(f"Cannot use {path}: {error}.") from error


def _make(path: Path) -> None:
    draft = path.with_name(f"{_NAME}.{uuid.uuid4().hex}")
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "w") as file:
            file.write(f"embedded {uuid.uuid4().hex}\n")
        # a link, unlike a renaming, leaves what another process has just made
        with suppress(FileExistsError):
            path.hardlink_to(draft)
    finally:
        draft.unlink()

"""Directories and log files of this user, in places where other users may write.

A user who may write to DAGSTER_HOME, or to the directory for temporary files, can put a link or a
directory there under a name that this package uses. Without a look at the owner, files of this
user would be made, moved and changed wherever that link leads to.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import BinaryIO

from dagster_taskiq.errors import ForeignPathError

_ROOT = 0


def without_foreign_links(path: Path) -> Path:
    """The path that a path leads to; it need not exist.

    The links above its last part are the user's own affair, such as a DAGSTER_HOME that is a link.

    Raises:
        ForeignPathError: its last part is a link of somebody else, who is not root.
        OSError: it cannot be looked at.
    """
    if path.is_symlink():
        owner = _owner(path)
        if owner not in (_ROOT, os.geteuid()):
            raise _foreign(path, owner, "is a link that belongs")
    return path.resolve()


def own_directory(path: Path) -> Path:
    """A directory of this user; it is made, for this user alone, if it is missing.

    Returns:
        its path, without links.

    Raises:
        ForeignPathError: the directory, or a link in its place, belongs to somebody else.
        OSError: it cannot be made.
    """
    directory = without_foreign_links(path)
    directory.mkdir(mode=0o700, exist_ok=True)
    owner = _owner(directory)
    if owner != os.geteuid():
        raise _foreign(directory, owner, "belongs")
    return directory


def open_log(path: Path) -> BinaryIO:
    """A file to append to, which only this user may read where it is made; no link is followed.

    Raises:
        OSError: it cannot be opened, for example since it is a link.
    """
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW
    return os.fdopen(os.open(path, flags, 0o600), "ab")


def _owner(path: Path) -> int:
    return path.lstat().st_uid


def _foreign(path: Path, owner: int, what: str) -> ForeignPathError:
    return ForeignPathError(
        f"{path} must be a directory of user {os.geteuid()}, who runs this process, but {what} to "
        f"user {owner}."
    )

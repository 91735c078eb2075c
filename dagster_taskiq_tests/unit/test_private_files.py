"""Directories that must be this user's own, where others may have been before."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from dagster_taskiq.aio.private_files import open_log, own_directory
from dagster_taskiq.errors import ForeignPathError


def test_it_is_made_for_this_user_alone(tmp_path: Path) -> None:
    directory = own_directory(tmp_path / "new")
    assert directory.stat().st_mode & 0o777 == 0o700
    assert own_directory(directory) == directory


def test_an_own_link_is_followed(tmp_path: Path) -> None:
    """Also where what it leads to has to be made."""
    (tmp_path / "link").symlink_to(tmp_path / "target")
    assert own_directory(tmp_path / "link") == tmp_path / "target"
    assert (tmp_path / "target").is_dir()


@pytest.mark.parametrize("kind", ["directory", "link", "link to nothing"])
def test_what_belongs_to_somebody_else_is_refused(
    tmp_path: Path, kind: str, give_away: Callable[[Path], None]
) -> None:
    """With a sentence, and nothing is made."""
    path, target = tmp_path / "path", tmp_path / "target"
    if kind == "link":
        target.mkdir()
    if kind == "directory":
        path.mkdir()
    else:
        path.symlink_to(target)
    give_away(path)
    with pytest.raises(ForeignPathError, match="belongs to user 4711") as caught:
        own_directory(path)
    assert str(path) in str(caught.value)
    assert target.exists() is (kind == "link")


def test_an_own_link_to_somebody_elses_directory_is_refused(
    tmp_path: Path, give_away: Callable[[Path], None]
) -> None:
    target = tmp_path / "target"
    target.mkdir()
    (tmp_path / "path").symlink_to(target)
    give_away(target)
    with pytest.raises(ForeignPathError, match="target must be a directory of user"):
        own_directory(tmp_path / "path")


def test_a_log_is_appended_to_and_not_through_a_link(tmp_path: Path) -> None:
    for _ in range(2):
        with open_log(tmp_path / "log") as log:
            log.write(b"x")
    assert (tmp_path / "log").read_bytes() == b"xx"
    assert (tmp_path / "log").stat().st_mode & 0o777 == 0o600
    (tmp_path / "link").symlink_to(tmp_path / "target")
    with pytest.raises(OSError, match="link"):
        open_log(tmp_path / "link")
    assert not (tmp_path / "target").exists()

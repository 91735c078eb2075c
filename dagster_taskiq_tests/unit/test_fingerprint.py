"""The name of the storage of Dagster's instance: the same where it is the same, without secrets."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from dagster_taskiq._dagster.fingerprint import own_fingerprint, storage_fingerprint
from dagster_taskiq._dagster.instance_storage import has_database_server, postgresql_of
from dagster_taskiq.errors import ConfigError


def home(directory: Path, text: str) -> Path:
    directory.mkdir(exist_ok=True)
    (directory / "dagster.yaml").write_text(text)
    return directory


def url(text: str) -> str:
    return f"storage: {{postgres: {{postgres_url: '{text}'}}}}"


DATABASE = """\
storage:
  postgres:
    postgres_db: {username: %s, password: %s, hostname: db, db_name: dagster, port: 5432}
"""


def test_a_database_has_one_name_however_it_is_spelt(tmp_path: Path) -> None:
    """User and password are no part of it: hosts may have their own."""
    same = [
        url("postgresql://one:secret@db/dagster"),
        url("postgresql://db:5432/dagster"),
        url("postgresql://DB/dagster?sslmode=require"),
        url("postgresql:///dagster?host=db"),
        DATABASE % ("a", "b"),
        DATABASE % ("c", "d"),
    ]
    names = {storage_fingerprint(home(tmp_path / str(n), it)) for n, it in enumerate(same)}
    (name,) = names
    assert name.startswith("postgresql:")
    assert len(name) < 30
    assert "secret" not in name
    others = [
        url("postgresql://db2/dagster"),
        url("postgresql://db/other"),
        url("postgresql://db:5433/dagster"),
        url("postgresql://db/dagster?options=-csearch_path%3Dx"),
    ]
    found = {storage_fingerprint(home(tmp_path / f"o{n}", it)) for n, it in enumerate(others)}
    assert len(found - names) == 4


def test_files_are_named_by_their_path(tmp_path: Path) -> None:
    """Also through a link, and whether it is the usual place or not."""
    one, other = home(tmp_path / "one", ""), home(tmp_path / "other", "")
    (tmp_path / "link").symlink_to(one)
    name = storage_fingerprint(one)
    assert name.startswith("sqlite:")
    assert storage_fingerprint(tmp_path / "link") == name
    assert storage_fingerprint(other) != name
    elsewhere = home(tmp_path / "set", f"storage: {{sqlite: {{base_dir: {tmp_path}}}}}")
    assert storage_fingerprint(elsewhere) not in (name, storage_fingerprint(other))


def test_a_value_of_the_environment_counts_as_its_value(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hosts may set it in their own ways."""
    plain = storage_fingerprint(home(tmp_path / "a", url("postgresql://db/dagster")))
    monkeypatch.setenv("URL_OF_TEST", "postgresql://me:pw@db/dagster")
    text = "storage: {postgres: {postgres_url: {env: URL_OF_TEST}}}"
    assert storage_fingerprint(home(tmp_path / "b", text)) == plain


def test_what_dagster_cannot_use_is_an_error_without_passwords(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        storage_fingerprint(home(tmp_path / "a", "storage: {postgres: {password: hush}}"))
    assert "hush" not in str(error.value)


def test_the_instance_is_that_of_dagster_home(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("DAGSTER_HOME", raising=False)
    assert own_fingerprint() == ""
    monkeypatch.setenv("DAGSTER_HOME", str(home(tmp_path / "home", "")))
    assert own_fingerprint() == storage_fingerprint(tmp_path / "home")


def test_dagster_warns_once_that_there_is_no_dagster_yaml(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A command reads the instance's settings more than once. Of another home it warns again."""
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        monkeypatch.setenv("DAGSTER_HOME", str(tmp_path / name))
        logging.getLogger("dagster").addHandler(caplog.handler)
        try:
            assert postgresql_of(tmp_path / name) is None
            assert not has_database_server(tmp_path / name)
            storage_fingerprint(tmp_path / name)
        finally:
            logging.getLogger("dagster").removeHandler(caplog.handler)
    told = {it.getMessage() for it in caplog.records if "No dagster instance" in it.getMessage()}
    assert len(told) == 2
    assert logging.getLogger("dagster").filters == []

"""Versions of the package that share a schema on PostgreSQL, and what goes when nobody uses it."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Collection, Iterator
from dataclasses import replace
from typing import Any, cast

import pytest

from dagster_taskiq.backend import open_backend
from dagster_taskiq.backend.postgresql import PostgresqlBackend
from dagster_taskiq.backend.postgresql_schema import PART
from dagster_taskiq.messages.signing import Signer
from dagster_taskiq.servers import postgresql_pool
from dagster_taskiq.servers.kinds import ServerOptions
from dagster_taskiq.servers.postgresql_schema import Part, Schema
from dagster_taskiq_tests.contract.broker_bench import PostgresHarness
from dagster_taskiq_tests.servers import postgres_options

#: Versions of the package: what they change is the text of the functions.
OLD, OTHER, NEW = (replace(PART, functions=f"{PART.functions}-- {name}\n") for name in "abc")

#: A version from before there was a list of functions that are used.
FIRST = replace(
    OLD,
    migrations=PART.migrations[:1],
    functions=re.sub(
        r" +IF NOT EXISTS \(SELECT FROM {s}.function_sets.*?END IF;\n",
        "",
        OLD.functions,
        flags=re.DOTALL,
    ),
)


class Versions:
    """Backends of several versions of the package, in one schema."""

    def __init__(self, options: ServerOptions, loop: asyncio.AbstractEventLoop) -> None:
        self.options = options
        self.loop = loop
        self.opened: list[PostgresqlBackend] = []

    def call(self, coroutine: Any) -> Any:
        return self.loop.run_until_complete(asyncio.wait_for(coroutine, 30))

    def start(self, part: Part) -> PostgresqlBackend:
        """A process of a version."""
        backend = cast("PostgresqlBackend", open_backend(self.options, Signer()))
        backend._schema = Schema(self.options.key_prefix, part)
        self.opened.append(backend)
        self.call(backend.startup())
        return backend

    def works(self, backend: PostgresqlBackend) -> bool:
        """Whether its functions answer."""
        return bool(self.call(backend.inspect("run", []))[0])

    def close(self) -> None:
        for backend in self.opened:
            self.call(backend.shutdown())

    def execute(self, statement: str, values: Any = None) -> list[Any]:
        return PostgresHarness(self.options).execute(statement, values)

    def age(self, part: Part, days: float) -> None:
        """Let it be so long since a version was used."""
        self.execute(
            "UPDATE {s}.function_sets SET used_at = used_at - %s * interval '1 day' "
            "WHERE suffix = %s",
            [days, part.suffix],
        )

    def used(self, part: Part) -> Any:
        """When a version was used."""
        rows = self.execute(
            "SELECT used_at FROM {s}.function_sets WHERE suffix = %s", [part.suffix]
        )
        return rows[0][0] if rows else None

    def have_functions(self) -> Collection[Part]:
        """The versions whose functions are there."""
        rows = self.execute(
            "SELECT proname FROM pg_proc WHERE pronamespace = '{s}'::regnamespace "
            "AND proname LIKE 'claim%%'",
            [],
        )
        names = {name for (name,) in rows}
        return [part for part in (OLD, OTHER, NEW) if f"claim{part.suffix}" in names]


@pytest.fixture
def versions() -> Iterator[Versions]:
    loop = asyncio.new_event_loop()
    with postgres_options() as options:
        versions = Versions(options, loop)
        try:
            yield versions
        finally:
            versions.close()
            loop.close()


# --- tables ---


def test_a_newer_version_adds_its_tables_and_the_older_one_goes_on(versions: Versions) -> None:
    """Whichever comes back; an older one takes nothing back."""
    setup = Schema(versions.options.key_prefix, FIRST).setup()
    versions.execute(setup.split("DO $remove$", 1)[0])
    old = versions.start(FIRST)
    assert versions.execute("SELECT number, oldest FROM {s}.version") == [(1, 1)]
    new = versions.start(NEW)
    assert versions.execute("SELECT number, oldest FROM {s}.version") == [(len(PART.migrations), 1)]
    assert versions.works(old)
    assert versions.works(versions.start(FIRST))
    assert versions.works(new)
    versions.execute(setup)
    assert versions.execute("SELECT number, oldest FROM {s}.version") == [(len(PART.migrations), 1)]


def test_what_is_made_again_changes_nothing(versions: Versions) -> None:
    versions.start(NEW)
    before = versions.execute(
        "SELECT oid, relname FROM pg_class WHERE relnamespace = '{s}'::regnamespace ORDER BY 1"
    )
    versions.execute(Schema(versions.options.key_prefix, NEW).setup())
    after = versions.execute(
        "SELECT oid, relname FROM pg_class WHERE relnamespace = '{s}'::regnamespace ORDER BY 1"
    )
    assert before == after
    assert versions.works(versions.start(NEW))


# --- functions that nobody uses any more ---


def test_functions_that_were_unused_for_a_month_go_with_an_update(versions: Versions) -> None:
    """Those of the version that was just replaced stay."""
    for part in (OLD, OTHER):
        versions.start(part)
    versions.age(OLD, 31)
    versions.age(OTHER, 29)
    versions.start(OTHER)
    assert versions.have_functions() == [OLD, OTHER], "nothing was made"
    versions.start(NEW)
    assert versions.have_functions() == [OTHER, NEW]
    assert versions.used(OLD) is None


def test_a_use_is_noted_once_a_day(versions: Versions) -> None:
    """By a new connection; nothing is written for the others."""
    versions.start(NEW)
    first = versions.used(NEW)
    versions.start(NEW)
    assert versions.used(NEW) == first
    versions.age(NEW, 2)
    versions.start(NEW)
    assert versions.used(NEW) >= first


def test_a_process_that_never_stops_notes_it_too(
    versions: Versions, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its connections are replaced each hour, however busy they are."""
    backend = versions.start(NEW)
    first = versions.used(NEW)
    versions.age(NEW, 2)
    assert versions.works(backend)
    assert versions.used(NEW) < first
    monkeypatch.setattr(postgresql_pool, "_OLDEST_SECONDS", -1.0)
    assert versions.works(backend)  # the last call on that connection
    assert versions.works(backend)
    assert versions.used(NEW) >= first


def test_a_version_that_comes_back_makes_its_functions_again(versions: Versions) -> None:
    """Also one that was there all the time, without a word."""
    old = versions.start(OLD)
    versions.age(OLD, 31)
    versions.start(NEW)
    assert versions.have_functions() == [NEW]
    assert versions.works(old)
    assert versions.have_functions() == [OLD, NEW]
    versions.age(NEW, 31)
    versions.start(OTHER)
    versions.start(NEW)
    assert versions.have_functions() == [OLD, OTHER, NEW]


def test_functions_that_go_while_a_process_connects_are_made_again(versions: Versions) -> None:
    """It has seen them a moment before."""
    versions.start(NEW)
    enter = f"{NEW.enter}{NEW.suffix}"
    versions.execute(f"ALTER FUNCTION {{s}}.{enter}() RENAME TO gone")
    # what is there by this name cannot be called
    versions.execute(f"CREATE FUNCTION {{s}}.{enter}(int) RETURNS int LANGUAGE sql AS 'SELECT 1'")
    assert versions.works(versions.start(NEW))


def test_functions_that_nobody_has_noted_count_as_used_now(versions: Versions) -> None:
    """Somebody has emptied the table, as all tables may be."""
    old = versions.start(OLD)
    versions.execute("TRUNCATE {s}.function_sets")
    versions.start(NEW)
    assert versions.have_functions() == [OLD, NEW]
    assert versions.used(OLD) is not None
    assert versions.works(old)


def test_a_function_of_somebody_else_stays(versions: Versions) -> None:
    """Whatever its name is like; nor does it keep anybody from starting."""
    versions.start(OLD)
    versions.execute("CREATE FUNCTION {s}.report() RETURNS int LANGUAGE sql AS 'SELECT 1'")
    versions.age(OLD, 31)
    versions.start(NEW)
    assert versions.execute("SELECT {s}.report()") == [(1,)]

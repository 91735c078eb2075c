"""The PostgreSQL backend's schema: its tables, and who makes them.

A deployment has a schema of its own. Whoever starts first makes it, under an advisory lock; who
finds it needs no right to create. Tables change only by additions, and functions have a digest of
their text in their names, so that several versions of the package share a schema.

``runs`` and ``tasks`` are logged. ``results`` are not: they live for seconds, and where a crash
has taken one, Dagster's log says how the step ended. ``life`` is the epoch: a row in an unlogged
table, which a crash, a promotion and a base backup empty, as does a TRUNCATE of runs or tasks. So
it goes with each event after which a commit may be missing.

A task is held while its ``state`` is ``claimed`` and ``lease_until`` lies ahead. In the states
``done`` and ``refused`` its ``token`` is that of the claim that has ended it. ``dropped_epoch`` is
empty where the message that was dropped was of an older epoch.
"""

from __future__ import annotations

import hashlib
import re
import zlib
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

import psycopg
from psycopg import errors

from dagster_taskiq.defaults import (
    CLOSED_RECORD_EXPIRES_SECONDS,
    KEY_PREFIX,
    RUN_RECORD_EXPIRES_SECONDS,
)
from dagster_taskiq.errors import RefusedByServerError

#: The oldest server that has ``gen_random_uuid``, as it numbers itself.
_OLDEST_SERVER = 130000

#: How long a change of the schema waits for a reader. Whoever claims waits behind it meanwhile.
_LOCK_TIMEOUT = "800ms"

#: The longest name that PostgreSQL does not cut, in bytes.
_LONGEST_NAME = 63

#: Nothing that a renewal writes is indexed, so that each changes a row in its page.
_MANY_UPDATES = (
    "fillfactor = 50, autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 2000, "
    "autovacuum_vacuum_cost_delay = 0, vacuum_truncate = off"
)


def _read(name: str, fragments: Mapping[str, str]) -> str:
    text = resources.files(__package__).joinpath(f"postgresql_{name}.sql").read_text("utf8")
    text = re.sub("^--.*\n+", "", text, flags=re.MULTILINE)
    for fragment, meaning in fragments.items():
        text = text.replace(f"{{{fragment}}}", meaning)
    return text


#: The changes of the tables, one after the other; the first makes them. A version of the package
#: that lacks the newest ones can live with them, unless ``OLDEST`` is raised.
MIGRATIONS: Sequence[str] = (_read("tables", {"many_updates": _MANY_UPDATES}),)

#: How many of them a version of the package must know to share the schema with this one.
OLDEST = 1

_FUNCTIONS = _read(
    "functions",
    {
        "begin": """\
  PERFORM set_config('synchronous_commit', 'off', true), set_config('lock_timeout', '3s', true),
    set_config('enable_seqscan', 'off', true), set_config('jit', 'off', true);""",
        "epoch": """\
  SELECT id INTO v_epoch FROM {s}.life WHERE one;
  IF NOT FOUND THEN v_epoch := {s}.new_epoch{v}(); END IF;""",
        # of one task, before a decision; v_done also where the record has lost that it has a result
        "look": """\
    SELECT * INTO t FROM {s}.tasks WHERE run_id = p_run AND task_id = p_task FOR UPDATE;
    v_found := FOUND;
    v_held := v_found AND t.state = 'claimed' AND t.lease_until > clock_timestamp();
    v_result := EXISTS (SELECT FROM {s}.results WHERE run_id = p_run AND task_id = p_task
      AND expires_at > clock_timestamp());
    v_done := t.state IS NOT DISTINCT FROM 'done' OR (v_result AND NOT v_held
      AND (NOT v_found OR t.state IN ('claimed', 'dropped')));""",
        "variables": """\
DECLARE
  t {s}.tasks%ROWTYPE;
  v_epoch text;
  v_found boolean;
  v_held boolean;
  v_result boolean;
  v_done boolean;""",
        "closed": str(CLOSED_RECORD_EXPIRES_SECONDS),
        "open": str(RUN_RECORD_EXPIRES_SECONDS),
    },
)

#: Ends the names of the functions.
_SUFFIX = "_" + hashlib.sha1(_FUNCTIONS.encode(), usedforsecurity=False).hexdigest()[:12]


def schema_name(key_prefix: str) -> str:
    """Of the schema of a deployment; no two prefixes share one."""
    own = KEY_PREFIX.replace("-", "_")
    name = own if key_prefix == KEY_PREFIX else f"{own}_{key_prefix}"
    if len(name.encode()) > _LONGEST_NAME:
        name = f"{own}_{hashlib.sha1(key_prefix.encode(), usedforsecurity=False).hexdigest()}"
    return name


class Schema:
    """The schema of a deployment.

    Args:
        key_prefix: of the deployment.
    """

    def __init__(self, key_prefix: str) -> None:
        self.name = schema_name(key_prefix)
        self._quoted = '"' + self.name.replace('"', '""') + '"'

    def statement(self, function: str, arguments: int) -> str:
        """The SQL that calls one of our functions, for psycopg."""
        places = ", ".join(["%s"] * arguments)
        name = f'{self._quoted}."{function}{_SUFFIX}"'.replace("%", "%%")
        return f"SELECT * FROM {name}({places})"  # noqa: S608

    def migrations(self, since: int) -> str:
        """The SQL that changes the tables, of a schema with so many changes."""
        texts = [text.replace("{s}", self._quoted) for text in MIGRATIONS[since:]]
        values = f"number = {len(MIGRATIONS)}, oldest = {OLDEST}"
        texts.append(f"UPDATE {self._quoted}.version SET {values};")  # noqa: S608
        return "".join(texts)

    def functions(self) -> str:
        """The SQL that makes the functions."""
        text = _FUNCTIONS.replace("{s}", self._quoted)
        return text.replace("{v}", _SUFFIX).replace("{lock}", self._lock)

    @property
    def _lock(self) -> str:
        """Of the schema, in the form of two keys, which no single key of another program meets."""
        numbers = (zlib.crc32(text.encode()) - 2**31 for text in (KEY_PREFIX, self.name))
        return ", ".join(map(str, numbers))

    # --- a new connection ---

    async def greet(self, connection: psycopg.AsyncConnection[Any], address: str) -> None:
        """Find the schema on a new connection, or make it.

        A connection that is behind a pooler gets statements that need none before them. The life
        of the server ends here where the database is a copy of another one.

        Raises:
            RefusedByServerError: the server or the schema is of a version that cannot be used, or
                the schema is not there and the user may not make it; the message has the SQL.
        """
        try:
            oldest = await self._enter(connection, address)
        except errors.InsufficientPrivilege as error:
            raise await self._lacks_rights(connection, address, error) from error
        if oldest > len(MIGRATIONS):
            raise RefusedByServerError(
                address,
                f"Cannot use {address}: its schema {self.name} is of a newer version of "
                "dagster-taskiq, which this one cannot share it with. Update this one.",
                is_final=True,
            )

    async def _enter(self, connection: psycopg.AsyncConnection[Any], address: str) -> int:
        """The oldest version of the tables that those who use them must know."""
        found = await connection.execute(
            "SELECT pg_backend_pid(), current_setting('default_transaction_isolation'), "
            "current_setting('server_version_num')::int, to_regproc(%s) IS NOT NULL",
            [f'{self._quoted}."enter{_SUFFIX}"'],
        )
        pid, isolation, version, is_there = await found.fetchone() or (0, "", 0, False)
        if version < _OLDEST_SERVER:
            text = f"Cannot use {address}: PostgreSQL {version // 10000} is older than 13."
            raise RefusedByServerError(address, text, is_final=True)
        if pid == connection.info.backend_pid:
            connection.prepare_threshold = 1
            if isolation != "read committed":
                await connection.execute("SET default_transaction_isolation TO 'read committed'")
        if not is_there:
            await self._make(connection)
        found = await connection.execute(self.statement("enter", 0), ())
        return int((await found.fetchone() or (0,))[0])

    async def _make(self, connection: psycopg.AsyncConnection[Any]) -> None:
        async with connection.transaction():
            await connection.execute(f"SET LOCAL lock_timeout TO '{_LOCK_TIMEOUT}'")
            # two that make the same at the same time fail, whatever IF NOT EXISTS says
            await connection.execute(f"SELECT pg_advisory_xact_lock({self._lock})")
            found = await connection.execute("SELECT to_regnamespace(%s)", [self._quoted])
            if await found.fetchone() == (None,):
                # not IF NOT EXISTS, which needs the right to create in any case
                await connection.execute(f"CREATE SCHEMA {self._quoted}")
            since = await self._version(connection)
            text = self.migrations(since) if since < len(MIGRATIONS) else ""
            await connection.execute(text + self.functions())

    async def _version(self, connection: psycopg.AsyncConnection[Any]) -> int:
        table = f"{self._quoted}.version"
        found = await connection.execute("SELECT to_regclass(%s) IS NOT NULL", [table])
        if not (await found.fetchone() or (False,))[0]:
            return 0
        found = await connection.execute(f"SELECT number FROM {table}")  # noqa: S608
        return int((await found.fetchone() or (0,))[0])

    async def _lacks_rights(
        self, connection: psycopg.AsyncConnection[Any], address: str, error: psycopg.Error
    ) -> RefusedByServerError:
        found = await connection.execute(
            "SELECT quote_ident(current_user), quote_ident(current_database()), "
            "EXISTS (SELECT FROM pg_namespace WHERE nspname = %s)",
            [self.name],
        )
        user, database, is_there = await found.fetchone() or ("?", "?", False)
        grant = (
            f"GRANT USAGE, CREATE ON SCHEMA {self._quoted} TO {user}; "
            f"GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA {self._quoted} TO {user}"
            if is_there
            else f"GRANT CREATE ON DATABASE {database} TO {user}"
        )
        words = str(error.diag.message_primary or error)
        return RefusedByServerError(
            address,
            f"Cannot use {address}: the schema {self.name} is not there as this version needs it, "
            f"and {user} may not make it ({words}). Start one process as a user that may, or let a "
            f"user that may execute: {grant};",
        )

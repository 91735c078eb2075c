"""A deployment's schema in PostgreSQL, and who makes it.

Broker and backend each keep a ``Part`` of it: tables of its own, a row with their version, and
functions. Whoever starts first makes a part, under an advisory lock; who finds it needs no right to
create. Tables change only by additions, and functions have a digest of their text in their names,
so that several versions of the package share a schema. Each version notes once a day that its
functions are used, and who makes functions removes those that nobody has used for a month.

What makes a part is one text of SQL (``postgresql_setup.sql``), which is also printed for a DBA.
"""

from __future__ import annotations

import hashlib
import re
import shlex
import zlib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import resources
from typing import Any

import psycopg
from psycopg import errors

from dagster_taskiq.defaults import KEY_PREFIX
from dagster_taskiq.errors import RefusedByServerError
from dagster_taskiq.version import __version__

#: The oldest server that has ``gen_random_uuid``, as it numbers itself.
_OLDEST_SERVER = 130000

#: The longest name that PostgreSQL does not cut, in bytes.
_LONGEST_NAME = 63

#: The functions of a version are removed when they have been unused for this time. Each new
#: connection notes that they are used, and none lives for longer than an hour.
_UNUSED_DAYS = 30

#: How long what ends the names of a version's functions is, in characters.
_SUFFIX_LENGTH = 13

#: Of a table from which rows are deleted as fast as they come.
_MANY_DELETES = (
    "autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 2000, "
    "autovacuum_vacuum_cost_delay = 0, vacuum_truncate = off"
)

#: Of one transaction.
_LIMITS = """\
set_config('lock_timeout', '3s', true),
    set_config('enable_seqscan', 'off', true), set_config('jit', 'off', true)"""

#: What the SQL of every part may name in braces.
_FRAGMENTS = {
    "many_deletes": _MANY_DELETES,
    # nothing that a renewal writes is indexed, so that each changes a row in its page
    "many_updates": f"fillfactor = 50, {_MANY_DELETES}",
    "begin": f"""\
  PERFORM set_config('synchronous_commit', 'off', true), {_LIMITS};""",
    # in the user's own kind of synchronous commit, where that is one
    "begin_durable": f"""\
  PERFORM set_config('synchronous_commit', 'on', true)
    WHERE current_setting('synchronous_commit') = 'off';
  PERFORM {_LIMITS};""",
    # with each new connection, though it is written only once a day
    "note_use": """\
  IF NOT EXISTS (SELECT FROM {s}.function_sets
    WHERE suffix = '{v}' AND used_at > clock_timestamp() - interval '1 day') THEN
    INSERT INTO {s}.function_sets (suffix) VALUES ('{v}')
      ON CONFLICT (suffix) DO UPDATE SET used_at = excluded.used_at;
  END IF;""",
    "unused_days": str(_UNUSED_DAYS),
    "suffix_length": str(_SUFFIX_LENGTH),
}


def read_sql(package: str, name: str, fragments: Mapping[str, str] | None = None) -> str:
    """A file of SQL without its comments, and with its fragments in place of their names.

    Args:
        package: that has the file, ``postgresql_<name>.sql``.
        fragments: beside those that every part may name.
    """
    text = resources.files(package).joinpath(f"postgresql_{name}.sql").read_text("utf8")
    text = re.sub("^--.*\n+", "", text, flags=re.MULTILINE)
    return _filled(text, {**(fragments or {}), **_FRAGMENTS})


def _filled(text: str, fragments: Mapping[str, str]) -> str:
    return re.sub(r"\{(\w+)\}", lambda found: fragments.get(found[1], found[0]), text)


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def _text(value: str) -> str:
    return "'" + value.replace("'", "''") + "'"


_SETUP = read_sql(str(__package__), "setup")

#: The change that both parts begin with after their own tables.
FUNCTION_SETS = read_sql(str(__package__), "function_sets")


@dataclass(frozen=True)
class Part:
    """What the broker or the backend keeps in a schema.

    Attributes:
        version_table: has its only row from the first migration on.
        enter: the function that each new connection calls. It returns the ``oldest`` of the
            version's row.
        migrations: the changes of the tables, one after the other; the first makes them. A version
            of the package that lacks the newest ones can live with them, unless ``oldest`` is
            raised.
        oldest: how many of them a version of the package must know to share the schema with this
            one.
        functions: the SQL that makes them; their names end in ``{v}``.
    """

    version_table: str
    enter: str
    migrations: Sequence[str]
    oldest: int
    functions: str

    @property
    def suffix(self) -> str:
        """Ends the names of the functions."""
        digest = hashlib.sha1(self.functions.encode(), usedforsecurity=False).hexdigest()
        return "_" + digest[: _SUFFIX_LENGTH - 1]


def schema_name(key_prefix: str) -> str:
    """Of the schema of a deployment; no two prefixes share one."""
    own = KEY_PREFIX.replace("-", "_")
    name = own if key_prefix == KEY_PREFIX else f"{own}_{key_prefix}"
    if len(name.encode()) > _LONGEST_NAME:
        name = f"{own}_{hashlib.sha1(key_prefix.encode(), usedforsecurity=False).hexdigest()}"
    return name


class Schema:
    """One part of a deployment's schema.

    Args:
        key_prefix: of the deployment.
    """

    def __init__(self, key_prefix: str, part: Part) -> None:
        self.name = schema_name(key_prefix)
        self._part = part
        self._suffix = part.suffix
        self._quoted = _quoted(self.name)

    def statement(self, function: str, arguments: int) -> str:
        """The SQL that calls one of our functions, for psycopg."""
        places = ", ".join(["%s"] * arguments)
        name = f'{self._quoted}."{function}{self._suffix}"'.replace("%", "%%")
        return f"SELECT * FROM {name}({places})"  # noqa: S608

    def table(self, name: str) -> str:
        """The name of a table in SQL."""
        return f"{self._quoted}.{name}"

    def setup(self) -> str:
        """The SQL that makes the part or brings it up to date, for one transaction."""
        part = self._part
        changes = enumerate(part.migrations, start=1)
        text = _filled(
            _SETUP,
            {
                "changes": "".join(
                    f"  IF v_made < {n} THEN\n{sql}  END IF;\n" for n, sql in changes
                ),
                "count": str(len(part.migrations)),
                "oldest": str(part.oldest),
                "version_table": part.version_table,
                "functions": part.functions,
            },
        )
        # after all the rest, since the name of a schema may have braces
        names = {"s": self._quoted, "name": _text(self.name), "lock": self.lock, "v": self._suffix}
        return _filled(text, names)

    @property
    def lock(self) -> str:
        """The schema's advisory lock: two keys, which no single key of another program meets."""
        numbers = (zlib.crc32(text.encode()) - 2**31 for text in (KEY_PREFIX, self.name))
        return ", ".join(map(str, numbers))

    @property
    def _enter_name(self) -> str:
        return f'{self._quoted}."{self._part.enter}{self._suffix}"'

    # --- a new connection ---

    async def greet(self, connection: psycopg.AsyncConnection[Any], address: str) -> None:
        """Find the part on a new connection, or make it.

        A connection that is behind a pooler gets statements that need none before them.

        Raises:
            RefusedByServerError: the server or the schema is of a version that cannot be used, or
                it lacks something that the user may not make; the message names the command that
                prints the SQL for it.
        """
        try:
            oldest = await self._enter(connection, address)
        except errors.InsufficientPrivilege as error:
            raise await self._lacks_rights(connection, address, error) from error
        if oldest is None:
            raise RefusedByServerError(
                address,
                f"Cannot use {address}: {self.table(self._part.version_table)} was emptied. Stop "
                f"workers and runs, and drop the schema {self.name}: it is made again.",
                is_final=True,
            )
        if oldest > len(self._part.migrations):
            raise RefusedByServerError(
                address,
                f"Cannot use {address}: its schema {self.name} is of a newer version of "
                "dagster-taskiq, which this one cannot share it with. Update this one.",
                is_final=True,
            )

    async def _enter(self, connection: psycopg.AsyncConnection[Any], address: str) -> int | None:
        """The oldest version that those who use the tables must know; None if none is said."""
        found = await connection.execute(
            "SELECT pg_backend_pid(), current_setting('default_transaction_isolation'), "
            "current_setting('server_version_num')::int, to_regproc(%s) IS NOT NULL",
            [self._enter_name],
        )
        pid, isolation, version, is_there = await found.fetchone() or (0, "", 0, False)
        if version < _OLDEST_SERVER:
            text = f"Cannot use {address}: PostgreSQL {version // 10000} is older than 13."
            raise RefusedByServerError(address, text, is_final=True)
        if pid == connection.info.backend_pid:
            connection.prepare_threshold = 1
            if isolation != "read committed":
                await connection.execute("SET default_transaction_isolation TO 'read committed'")
        if is_there:
            # unless it goes just now, as a newer version removes what was unused for long
            with suppress(errors.UndefinedFunction):
                return await self._oldest(connection)
        await self._make(connection)
        return await self._oldest(connection)

    async def _oldest(self, connection: psycopg.AsyncConnection[Any]) -> int | None:
        found = await connection.execute(self.statement(self._part.enter, 0), ())
        (oldest,) = await found.fetchone() or (None,)
        return None if oldest is None else int(oldest)

    async def _make(self, connection: psycopg.AsyncConnection[Any]) -> None:
        """Make the part, or wait for who is making it: on a new deployment all start at once."""
        async with connection.transaction():
            await connection.execute(f"SELECT pg_advisory_xact_lock({self.lock})")
            found = await connection.execute(
                "SELECT to_regprocedure(%s) IS NOT NULL", [f"{self._enter_name}()"]
            )
            if await found.fetchone() != (True,):
                await connection.execute(self.setup())

    async def _lacks_rights(
        self, connection: psycopg.AsyncConnection[Any], address: str, error: psycopg.Error
    ) -> RefusedByServerError:
        found = await connection.execute(
            "SELECT current_user, EXISTS (SELECT FROM pg_namespace WHERE nspname = %s), "
            "EXISTS (SELECT FROM pg_proc AS p JOIN pg_namespace AS n ON n.oid = p.pronamespace "
            "WHERE n.nspname = %s AND p.proname = %s)",
            [self.name, self.name, self._part.enter + self._suffix],
        )
        user, has_schema, has_functions = await found.fetchone() or ("?", False, False)
        if has_functions:
            lack = f"{user} may not use its schema {self.name}"
        elif has_schema:
            lack = (
                f"its schema {self.name} lacks what version {__version__} of dagster-taskiq adds, "
                f"and {user} may not add it"
            )
        else:
            lack = f"the schema {self.name} is not there, and {user} may not make it"
        words = str(error.diag.message_primary or error)
        return RefusedByServerError(
            address,
            f"Cannot use {address}: {lack} ({words}). Have a database administrator execute the "
            f"SQL that is printed by: dagster-taskiq database sql --role {shlex.quote(user)} (and "
            "-y FILE, where the settings are in a file).",
        )


def setup_script(key_prefix: str, parts: Sequence[Part], role: str) -> str:
    """The SQL with which a DBA makes the parts of a schema, for a role that may not.

    Args:
        key_prefix: of the deployment.
        parts: that are needed.
        role: that is to use them.
    """
    schema, user = _quoted(schema_name(key_prefix)), _quoted(role)
    return "\n".join(
        [
            "BEGIN;",
            *(Schema(key_prefix, part).setup() for part in parts),
            f"GRANT USAGE ON SCHEMA {schema} TO {user};",
            f"GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA {schema} TO {user};",
            f"GRANT SELECT ON ALL SEQUENCES IN SCHEMA {schema} TO {user};",
            f"GRANT EXECUTE ON ALL FUNCTIONS IN SCHEMA {schema} TO {user};",
            "COMMIT;\n",
        ]
    )

"""The PostgreSQL backend's part of a deployment's schema.

``runs`` and ``tasks`` are logged. ``results`` are not: they live for seconds, and where a crash
has taken one, Dagster's log says how the step ended. ``life`` is the epoch: a row in an unlogged
table, which a crash, a promotion and a base backup empty, as does a TRUNCATE of runs or tasks. So
it goes with each event after which a commit may be missing. A new connection ends it where the
database is a copy of another one.

A task is held while its ``state`` is ``claimed`` and ``lease_until`` lies ahead. In the states
``done`` and ``refused`` its ``token`` is that of the claim that has ended it. ``dropped_epoch`` is
empty where the message that was dropped was of an older epoch.

The history and its counters have nothing to do with the epoch, and are logged: what has failed in
the night should outlive the crash that it has failed by.
"""

from __future__ import annotations

from dagster_taskiq.backend.history import BATCH_EXPIRES_SECONDS
from dagster_taskiq.defaults import (
    CLOSED_RECORD_EXPIRES_SECONDS,
    HISTORY_ENDS,
    HISTORY_EXPIRES_SECONDS,
    LOST_WORKER_SECONDS,
    RUN_RECORD_EXPIRES_SECONDS,
)
from dagster_taskiq.servers.postgresql_schema import FUNCTION_SETS, Part, read_sql

_FRAGMENTS = {
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
    "most_ends": str(HISTORY_ENDS),
    "history": str(HISTORY_EXPIRES_SECONDS),
    "batch": str(BATCH_EXPIRES_SECONDS),
    "lost": f"{LOST_WORKER_SECONDS:g}",
}

PART = Part(
    version_table="version",
    enter="enter",
    migrations=(
        read_sql(str(__package__), "tables"),
        FUNCTION_SETS,
        read_sql(str(__package__), "pauses"),
        read_sql(str(__package__), "history_tables"),
        read_sql(str(__package__), "withheld_table"),
    ),
    oldest=1,
    functions="\n".join(
        read_sql(str(__package__), name, _FRAGMENTS)
        for name in ("functions", "history", "withheld")
    ),
)

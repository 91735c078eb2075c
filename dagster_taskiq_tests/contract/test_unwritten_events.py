"""What Dagster's log shows of a run fits its end, whatever the database refuses or misses."""

import re
import threading
from collections.abc import Callable, Iterator
from typing import Any

import psycopg2
import pytest
import yaml
from dagster import (
    AssetMaterialization,
    DagsterInstance,
    OpExecutionContext,
    RetryPolicy,
    execute_job,
    job,
    op,
    reconstructable,
)
from sqlalchemy.exc import OperationalError

from dagster_taskiq import taskiq_executor
from dagster_taskiq._dagster.names import EventLogEntry, InstanceRef
from dagster_taskiq.execution import tasks
from dagster_taskiq.execution.tasks import TaskRunner
from dagster_taskiq.messages.results import Outcome, TaskResult
from dagster_taskiq_tests.proxy import Mode, Proxy, proxied
from dagster_taskiq_tests.server_nodes import execute_sql
from dagster_taskiq_tests.servers import postgres_database

EAGER = {"config_source": {"task_always_eager": True}}

#: How long the database is away.
AWAY_SECONDS = 2.0

ENDS = ("STEP_SUCCESS", "STEP_FAILURE", "STEP_UP_FOR_RETRY")


class Meanwhile:
    """What happens to the database while the step ``speaks``."""

    happen: Callable[[], None] = staticmethod(lambda: None)


@op
def speaks(context: OpExecutionContext) -> int:
    for number in range(3):
        context.log.info("before %d", number)
    context.log_event(AssetMaterialization("thing", metadata={"text": "x" * 10}))
    Meanwhile.happen()
    for number in range(3):
        context.log.info("after %d", number)
    context.log_event(AssetMaterialization("other_thing"))
    return 1


@op(retry_policy=RetryPolicy(max_retries=1))
def add_one(number: int) -> int:
    return number + 1


@job(executor_def=taskiq_executor)
def speaking_job() -> None:
    add_one(speaks())


def _line(entry: EventLogEntry) -> str:
    """Without the names of directories."""
    return re.sub(r"\S*/\S*", "...", entry.message)


class Database:
    """Dagster's storage behind a proxy."""

    def __init__(self, url: str, proxy: Proxy, instance: DagsterInstance) -> None:
        self.url = url
        self.proxy = proxy
        self.instance = instance

    def refuse(self, condition: str) -> None:
        """Refuse rows of the event log for which this holds."""
        function = (
            "CREATE OR REPLACE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN "
            f"IF {condition} THEN RAISE EXCEPTION 'No space left on device' "
            "USING ERRCODE = '53100'; END IF; RETURN new; END $$"
        )
        execute_sql(self.url, function)
        execute_sql(
            self.url,
            "CREATE TRIGGER refuse BEFORE INSERT ON event_logs FOR EACH ROW "
            "EXECUTE FUNCTION refuse()",
        )

    def run(self, patience_seconds: float = 300.0) -> tuple[bool, list[tuple[str | None, str]]]:
        """Whether a run succeeds, and all that its log has: step, and event or line."""
        config = {**EAGER, "server_patience_seconds": patience_seconds}
        run_config = {"execution": {"config": config}}
        target = reconstructable(speaking_job)
        with execute_job(
            target, self.instance, run_config=run_config, raise_on_error=False
        ) as result:
            entries = self.instance.all_logs(result.run_id)
        said = [
            (it.step_key, it.dagster_event.event_type_value if it.dagster_event else _line(it))
            for it in entries
        ]
        self.errors = " ".join(
            str(event.step_failure_data.error or event.event_specific_data)
            for it in entries
            if (event := it.dagster_event) is not None and event.is_step_failure
        )
        return result.success, said


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Database]:
    with postgres_database() as url, proxied(url) as proxy:
        settings = {
            "storage": {"postgres": {"postgres_url": proxy.url}},
            "telemetry": {"enabled": False},
        }
        directory = tmp_path_factory.mktemp("instance")
        (directory / "dagster.yaml").write_text(yaml.safe_dump(settings))
        with DagsterInstance.from_config(str(directory)) as instance:
            yield Database(url, proxy, instance)


@pytest.fixture
def database(shared: Database, monkeypatch: pytest.MonkeyPatch) -> Iterator[Database]:
    monkeypatch.delenv("DAGSTER_HOME", raising=False)
    yield shared
    shared.proxy.set(Mode.PASS)
    execute_sql(shared.url, "DROP TRIGGER IF EXISTS refuse ON event_logs")


def ends(said: list[tuple[str | None, str]], step: str) -> list[str]:
    return [what for key, what in said if key == step and what in ENDS]


def test_an_end_that_is_refused_is_no_success(database: Database) -> None:
    """The step is tried again by its policy, and fails with the database's words."""
    database.refuse("new.dagster_event_type = 'STEP_SUCCESS' AND new.step_key = 'add_one'")
    is_success, said = database.run()
    assert not is_success
    assert ends(said, "speaks") == ["STEP_SUCCESS"]
    assert ends(said, "add_one") == ["STEP_UP_FOR_RETRY", "STEP_FAILURE"]
    assert "No space left on device" in database.errors
    assert (None, "PIPELINE_FAILURE") in said


@pytest.mark.parametrize("kind", ["STEP_OUTPUT", "HANDLED_OUTPUT", "ASSET_MATERIALIZATION"])
def test_no_success_follows_an_event_that_is_refused(database: Database, kind: str) -> None:
    """Whether it was to be written alone or together with its step's end."""
    database.refuse(f"new.dagster_event_type = '{kind}' AND new.step_key = 'speaks'")
    is_success, said = database.run()
    assert not is_success
    assert ends(said, "speaks") == ["STEP_FAILURE"]
    assert "No space left on device" in database.errors


def test_a_database_that_is_away_for_a_while_costs_nothing(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While a step writes: all of it is in the log, in its order, and nothing twice."""

    def go_away() -> None:
        database.proxy.set(Mode.REFUSE)
        timer = threading.Timer(AWAY_SECONDS, database.proxy.set, (Mode.PASS,))
        timer.start()

    _, quiet = database.run()
    monkeypatch.setattr(Meanwhile, "happen", go_away)
    is_success, said = database.run()
    assert is_success
    assert said == quiet


def test_a_database_that_starts_up_when_a_step_begins_is_waited_for(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that has not been connected yet opens its instance later."""
    left = ["the database system is starting up", "sorry, too many clients already"]
    open_instance = tasks.open_instance

    def refuse_and_open(ref: InstanceRef | None) -> DagsterInstance:
        if left:
            lost = OperationalError("SELECT", {}, psycopg2.OperationalError(left.pop()))
            raise RuntimeError("too many retries for DB connection") from lost
        return open_instance(ref)

    monkeypatch.setattr(tasks, "open_instance", refuse_and_open)
    is_success, said = database.run()
    assert is_success
    assert not left
    assert ends(said, "speaks") == ["STEP_SUCCESS"]


def test_a_database_that_does_not_come_back_fails_the_step(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the log shows in the end is no success of anything that it does not have."""
    execute_plan = TaskRunner.execute_plan

    def execute_and_come_back(*arguments: Any) -> TaskResult:
        result = execute_plan(*arguments)
        database.proxy.set(Mode.PASS)
        return result

    monkeypatch.setattr(TaskRunner, "execute_plan", execute_and_come_back)
    monkeypatch.setattr(Meanwhile, "happen", lambda: database.proxy.set(Mode.REFUSE))
    is_success, said = database.run(patience_seconds=0.5)
    assert not is_success
    assert ends(said, "speaks") == ["STEP_FAILURE"]
    assert "Dagster's database is away; it was waited for until 0.5 s were over" in database.errors
    assert (None, "PIPELINE_FAILURE") in said


def test_what_has_begun_is_not_executed_again(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a process that looks into the log, as with a signing key: also in this database."""
    execute_plan = TaskRunner.execute_plan
    _, once = database.run()
    second: list[Outcome] = []

    def execute_twice(runner: TaskRunner, *arguments: Any) -> TaskResult:
        runner._refuses_copies = True
        result = execute_plan(runner, *arguments)
        second.append(execute_plan(runner, *arguments).outcome)
        return result

    monkeypatch.setattr(TaskRunner, "execute_plan", execute_twice)
    is_success, said = database.run()
    assert is_success
    assert second == [Outcome.COPY] * 2
    assert said == once

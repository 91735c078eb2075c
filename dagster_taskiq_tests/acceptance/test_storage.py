"""What a run leaves for people to read: in PostgreSQL too, and in the logs of the UI."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from dagster import DagsterEventType

from dagster_taskiq_tests.acceptance.harness import Run, Stack, open_stack, story_in_process, until
from dagster_taskiq_tests.servers import postgres_database


@pytest.fixture(scope="module", params=["redis", "rabbitmq alone", "nothing"])
def on_postgres(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Stack]:
    """A stack whose instance is in a PostgreSQL database, with a worker.

    RabbitMQ alone leaves the state of tasks to that database, and where there is nothing else
    the database is the broker too.
    """
    with postgres_database() as url:
        storage = {"storage": {"postgres": {"postgres_url": url}}}
        directory = tmp_path_factory.mktemp("stack")
        with open_stack(request.param, directory, dagster_yaml=storage) as stack:
            stack.worker().await_ready()
            yield stack


def test_fan_out_on_postgres(on_postgres: Stack) -> None:
    """Many steps that write their events at once leave the same story as one process does."""
    run = on_postgres.run("parallel")
    assert run.is_success
    assert run.output("total") == 40
    assert run.story() == story_in_process("parallel")


def test_dynamic_and_retry_on_postgres(on_postgres: Stack) -> None:
    """What the loop reads back from the log, it reads from PostgreSQL as well."""
    assert on_postgres.run("dynamic", ops={"spread": {"config": {"count": 3}}}).is_success
    died = on_postgres.run("dies_once")
    assert died.is_success
    assert died.output("add_one") == 2


def test_a_database_that_a_dba_has_prepared(tmp_path: Path) -> None:
    """A worker and a run work there whose user may create nothing."""
    with open_stack("postgres without rights", tmp_path) as stack:
        stack.worker().await_ready()
        run = stack.run("parallel")
        assert run.is_success
        assert run.output("total") == 40


@pytest.fixture(scope="module")
def talk(shared: Stack) -> Run:
    """A run whose op has written to all its outputs."""
    run = shared.run("talkative")
    assert run.is_success
    return run


def test_compute_logs(talk: Run) -> None:
    """What a step and its subprocesses write is where the UI shows it."""
    (event,) = talk.events(DagsterEventType.LOGS_CAPTURED)
    assert event.logs_captured_data.step_keys == ["talks"]
    manager = talk.stack.instance.compute_log_manager
    key = manager.build_log_key_for_run(talk.run_id, event.logs_captured_data.file_key)
    data = manager.get_log_data(key)
    assert b"a line on stdout" in (data.stdout or b"")
    assert b"a line of a subprocess" in (data.stdout or b"")
    assert b"a line on stderr" in (data.stderr or b"")
    assert manager.is_capture_complete(key)


def test_output_is_in_the_worker_s_own_too(talk: Run, shared: Stack) -> None:
    """The worker's output has what its steps write, for those who collect it there.

    While they run, to their last words, and without a process beside the step's.
    """
    assert talk.is_success

    def has(text: str) -> Callable[[], bool]:
        logs = list(shared.directory.glob("*worker*.log"))
        return lambda: any(text in path.read_text() for path in logs)

    until(has("a line on stdout"), "the output of a step that has ended")
    run = shared.start("talks_to_the_end")
    until(has("a line while it runs"), "the output of a step that runs")
    mine = psutil.process_iter(["name", "environ"])
    names = [it.info["name"] for it in mine if shared.mark in (it.info["environ"] or {}).values()]
    assert "tail" not in names
    run.open_gate()
    run.wait()
    until(has("the last words"), "the output of a step that was killed")


def test_op_log(talk: Run) -> None:
    """``context.log`` is in the event log, with its step."""
    (entry,) = [entry for entry in talk.logs() if "op's log" in entry.user_message]
    assert entry.step_key == "talks"


def test_engine_events(talk: Run, shared: Stack) -> None:
    """The log says where a step waited and ran, and marks the wait's two ends."""
    engine = talk.events(DagsterEventType.ENGINE_EVENT, "talks")
    sent, taken = (event.engine_event_data for event in engine)
    assert sent.metadata["queue"].value == "dagster"
    assert sent.metadata["priority"].value == 5
    assert sent.metadata["attempt"].value == 1
    host = os.uname().nodename
    said = {key: value.value for key, value in taken.metadata.items()}
    assert said["worker"].endswith(f"@{host}")
    assert said["host"] == host
    assert said["queue"] == "dagster"
    assert int(said["pid"]) > 0
    assert sent.marker_start
    assert sent.marker_start == taken.marker_end


def test_order_of_the_log(talk: Run) -> None:
    """A step is sent, taken and started, in this order."""
    kinds = [event.event_type_value for event in talk.events(step="talks")]
    assert kinds[:2] == ["ENGINE_EVENT", "ENGINE_EVENT"]
    assert kinds.index("STEP_START") > 1
    assert kinds[-1] == "STEP_SUCCESS"


def test_the_instance_goes_by_reference(shared: Stack, tmp_path: Path) -> None:
    """A run with the worker's own DAGSTER_HOME sends no copy of its settings, nor their secrets."""
    other = shared.start("blocker", tags={"dagster-taskiq/queue": "nobody"})
    other.await_message("Sending step")
    with shared.redis() as client:
        payloads = b"".join(
            b"".join(client.hgetall(key).values())
            for key in client.scan_iter(match=f"{shared.prefix}*payloads")
        )
    assert other.run_id.encode() in payloads
    assert b"LocalArtifactStorage" not in payloads
    other.signal()
    other.wait()

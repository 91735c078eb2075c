"""What begins while a server is away, and what is told to end while one takes nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
from dagster import DagsterEventType

from dagster_taskiq_tests.acceptance.harness import is_running, open_stack, until
from dagster_taskiq_tests.faults.checks import LONG_SECONDS, TEST_SECONDS
from dagster_taskiq_tests.proxy import Mode, proxied
from dagster_taskiq_tests.servers import private_redis

pytestmark = pytest.mark.timeout(TEST_SECONDS)


def test_workers_and_runs_that_begin_while_their_server_is_away_wait(tmp_path: Path) -> None:
    """They say so once, go on when it is back, and end at once when they are told to."""
    with open_stack("redis", tmp_path) as stack:
        assert stack.broker is not None
        with proxied(stack.broker.url) as proxy:
            proxy.set(Mode.REFUSE)
            settings = stack.settings_file(broker=proxy.url)
            told, waits = [stack.worker(slots=1, settings=settings) for _ in range(2)]
            run = stack.start("simple", broker=proxy.url)
            for worker in (told, waits):
                worker.await_log("The worker starts when it is back")
            told.terminate()
            assert told.wait() == 0
            run.await_message("The run goes on when it is back", LONG_SECONDS)
            proxy.set(Mode.PASS)
            waits.await_ready()
            assert run.wait(LONG_SECONDS).is_success
            assert waits.log.count("The worker starts when it is back") == 1
            assert sum("goes on when it is back" in text for text in run.messages()) == 1


def test_a_run_that_is_terminated_while_its_redis_is_full(tmp_path: Path) -> None:
    """Its step is told when there is room again, and the run's end says that it was interrupted."""
    with private_redis() as server, open_stack("redis", tmp_path) as stack:
        stack.worker(slots=1, settings=stack.settings_file(broker=server.url)).await_ready()
        run = stack.start("one_to_cancel", broker=server.url, cancel_grace_seconds=20.0)
        (note,) = run.await_notes("started", timeout=LONG_SECONDS)
        with server.client() as client:
            client.config_set("maxmemory", 1)
            run.signal()
            run.await_message("maxmemory", LONG_SECONDS)
            assert is_running(note.pid)
            client.config_set("maxmemory", 0)
        run.wait(LONG_SECONDS)
        assert not is_running(note.pid) or run.notes("cleaned")
        assert run.events(DagsterEventType.STEP_FAILURE)
        ends = run.events(DagsterEventType.PIPELINE_FAILURE)
        assert "DagsterExecutionInterruptedError" in str(ends[0].event_specific_data)
        until(lambda: run.notes("cleaned"), "the step has cleaned up")

"""The whole path as its users drive it: webserver and daemon, launched, scheduled, backfilled."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
from dagster import DagsterEventType, DagsterRunStatus, RunsFilter

from dagster_taskiq.tags import QUEUE_TAG
from dagster_taskiq_tests.acceptance import user_jobs
from dagster_taskiq_tests.acceptance.browser import Browser, open_browser
from dagster_taskiq_tests.acceptance.harness import is_running, until
from dagster_taskiq_tests.acceptance.launched import LaunchedRun, metadata
from dagster_taskiq_tests.acceptance.user_stack import (
    ALONE_TAG,
    DASHBOARD_URL,
    REPOSITORY_PATH,
    Web,
    open_user_stack,
)

CANCELED = DagsterRunStatus.CANCELED
QUEUED = DagsterRunStatus.QUEUED
STARTING = DagsterRunStatus.STARTING

PARTITIONS = user_jobs.PARTITIONS.get_partition_keys()

#: A schedule ticks once a minute, and the daemon looks for backfills twice.
_TICK_SECONDS = 60.0


@pytest.fixture(scope="module")
def web(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Web]:
    """The deployment."""
    with open_user_stack(tmp_path_factory.mktemp("user")) as web:
        yield web


@pytest.fixture(scope="module", autouse=True)
def schedule_id(web: Web) -> str:
    """A schedule, started before anything else, as its tick may be a minute away."""
    return web.start_schedule("every_minute")


@pytest.fixture(scope="module", autouse=True)
def backfill_id(web: Web) -> str:
    """A backfill, launched early too; the other tests' runs overtake its own."""
    return web.launch_backfill("daily", PARTITIONS)


def runs_with(web: Web, tag: str, value: str) -> list[LaunchedRun]:
    """All runs with a tag."""
    found = web.stack.instance.get_runs(RunsFilter(tags={tag: value}))
    return [LaunchedRun(web.stack, run.run_id) for run in found]


def test_launching(web: Web) -> None:
    """A run that was launched through GraphQL succeeds, its run and steps on their workers."""
    run = web.launch("chain").wait()
    assert run.is_success
    assert len(run.notes("ran")) == 1
    (started,) = run.starts()
    assert str(metadata(started)["worker"]).startswith("runs@")
    taken = [message for message in run.messages() if message.startswith("Executing step")]
    assert len(taken) == 2
    assert all(" on worker steps@" in message for message in taken)


def test_terminating(web: Web) -> None:
    """A running run that is terminated through GraphQL cleans up, is CANCELED, and all of it ends.

    To terminate it again is an error that says so.
    """
    run = web.launch("long")
    (started,) = run.await_notes("started")
    pid = run.await_start()
    web.terminate(run.run_id)
    assert run.wait().status is CANCELED
    (cleaned,) = run.notes("cleaned")
    assert cleaned.pid == started.pid
    until(lambda: not is_running(pid), "the run's process ends")
    answer = web.terminate(run.run_id, expected="TerminateRunFailure")
    assert "could not be terminated" in answer["message"]
    # the step's process goes on with other steps
    assert web.launch("chain").wait().is_success
    assert run.notes("never") == []


def test_terminating_what_waits_for_a_worker(web: Web) -> None:
    """A run in a worker's queue can be forced to end, which Dagster asks for, and never starts."""
    queue = {QUEUE_TAG: "served-late"}
    run = web.launch("chain", tags=queue)
    run.await_message('Sent the run to queue "served-late". It waits. No worker with run slots')
    assert run.status is STARTING
    answer = web.terminate(run.run_id, expected="TerminateRunFailure")
    assert "due to having status STARTING" in answer["message"]
    web.terminate(run.run_id, is_forced=True)
    assert run.status is CANCELED
    worker = web.stack.worker("--run-slots", "1", slots=0, name="late", queues=["served-late"])
    worker.await_log(f"Run {run.run_id} is CANCELED: it is not started any more.")
    assert run.status is CANCELED
    assert run.starts() == []


def test_terminating_what_waits_in_the_run_queue(web: Web) -> None:
    """A run that Dagster's run queue holds back is CANCELED, and does not start after that."""
    first = web.launch("long", tags={ALONE_TAG: "x"})
    first.await_notes("started")
    second, third = (web.launch("chain", tags={ALONE_TAG: "x"}) for _ in range(2))
    assert second.status is QUEUED
    web.terminate(second.run_id)
    assert second.status is CANCELED
    web.terminate(first.run_id)
    assert third.wait().is_success
    assert first.status is CANCELED
    assert second.starts() == []


def test_a_sensor(web: Web) -> None:
    """A sensor that was started through GraphQL has each of its requests run once."""
    web.start_sensor("on_request")
    for name in ("a", "b"):
        (web.stack.directory / f"{name}{user_jobs.REQUEST_SUFFIX}").touch()
    runs = until(lambda: two_of_sensor(web), "the sensor asks for two runs")
    for run in runs:
        assert run.wait().is_success
        assert len(run.notes("ran")) == 1


def two_of_sensor(web: Web) -> list[LaunchedRun]:
    """The sensor's runs, once there are two."""
    runs = runs_with(web, "dagster/sensor_name", "on_request")
    return runs if len(runs) == 2 else []


def test_a_schedule(web: Web, schedule_id: str) -> None:
    """A schedule that was started through GraphQL has its job run by the minute."""
    run = until(
        lambda: runs_with(web, "dagster/schedule_name", "every_minute"),
        "the schedule's tick",
        2 * _TICK_SECONDS,
    )[-1]
    web.stop_schedule(schedule_id)
    assert run.wait().is_success
    assert len(run.notes("ran")) == 1


def test_a_backfill(web: Web, backfill_id: str) -> None:
    """Each of a backfill's partitions is run once, and never more at once than the limit."""
    assert len(PARTITIONS) == 31
    runs = until(
        lambda: finished_backfill(web, backfill_id), "the backfill's runs end", 2 * _TICK_SECONDS
    )
    assert all(run.is_success for run in runs)
    keys = [run.notes("partition")[0].more["key"] for run in runs]
    assert sorted(keys) == PARTITIONS
    assert all(len(run.notes("partition")) == 1 for run in runs)
    assert most_at_once(web) == user_jobs.RUN_LIMIT


def finished_backfill(web: Web, backfill_id: str) -> list[LaunchedRun]:
    """The runs of a backfill, once all there should be have ended."""
    runs = runs_with(web, "dagster/backfill", backfill_id)
    is_over = len(runs) == len(PARTITIONS) and all(run.dagster_run.is_finished for run in runs)
    return runs if is_over else []


def most_at_once(web: Web) -> int:
    """How many of the deployment's runs were at once out of the run queue and not finished."""
    instance = web.stack.instance
    changes = []
    for record in instance.get_run_records():
        begun = instance.all_logs(
            record.dagster_run.run_id, of_type={DagsterEventType.PIPELINE_STARTING}
        )
        changes += [(entry.timestamp, 1) for entry in begun]
        if begun:
            changes.append((record.end_time or math.inf, -1))
    return max(itertools.accumulate(change for _, change in sorted(changes)))


def test_in_a_browser(web: Web, tmp_path: Path) -> None:
    """Who clicks "Launch Run" sees a run succeed, and where; after "Terminate" its page says so."""
    with open_browser(tmp_path) as browser:
        launched = click_launch(web, browser, "chain")
        browser.await_text("RUN_SUCCESS")
        page = browser.await_text("Success")
        assert 'Executing step "finish" on worker steps@' in page
        assert "finished with 1" in page
        # the table of the step's event, and the link of the run's first one
        for name in ("worker", "host", "slot", "attempt", "seconds waited"):
            assert name in page
        assert f"{DASHBOARD_URL}/runs/{launched.run_id}" in page
        assert launched.wait().is_success
        endless = click_launch(web, browser, "long")
        browser.await_text("STEP_START")
        browser.click("Terminate")
        browser.click("Terminate 1 run", inside="//*[@role='dialog']")
        browser.await_text("RUN_CANCELED", "Canceled")
        assert endless.status is CANCELED
        assert len(endless.notes("cleaned")) == 1


def click_launch(web: Web, browser: Browser, job: str) -> LaunchedRun:
    """Launch a run in the browser, which then shows it."""
    browser.open(f"{web.url}/locations/{REPOSITORY_PATH}/jobs/{job}/playground")
    browser.click("Launch Run")
    browser.await_text("RUN_ENQUEUED")
    return LaunchedRun(web.stack, browser.driver.current_url.rpartition("/")[2])

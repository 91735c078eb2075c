"""Two deployments on one RabbitMQ without a key_prefix of their own: each has its own state."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from dagster_taskiq_tests.acceptance.harness import Stack, open_stack, until
from dagster_taskiq_tests.servers import postgres_database


@pytest.fixture(scope="module")
def stacks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Stack, Stack]]:
    """One whose instance is in files, and one whose instance is in PostgreSQL."""
    directories = [tmp_path_factory.mktemp(name) for name in ("files", "postgres")]
    with postgres_database() as url, open_stack("rabbitmq alone", directories[0]) as one:
        storage = {"storage": {"postgres": {"postgres_url": url}}}
        with open_stack(
            "rabbitmq alone", directories[1], dagster_yaml=storage, beside=one
        ) as other:
            yield one, other


def test_each_worker_executes_what_is_its_own(stacks: tuple[Stack, Stack]) -> None:
    """And gives back the rest: nothing is lost, dropped or executed twice."""
    workers = [stack.worker() for stack in stacks]
    for worker in workers:
        worker.await_ready()
    runs = [stack.start("parallel") for stack in stacks]
    for run in runs:
        assert run.wait().is_success
        assert run.output("total") == 40
    for worker in workers:
        assert "Dropped" not in worker.log
        assert "Refused" not in worker.log
        worker.terminate()
        assert worker.wait() == 0


def test_a_run_whose_workers_have_another_backend_says_so(stacks: tuple[Stack, Stack]) -> None:
    """The run's log names both; the worker says it in its log and in the list of workers."""
    theirs, ours = stacks
    worker = ours.worker()
    worker.await_ready()
    run = theirs.start("simple")
    said = run.await_message("gives the run's tasks back")
    assert "No worker listens" in said
    assert "unix://" in said
    assert "postgresql://" in said
    worker.await_log("goes back to its queue")
    assert worker.log.count("goes back to its queue") == 1
    listing = ("worker", "list", "-y", str(ours.settings_file()))
    until(lambda: "gives back tasks whose backend is unix://" in ours.cli(*listing), "it lists it")
    theirs.worker().await_ready()
    assert run.wait().is_success

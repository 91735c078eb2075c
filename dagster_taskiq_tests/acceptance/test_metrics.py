"""What a worker with ``--metrics-port`` and the exporter tell, on servers of each kind."""

from __future__ import annotations

import os
import re
import signal
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pytest
from prometheus_client.parser import text_string_to_metric_families

from dagster_taskiq_tests.acceptance.harness import (
    BrokerKind,
    Stack,
    WorkerProcess,
    is_running,
    open_stack,
    until,
)

KINDS: tuple[BrokerKind, ...] = ("redis", "rabbitmq", "embedded", "postgres")

STEPS = {"queue": "dagster", "kind": "steps"}
FAR = {"queue": "far", "kind": "steps"}

#: How long a process that is stopped is given to answer; one that lives answers in milliseconds.
SHORT_SECONDS = 0.5

#: How long one that lives may take on a busy machine.
LONG_SECONDS = 30.0


@dataclass
class Served:
    """A process that serves pages, whose address is in its log."""

    process: WorkerProcess

    def get(self, path: str, timeout_seconds: float = LONG_SECONDS) -> tuple[int, str]:
        """Status and text of a page."""
        found = until(
            lambda: re.findall(r"Metrics are on (http\S+)/metrics", self.process.log), "it serves"
        )
        try:
            with urllib.request.urlopen(f"{found[0]}{path}", timeout=timeout_seconds) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read().decode()

    def value(self, name: str, **labels: str) -> float | None:
        """Of one sample; None if it is not there."""
        status, text = self.get("/metrics")
        assert status == 200
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                if sample.name == f"dagster_taskiq_{name}" and sample.labels == labels:
                    return sample.value
        return None


@pytest.fixture(scope="module", params=KINDS)
def stack(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Stack]:
    kind = cast("BrokerKind", request.param)
    with open_stack(kind, tmp_path_factory.mktemp("stack")) as stack:
        yield stack


def exporter(stack: Stack, *queues: str) -> Served:
    """Start one."""
    log = stack.new_log("exporter")
    options = [word for queue in queues for word in ("-q", queue)]
    arguments = ["exporter", "--port", "0", "-y", str(stack.settings_file()), *options]
    with log.open("wb") as output:
        process = stack._popen(arguments, output, output)
    served = WorkerProcess("exporter", process, Path(log))
    stack.exit_stack.callback(served.close)
    return Served(served)


def test_what_a_worker_does_and_what_waits_is_told(stack: Stack) -> None:
    """A step that succeeds, one that fails, and one in a queue without a worker."""
    process = stack.worker("--run-slots", "0", "--metrics-port", "0", slots=1, name="only")
    worker = Served(process)
    waits = stack.start("one_gated", default_queue="far")
    process.await_ready()
    assert worker.get("/health") == (200, "The worker is running.\n")
    waits.await_message("Sending step")  # said just before it is sent
    assert stack.run("with_hooks").status.value == "FAILURE"
    told = exporter(stack, "far")  # late, as its readings are kept for some seconds
    _check_worker(worker)
    until(lambda: told.value("queue_depth", **FAR) == 1, "the exporter sees the far queue")
    _check_exporter(told, is_blind=stack.broker is not None and "amqp" in stack.broker.address)
    _check_stopped(process, worker)
    waits.signal(signal.SIGTERM)
    waits.wait()
    told.process.terminate()
    assert told.process.wait() == 0
    assert "Traceback" not in told.process.log + process.log


def _check_worker(worker: Served) -> None:
    assert worker.value("worker_tasks_started_total", **STEPS) == 2
    until(
        lambda: (
            worker.value("worker_tasks_ended_total", **STEPS, outcome="success") == 1
            and worker.value("worker_tasks_ended_total", **STEPS, outcome="failure") == 1
        ),
        "both ends are told",
    )
    assert worker.value("worker_queue_wait_seconds_count", **STEPS) == 2
    assert worker.value("worker_task_seconds_count", **STEPS) == 2
    assert (worker.value("worker_result_bytes_sum", **STEPS) or 0) > 1000
    assert (worker.value("worker_message_bytes_sum", **STEPS) or 0) > 1000
    assert worker.value("worker_children") == 1
    assert (worker.value("worker_children_memory_bytes") or 0) > 2**20
    assert worker.value("worker_state", state="running") == 1
    assert worker.value("worker_slots", kind="steps") == 1


def _check_exporter(told: Served, *, is_blind: bool) -> None:
    for role in ("broker", "backend"):
        assert told.value("server_up", role=role) == 1
        assert (told.value("server_answer_seconds", role=role) or 0) > 0
    assert told.value("queue_stuck", **FAR) == told.value("queue_demand", **FAR) == 1
    assert told.value("queue_workers", **FAR) == 0
    age: Any = told.value("queue_oldest_age_seconds", **FAR)
    assert age is None if is_blind else 0 <= age < 600
    assert told.value("queue_workers", **STEPS) == told.value("queue_slots", **STEPS) == 1
    assert told.value("workers", state="running") == 1
    assert told.value("tasks_sent_total", **STEPS) == 2
    for outcome in ("succeeded", "failed"):
        assert told.value("tasks_ended_total", **STEPS, outcome=outcome) == 1
    status, text = told.get("/demand")
    assert status == 200
    assert '"far": 1' in text


def _check_stopped(process: WorkerProcess, worker: Served) -> None:
    """A process that is stopped answers nothing; one that drains says so until it has ended."""
    os.kill(process.pid, signal.SIGSTOP)
    try:
        with pytest.raises(TimeoutError):
            worker.get("/health", SHORT_SECONDS)
    finally:
        os.kill(process.pid, signal.SIGCONT)
    until(lambda: worker.get("/health")[0] == 200, "it is healthy again")
    process.terminate()
    assert process.wait() == 0
    assert not is_running(process.pid)

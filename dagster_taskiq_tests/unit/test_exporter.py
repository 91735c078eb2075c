"""The exporter: what a scrape tells of a deployment, also while servers are away."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Callable, Coroutine, Iterator, Mapping
from contextlib import closing
from dataclasses import replace
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from dagster_taskiq.backend.memory import MemoryBackend
from dagster_taskiq.brokers.memory import MemoryBroker
from dagster_taskiq.connections import Servers
from dagster_taskiq.errors import ConfigError
from dagster_taskiq.messages.attempt_ends import Counted, Counter, HistoryBatch
from dagster_taskiq.messages.queue_pauses import QueuePause
from dagster_taskiq.messages.signing import Signer
from dagster_taskiq.monitoring import exporter as module
from dagster_taskiq.monitoring.definitions import EXPORTER_METRICS, MetricType
from dagster_taskiq.monitoring.exporter import Exporter
from dagster_taskiq.monitoring.queue_labels import MOST_UNKNOWN, OTHER
from dagster_taskiq.servers.kinds import ServerOptions
from dagster_taskiq_tests.unit.overview_scene import RUN, Scene, step, worker
from dagster_taskiq_tests.unit.test_worker_metrics import get

pytestmark = pytest.mark.once

STEPS = {"queue": "dagster", "kind": "steps"}
Values = Mapping[tuple[str, frozenset[tuple[str, str]]], float]


class Watched:
    """A scene with an exporter that is scraped anew each time."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, is_searchable: bool = True) -> None:
        options = ServerOptions("redis://localhost"), ServerOptions("amqp://localhost")
        two = Servers(options[1], options[0], Signer())
        self.scene = Scene(two, is_searchable=is_searchable)
        self.find: Callable[[], Servers | None] = lambda: self.scene.servers
        self.opened: list[Any] = []
        monkeypatch.setattr(module, "open_backend", self._open_backend)
        monkeypatch.setattr(module, "open_broker", self._open_broker)
        monkeypatch.setattr(module, "CACHE_SECONDS", 0.0)
        self.exporter = Exporter("127.0.0.1", 0, self._find, ["dagster"])
        self.exporter.start()

    def _find(self) -> Servers | None:
        return self.find()

    def _open_backend(self, _: object, signer: Signer) -> MemoryBackend:
        self.opened.append(MemoryBackend(self.scene.state, signer))
        return self.opened[-1]

    def _open_broker(self, _: object) -> MemoryBroker:
        return MemoryBroker(self.scene.queues)

    def do(self, *steps: Coroutine[Any, Any, Any]) -> None:
        async def all_of_them() -> None:
            for it in steps:
                await it

        asyncio.run(all_of_them())

    def scrape(self) -> Values:
        status, text = get(self.exporter, "/metrics")
        assert status == 200
        return {
            (sample.name.removeprefix("dagster_taskiq_"), frozenset(sample.labels.items())): (
                sample.value
            )
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        }

    def close(self) -> None:
        self.exporter.close()


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Iterator[Watched]:
    with closing(Watched(monkeypatch)) as it:
        yield it


def value(values: Values, name: str, **labels: str) -> float | None:
    return values.get((name, frozenset(labels.items())))


def test_a_scrape_has_all_metrics_of_the_table_and_no_others(watched: Watched) -> None:
    """With their types, labels and texts."""
    scene = watched.scene
    watched.do(
        scene.beat(worker()),
        scene.send(step("s")),
        scene.backend.add_history(HistoryBatch(counts={Counter("q", "steps", Counted.SENT): 1})),
    )
    _, text = get(watched.exporter, "/metrics")
    found = {}
    for family in text_string_to_metric_families(text):
        if not family.name.startswith("process_"):
            suffix = "_total" if family.type == "counter" else ""
            labels = {label for sample in family.samples for label in sample.labels}
            found[family.name + suffix] = (family.type, labels, family.documentation)
    assert found == {it.name: (it.type.value, {*it.labels}, it.text) for it in EXPORTER_METRICS}
    assert not [it for it in EXPORTER_METRICS if it.type is MetricType.HISTOGRAM]


def test_a_queue_without_a_worker_is_told(watched: Watched) -> None:
    """With what an autoscaler needs to start the first one."""
    scene = watched.scene
    sent_at = time.time() - 300
    watched.do(scene.send(*[step(f"s{n}", queue="far", sent_at=sent_at, state="") for n in "ab"]))
    values = watched.scrape()
    far = {"queue": "far", "kind": "steps"}
    assert value(values, "queue_depth", **far) == value(values, "queue_demand", **far) == 2
    assert value(values, "queue_missing_slots", **far) == 2
    assert value(values, "queue_stuck", **far) == 1
    assert value(values, "queue_workers", **far) == value(values, "queue_slots", **far) == 0
    assert value(values, "queue_oldest_age_seconds", **far) == pytest.approx(300, abs=30)
    assert value(values, "queue_depth", **STEPS) == 0  # one that was named
    assert value(values, "queue_oldest_age_seconds", **STEPS) == 0
    assert json.loads(get(watched.exporter, "/demand")[1]) == {
        "steps": {"dagster": 0, "far": 2},
        "runs": {"dagster": 0},
    }


def test_what_runs_and_what_waits_is_the_demand(watched: Watched) -> None:
    scene, me = watched.scene, worker()
    task = step("runs")
    watched.do(
        scene.open(),
        scene.beat(me, task),
        scene.claim(replace(task, run_id="run"), me),
        scene.send(step("waits"), RUN),
    )
    values = watched.scrape()
    assert value(values, "queue_running", **STEPS) == 1
    assert value(values, "queue_demand", **STEPS) == 2
    assert value(values, "queue_slots", **STEPS) == 2
    assert value(values, "queue_missing_slots", **STEPS) == 0
    assert value(values, "queue_demand", queue="dagster", kind="runs") == 1
    assert value(values, "tasks", state="running") == value(values, "runs") == 1
    assert value(values, "tasks", state="lost") == 0
    assert json.loads(get(watched.exporter, "/demand")[1])["steps"] == {"dagster": 2}


def test_a_paused_queue_wants_no_more_workers(watched: Watched) -> None:
    """They would take nothing; nor is somebody to be woken for it."""
    scene = watched.scene
    watched.do(
        scene.beat(worker()),
        scene.send(step("waits")),
        scene.backend.pause_queue(QueuePause("dagster", "", time.time(), "h")),
    )
    values = watched.scrape()
    assert value(values, "queue_depth", **STEPS) == value(values, "queue_paused", **STEPS) == 1
    for name in ("queue_demand", "queue_missing_slots", "queue_stuck"):
        assert value(values, name, **STEPS) == 0
    assert json.loads(get(watched.exporter, "/demand")[1])["steps"] == {"dagster": 0}


def test_workers_are_counted_by_their_states(watched: Watched) -> None:
    scene = watched.scene
    watched.do(
        scene.beat(worker("a@h", busy_slots=1)),
        scene.beat(worker("b@h", state="draining")),
        scene.beat(worker("c@h", state="no processes", slots=4)),
    )
    values = watched.scrape()
    for state in ("running", "draining", "no processes"):
        assert value(values, "workers", state=state) == 1
    assert value(values, "slots", kind="steps") == 8
    assert value(values, "busy_slots", kind="steps") == 1
    assert value(values, "slots", kind="runs") == 3
    # one that drains takes nothing more
    assert value(values, "queue_workers", **STEPS) == 2
    assert value(values, "queue_slots", **STEPS) == 6


def test_the_counters_of_the_history_are_told(watched: Watched) -> None:
    """Each queue of which anything is known has all of them, from zero on."""
    counts = {
        Counter("dagster", "steps", Counted.SENT): 7,
        Counter("dagster", "steps", Counted.LOST): 2,
        Counter("dagster", "steps", Counted.RETRIED): 1,
        Counter("dagster", "runs", Counted.SUCCEEDED): 3,
    }
    watched.do(watched.scene.backend.add_history(HistoryBatch(counts=counts)))
    values = watched.scrape()
    assert value(values, "tasks_sent_total", **STEPS) == 7
    assert value(values, "tasks_retried_total", **STEPS) == 1
    assert value(values, "tasks_ended_total", **STEPS, outcome="lost") == 2
    assert value(values, "tasks_ended_total", **STEPS, outcome="failed") == 0
    runs = {"queue": "dagster", "kind": "runs"}
    assert value(values, "tasks_ended_total", **runs, outcome="succeeded") == 3
    assert value(values, "tasks_sent_total", **runs) == 0


def test_what_a_blind_broker_cannot_tell_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    """RabbitMQ knows no ages; a 0 would say that nothing waits."""
    with closing(Watched(monkeypatch, is_searchable=False)) as watched:
        watched.do(watched.scene.send(step("s")))
        values = watched.scrape()
        assert value(values, "queue_depth", **STEPS) == 1
        assert value(values, "queue_oldest_age_seconds", **STEPS) is None


def test_queues_that_anybody_has_made_up_are_bounded(watched: Watched) -> None:
    """One that a worker listens to has its label, and the rest is summed."""
    scene = watched.scene
    made_up = [step("s", queue=f"made up {number}") for number in range(MOST_UNKNOWN + 20)]
    watched.do(
        scene.send(*made_up), scene.beat(replace(worker(), queues=("zzz",))), scene.send(step("s"))
    )
    values = watched.scrape()
    depths = {dict(labels)["queue"]: it for (name, labels), it in values.items()
              if name == "queue_depth" and ("kind", "steps") in labels}  # fmt: skip
    assert len(depths) == MOST_UNKNOWN + 2
    assert depths["dagster"] == 1
    assert depths["zzz"] == 0
    assert depths[OTHER] == 21
    assert value(values, "queue_stuck", queue=OTHER, kind="steps") == 21


# --- servers that are away ---


def test_a_broker_that_is_away_hides_its_queues_alone(
    watched: Watched, caplog: pytest.LogCaptureFixture
) -> None:
    """The scrape succeeds, what is unknown is missing and no 0, and the log says it once."""
    caplog.set_level(logging.INFO)
    watched.do(watched.scene.beat(worker()))
    watched.scene.queues.freeze()
    for _ in range(2):
        values = watched.scrape()
        assert value(values, "server_up", role="broker") == 0
        assert value(values, "server_up", role="backend") == 1
        assert value(values, "workers", state="running") == 1
        assert value(values, "queue_demand", **STEPS) is None
    status, text = get(watched.exporter, "/demand")
    assert status == 503
    assert text.strip() in caplog.text
    health, said = get(watched.exporter, "/health")
    assert health == 200
    assert text in said
    assert caplog.text.count("The metrics say so meanwhile.") == 1
    watched.scene.queues.thaw()
    assert value(watched.scrape(), "server_up", role="broker") == 1
    assert "The servers answer again." in caplog.text


def test_a_backend_that_is_away_hides_everything(watched: Watched) -> None:
    watched.do(watched.scene.beat(worker()))
    watched.scene.state.freeze()
    values = watched.scrape()
    assert value(values, "server_up", role="backend") == 0
    assert value(values, "server_up", role="broker") == 1
    for name in ("queue_depth", "workers", "tasks", "runs", "slots"):
        assert not [it for it, _ in values if it == name]
    assert value(values, "read_seconds") is not None


@pytest.mark.parametrize("part", ["product", "workers", "counts", "shutdown"])
def test_a_server_that_does_not_answer_ends_no_scrape(
    watched: Watched, part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prometheus would give the scrape up after 10 s, and know nothing of any server."""
    for name in ("_REACH_SECONDS", "_READ_SECONDS", "_SHUTDOWN_SECONDS"):
        monkeypatch.setattr(module, name, 0.2)

    async def hang(*_: object, **__: object) -> None:
        await asyncio.Event().wait()

    with monkeypatch.context() as hanging:
        hanging.setattr(MemoryBackend, part, hang)
        values = watched.scrape()
    assert value(values, "server_up", role="backend") == (part == "shutdown")
    assert value(watched.scrape(), "server_up", role="backend") == 1


@pytest.mark.parametrize("text", [None, "The file was removed."])
def test_servers_that_cannot_be_found_are_told_to_be_away(
    watched: Watched, text: str | None
) -> None:
    """An embedded server that rests, or settings that have gone bad meanwhile."""

    def find() -> Servers | None:
        if text is not None:
            raise ConfigError(text)
        return None

    watched.find = find
    values = watched.scrape()
    for role in ("broker", "backend"):
        assert value(values, "server_up", role=role) == 0
    said = text or "No process uses the embedded server"
    assert get(watched.exporter, "/demand")[0] == 503
    assert said in get(watched.exporter, "/demand")[1]


def test_a_reading_serves_all_who_ask_at_a_time(
    watched: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CACHE_SECONDS", 60.0)
    first = watched.scrape()
    assert (
        watched.scrape()["read_timestamp_seconds", frozenset()]
        == (first["read_timestamp_seconds", frozenset()])
    )
    get(watched.exporter, "/demand")
    assert len(watched.opened) == 1
    get(watched.exporter, "/health")  # asks no server at all
    assert len(watched.opened) == 1

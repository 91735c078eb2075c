"""The read model as metrics of the whole deployment."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from prometheus_client.metrics_core import Metric

from dagster_taskiq.messages.attempt_ends import Counted
from dagster_taskiq.messages.attempt_ends import Counter as HistoryCounter
from dagster_taskiq.messages.envelope import QueueKind
from dagster_taskiq.messages.worker_records import PAUSED, WorkerRecord
from dagster_taskiq.monitoring import definitions as the
from dagster_taskiq.monitoring.exposition import family
from dagster_taskiq.monitoring.queue_labels import QueueLabels
from dagster_taskiq.overview import Overview, QueueView, TaskStatus

#: What is counted of the end of a task.
_ENDED = (Counted.SUCCEEDED, Counted.FAILED, Counted.LOST, Counted.CANCELLED)

#: By the values of labels.
_Values = dict[tuple[str, ...], float]


@dataclass(frozen=True)
class Reading:
    """What was read at a time.

    Attributes:
        overview: queues, workers and runs only where the servers that have them answer.
        counts: of the backend's history; empty where it does not answer.
        read_at: seconds since the epoch.
        seconds: that it took.
        problem: why no server could be asked, a sentence; empty where they could.
    """

    overview: Overview
    counts: Mapping[HistoryCounter, int]
    read_at: float
    seconds: float
    problem: str = ""

    @property
    def has_backend(self) -> bool:
        """Whether the backend has answered."""
        return any("backend" in it.roles and not it.problem for it in self.overview.servers)

    @property
    def problems(self) -> list[str]:
        """What is wrong with the servers, in sentences."""
        said = (self.problem, *(server.problem for server in self.overview.servers))
        return [text for text in dict.fromkeys(said) if text]


def metrics_of(reading: Reading, queues: Iterable[str]) -> Iterator[Metric]:
    """All metrics, also those that have no values while a server is away.

    Args:
        queues: that always have their own labels.
    """
    overview, labels = reading.overview, QueueLabels(queues)
    yield from _servers(overview)
    yield from _queues(overview, labels)
    yield from _workers(overview.workers if reading.has_backend else None)
    yield from _tasks(overview, is_known=reading.has_backend)
    yield from _history(reading.counts, labels)
    yield family(the.READ_SECONDS, {(): reading.seconds})
    yield family(the.READ_AT, {(): reading.read_at})


def demand_of(overview: Overview, queues: Iterable[str]) -> dict[str, dict[str, int]]:
    """The demand of each queue by kind and name, see ``DEMAND``.

    Args:
        queues: that are told of both kinds whatever is known of them.
    """
    demand = {kind.value: dict.fromkeys(queues, 0) for kind in QueueKind}
    for view in overview.queues:
        demand[view.kind.value][view.name] = _demand(view)
    return demand


def _servers(overview: Overview) -> Iterator[Metric]:
    up: _Values = {("broker",): 0, ("backend",): 0}
    answers: _Values = {}
    infos: _Values = {}
    for server in overview.servers:
        for role in server.roles:
            up[role,] = not server.problem
            infos[role, server.product or "", server.address] = 1
            if server.seconds is not None:
                answers[role,] = server.seconds
    yield family(the.SERVER_UP, up)
    yield family(the.SERVER_ANSWER, answers)
    yield family(the.SERVER_INFO, infos)


def _queues(overview: Overview, labels: QueueLabels) -> Iterator[Metric]:
    sums: Counter[tuple[str, tuple[str, str]]] = Counter()
    oldest: _Values = {}
    # those that somebody listens to first, so that no name that anybody has made up is before them
    for view in sorted(overview.queues, key=lambda it: (not it.workers, -it.depth)):
        key = labels.of(view.name), view.kind.value
        for definition, value in _counts(view, overview.workers).items():
            sums[definition, key] += value
        if view.priorities is not None:
            age = max(0.0, time.time() - view.oldest_sent_at) if view.oldest_sent_at else 0.0
            oldest[key] = max(oldest.get(key, 0.0), age)
    for each in (
        the.DEPTH,
        the.RUNNING,
        the.DEMAND,
        the.QUEUE_SLOTS,
        the.MISSING_SLOTS,
        the.QUEUE_WORKERS,
        the.STUCK,
        the.PAUSED_QUEUE,
    ):
        yield family(each, {key: value for (name, key), value in sums.items() if name == each.name})
    yield family(the.OLDEST, oldest)


def _counts(view: QueueView, workers: Sequence[WorkerRecord]) -> Mapping[str, int]:
    slots = sum(_slots(it)[view.kind][0] for it in workers if it.name in view.workers)
    demand = _demand(view)
    return {
        the.DEPTH.name: view.depth,
        the.RUNNING.name: view.running,
        the.DEMAND.name: demand,
        the.QUEUE_SLOTS.name: slots,
        the.MISSING_SLOTS.name: max(0, demand - slots),
        the.QUEUE_WORKERS.name: len(view.workers),
        the.STUCK.name: int(view.is_stuck),
        the.PAUSED_QUEUE.name: int(view.pause is not None),
    }


def _demand(view: QueueView) -> int:
    """How many slots its tasks want; more workers would take nothing from a paused queue."""
    return view.running + (0 if view.pause else view.depth)


def _slots(worker: WorkerRecord) -> Mapping[QueueKind, tuple[int, int]]:
    """All and busy ones."""
    return {
        QueueKind.STEPS: (worker.slots, worker.busy_slots),
        QueueKind.RUNS: (worker.run_slots, worker.busy_run_slots),
    }


def _workers(workers: Sequence[WorkerRecord] | None) -> Iterator[Metric]:
    states: _Values = {}
    if workers is not None:
        states = {(state,): 0 for state in ("running", PAUSED, "draining")}
    slots: _Values = {}
    busy: _Values = {}
    for worker in workers or ():
        state = "outdated" if worker.is_outdated else worker.state
        states[state,] = states.get((state,), 0) + 1
    for kind in QueueKind if workers is not None else ():
        counts = [_slots(worker)[kind] for worker in workers or () if not worker.is_outdated]
        slots[kind.value,] = sum(it[0] for it in counts)
        busy[kind.value,] = sum(it[1] for it in counts)
    yield family(the.WORKERS, states)
    yield family(the.ALL_SLOTS, slots)
    yield family(the.ALL_BUSY_SLOTS, busy)


def _tasks(overview: Overview, *, is_known: bool) -> Iterator[Metric]:
    if not is_known:
        yield family(the.TASKS, {})
        yield family(the.RUNS, {})
        return
    claimed = [it for it in TaskStatus if it is not TaskStatus.WAITING]
    counts = Counter(task.status for run in overview.runs for task in run.tasks)
    yield family(the.TASKS, {(status.value,): counts[status] for status in claimed})
    yield family(the.RUNS, {(): len(overview.runs)})


def _history(counts: Mapping[HistoryCounter, int], labels: QueueLabels) -> Iterator[Metric]:
    """What runs have told of all tasks; each queue of which anything is known has all counters."""
    sent: Counter[tuple[str, ...]] = Counter()
    retried: Counter[tuple[str, ...]] = Counter()
    ended: Counter[tuple[str, ...]] = Counter()
    for counter, count in sorted(counts.items()):
        key = labels.of(counter.queue), counter.kind
        sent[key] += count if counter.what is Counted.SENT else 0
        retried[key] += count if counter.what is Counted.RETRIED else 0
        for outcome in _ENDED:
            labelled = (*key, outcome.value)
            ended[labelled] += count if counter.what is outcome else 0
    yield family(the.TASKS_SENT, sent)
    yield family(the.ALL_TASKS_ENDED, ended)
    yield family(the.ALL_TASKS_RETRIED, retried)

"""What stands at the top of the page: what needs somebody, the figures, the charts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from dagster_taskiq.dashboard.charts import Chart, Legend, line, nice_top
from dagster_taskiq.dashboard.looks import Look
from dagster_taskiq.dashboard.memory import Sample
from dagster_taskiq.dashboard.words import DASH, ago, count_of, duration
from dagster_taskiq.overview import TaskStatus


@dataclass(frozen=True)
class Alert:
    """What somebody should look at.

    Attributes:
        part: of the page that shows more of it.
    """

    tone: str
    title: str
    text: str
    part: str


def alerts(look: Look) -> list[Alert]:
    """What needs somebody, the worst first."""
    return sorted(_alerts(look), key=lambda it: it.tone != "bad")


def _alerts(look: Look) -> Iterator[Alert]:
    for server in look.overview.servers:
        if server.problem:
            role = " and ".join(server.roles)
            yield Alert("bad", f"The {role} is away", server.problem, "servers")
    if look.problem:
        yield Alert("bad", "The last look has failed", look.problem, "servers")
    if look.stale:
        what = "Queues are" if "workers" not in look.stale else "All below is"
        since = "not known" if look.seen_at is None else f"as seen {ago(look.seen_at, look.at)}"
        yield Alert("warn", "Not up to date", f"{what} {since}. The page goes on asking.", "queues")
    for queue in look.overview.queues:
        if queue.is_stuck:
            title = f"Queue {queue.name} is stuck"
            reason = queue.wait.reason if queue.wait else ""
            waiting = count_of(queue.depth, queue.kind.value.removesuffix("s"))
            yield Alert("bad", title, f"{waiting} waiting. {reason}", "queues")
    lost = [task for task in look.overview.tasks() if task.status is TaskStatus.LOST]
    if lost:
        title = f"{count_of(len(lost), 'task')} without a worker"
        text = "What executed them has not been heard of for a lease; their runs judge by the log."
        yield Alert("bad", title, text, "flight")
    yield from _worker_alerts(look)


def _worker_alerts(look: Look) -> Iterator[Alert]:
    names = {it.worker_id: it.name for it in look.overview.workers}
    for worker_id, seconds in look.news.silent_seconds.items():
        if worker_id in names and "workers" not in look.stale:
            title = f"{names[worker_id]} is silent"
            text = f"No heartbeat for {duration(seconds)}; after 30 s it is not listed any more."
            yield Alert("warn", title, text, "workers")
    for gone in look.news.gone:
        if gone.was_silent:
            text = f"Its heartbeats ended without a word, noticed {ago(gone.at, look.at)}."
            yield Alert("warn", f"{gone.record.name} was lost", text, "workers")
    if not look.overview.workers and not look.stale and look.overview.servers:
        yield Alert("warn", "No worker is running", "Nothing that is sent is executed.", "workers")


# --- figures ---


@dataclass(frozen=True)
class Figure:
    """One number.

    Attributes:
        share: of a whole, 0 to 1; None where it is no part of one.
    """

    name: str
    value: str
    aside: str
    tone: str = "calm"
    share: float | None = None


def figures(look: Look) -> list[Figure]:
    """The figures of the moment."""
    overview = look.overview
    alive = [it for it in overview.workers if not it.is_outdated]
    busy = sum(it.busy_slots for it in alive)
    slots = sum(it.slots for it in alive)
    draining = sum(it.state == "draining" for it in alive)
    depth = sum(it.depth for it in overview.queues)
    running = [it for run in overview.runs for it in run.tasks if it.status is TaskStatus.RUNNING]
    sent = [it.oldest_sent_at for it in overview.queues if it.oldest_sent_at is not None]
    stuck = any(it.is_stuck for it in overview.queues)
    oldest = f"oldest {duration(look.at - min(sent))}" if sent else "in all queues"
    return [
        Figure(
            "Workers",
            f"{len(alive):,}",
            f"{draining} draining" if draining else "alive",
            "calm" if alive else "warn",
        ),
        Figure(
            "Step slots",
            f"{busy:,}/{slots:,}",
            f"{slots - busy:,} free",
            "busy",
            busy / slots if slots else 0.0,
        ),
        Figure("Running", f"{len(running):,}", count_of(len(overview.runs), "run"), "calm"),
        Figure("Waiting", f"{depth:,}", oldest, "bad" if stuck else "calm"),
    ]


# --- charts ---


def sampled_charts(look: Look) -> list[Chart]:
    """The charts of what the page has seen itself."""
    return [_depth_chart(look), _slot_chart(look)]


def _depth_chart(look: Look) -> Chart:
    waiting = [(it.at, float(it.waiting)) for it in look.samples]
    running = [(it.at, float(it.running)) for it in look.samples]
    top = nice_top(max((value for _, value in [*waiting, *running]), default=1.0))
    last = look.samples[-1] if look.samples else None
    return Chart(
        "Waiting and running",
        f"{top:,.0f}",
        [
            Legend("waiting", _now(last, "waiting"), "warn"),
            Legend("running", _now(last, "running"), "busy"),
        ],
        lines=[line(waiting, look.at, top, "warn"), line(running, look.at, top, "busy")],
        note=_since(look.samples, look),
    )


def _slot_chart(look: Look) -> Chart:
    busy = [(it.at, float(it.busy)) for it in look.samples]
    slots = [(it.at, float(it.slots)) for it in look.samples]
    top = nice_top(max((value for _, value in slots), default=1.0))
    last = look.samples[-1] if look.samples else None
    return Chart(
        "Slots",
        f"{top:,.0f}",
        [
            Legend("busy", _now(last, "busy"), "busy"),
            Legend("all", _now(last, "slots"), "calm"),
        ],
        lines=[line(slots, look.at, top, "calm"), line(busy, look.at, top, "busy")],
        note=_since(look.samples, look),
    )


def _now(last: Sample | None, name: str) -> str:
    return DASH if last is None else f"{getattr(last, name):,}"


def _since(samples: Sequence[Sample], look: Look) -> str:
    if not samples:
        return "not looked yet"
    return f"sampled while somebody looks, first {ago(samples[0].at, look.at)}"

"""What stands at the top of the page: what needs somebody, the figures, the charts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from dagster_taskiq.dashboard.charts import (
    BARS,
    Chart,
    Legend,
    line,
    nice_seconds,
    nice_top,
    quantile,
    stacked_bars,
)
from dagster_taskiq.dashboard.ended import unknown_note, wait_seconds
from dagster_taskiq.dashboard.looks import Look
from dagster_taskiq.dashboard.memory import MEMORY_SECONDS, Sample
from dagster_taskiq.dashboard.words import DASH, ago, count_of, duration, short_duration
from dagster_taskiq.messages.attempt_ends import AttemptEnd, EndGroup
from dagster_taskiq.messages.worker_records import WorkerRecord
from dagster_taskiq.overview import TaskStatus

#: How many workers an alert names.
_MOST_NAMES = 3


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
    silent = [it for it in look.overview.workers if it.worker_id in look.silent_seconds]
    if silent and "workers" not in look.stale:
        seconds = max(look.silent_seconds[it.worker_id] for it in silent)
        text = f"No heartbeat for {duration(seconds)}; after 30 s a worker is not listed any more."
        yield Alert("warn", f"{_names(silent)} silent", text, "workers")
    # one that was started again under its name is not missed
    alive = {it.name for it in look.overview.workers}
    missed = {it.name: it for it in look.overview.lost_workers if it.name not in alive}
    if missed and "workers" not in look.stale:
        last = max(it.sent_at for it in missed.values())
        text = f"Heartbeats ended without a word, the last one {ago(last, look.at)}."
        yield Alert("warn", f"{_names(list(missed.values()))} lost", text, "workers")
    if not look.overview.workers and not look.stale and look.overview.servers:
        yield Alert("warn", "No worker is running", "Nothing that is sent is executed.", "workers")


def _names(records: Sequence[WorkerRecord]) -> str:
    """The subject of a sentence; names only the first ones of many."""
    if len(records) == 1:
        return f"Worker {records[0].name} is"
    more = len(records) - _MOST_NAMES
    names = ", ".join(it.name for it in records[:_MOST_NAMES])
    return f"{len(records)} workers ({names}{f' and {more} more' if more > 0 else ''}) are"


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
        _failures(look),
    ]


def _failures(look: Look) -> Figure:
    last_hour = [it for it in look.ends.all if look.at - it.ended_at <= MEMORY_SECONDS]
    final = sum(it.group is EndGroup.FAILED for it in last_hour)
    retried = sum(it.group is EndGroup.RETRIED for it in last_hour)
    aside = f"{retried:,} retried" if retried else "in the last hour"
    return Figure("Failed, last hour", f"{final:,}", aside, "bad" if final else "calm")


# --- charts ---


def hour_charts(look: Look) -> list[Chart]:
    """The charts of the last hour."""
    return [_depth_chart(look), _slot_chart(look), _rate_chart(look), _wait_chart(look)]


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


#: What the bars of ended attempts are made of, from the bottom.
_GROUPS = {
    EndGroup.FAILED: ("failed", "bad"),
    EndGroup.RETRIED: ("retried", "warn"),
    EndGroup.CANCELLED: ("cancelled", "calm"),
    EndGroup.SUCCEEDED: ("succeeded", "good"),
}


def _by_minute(look: Look) -> list[list[AttemptEnd]]:
    """The attempts that have ended in each minute of the last hour, the oldest minute first."""
    minutes: list[list[AttemptEnd]] = [[] for _ in range(BARS)]
    for end in look.ends.all:
        age = int((look.at - end.ended_at) // (MEMORY_SECONDS / BARS))
        if age < BARS:
            minutes[BARS - 1 - max(0, age)].append(end)
    return minutes


def _rate_chart(look: Look) -> Chart:
    counts = [Counter(it.group for it in minute) for minute in _by_minute(look)]
    columns = [[count[group] for group in _GROUPS] for count in counts]
    titles = [
        f"{BARS - number} min ago: "
        + (
            ", ".join(
                f"{count:,} {name}"
                for count, (name, _) in zip(column, _GROUPS.values(), strict=True)
                if count
            )
            or "none"
        )
        for number, column in enumerate(columns)
    ]
    top = nice_top(max(map(sum, columns)))
    sums = [sum(column[number] for column in columns) for number in range(len(_GROUPS))]
    tones = [tone for _, tone in _GROUPS.values()]
    legends = [
        Legend(name, f"{total:,}", tone)
        for total, (name, tone) in zip(sums, _GROUPS.values(), strict=True)
        if total or tone in ("bad", "good")
    ]
    return Chart(
        "Ended a minute",
        f"{top:,.0f}",
        legends,
        bars=stacked_bars(columns, tones, titles, top),
        note=unknown_note(look.ends, look.at),
    )


def _wait_chart(look: Look) -> Chart:
    half: list[tuple[float, float]] = []
    most: list[tuple[float, float]] = []
    everything: list[float] = []
    minute_seconds = MEMORY_SECONDS / BARS
    for number, minute in enumerate(_by_minute(look)):
        waits = [seconds for it in minute if (seconds := wait_seconds(it)) is not None]
        if waits:
            at = look.at - (BARS - number - 0.5) * minute_seconds
            half.append((at, quantile(waits, 0.5)))
            most.append((at, quantile(waits, 0.95)))
            everything += waits
    top = nice_seconds(max((seconds for _, seconds in most), default=1.0))
    values = [quantile(everything, share) if everything else None for share in (0.5, 0.95)]
    names = (("median", "busy"), ("95 %", "warn"))
    legends = [
        Legend(name, short_duration(value), tone)
        for value, (name, tone) in zip(values, names, strict=True)
    ]
    gap_seconds = 3 * minute_seconds
    lines = [
        line(most, look.at, top, "warn", gap_seconds),
        line(half, look.at, top, "busy", gap_seconds),
    ]
    return Chart(
        "Wait before a start",
        short_duration(top),
        legends,
        lines=lines,
        note=unknown_note(look.ends, look.at),
    )


def _now(last: Sample | None, name: str) -> str:
    return DASH if last is None else f"{getattr(last, name):,}"


def _since(samples: Sequence[Sample], look: Look) -> str:
    if not samples:
        return "not looked yet"
    return f"sampled while somebody looks, first {ago(samples[0].at, look.at)}"

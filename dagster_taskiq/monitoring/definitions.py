"""All metrics: names, types, labels and texts, of which docs/metrics.md is made.

What begins with ``dagster_taskiq_worker_`` is told by each worker of itself; everything else is
told by the exporter of the whole deployment, so that no sum counts anything twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum


class MetricType(str, Enum):
    """As Prometheus calls them."""

    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"


@dataclass(frozen=True)
class Definition:
    """One metric.

    Attributes:
        name: with its unit, and with ``_total`` where it is a counter.
        text: what it says, a sentence.
        labels: by which it is told apart.
        buckets: upper bounds of a histogram's.
    """

    name: str
    type: MetricType
    text: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()


def _counter(name: str, text: str, *labels: str) -> Definition:
    return Definition(f"dagster_taskiq_{name}", MetricType.COUNTER, text, labels)


def _gauge(name: str, text: str, *labels: str) -> Definition:
    return Definition(f"dagster_taskiq_{name}", MetricType.GAUGE, text, labels)


def _histogram(name: str, text: str, buckets: Sequence[float], *labels: str) -> Definition:
    return Definition(
        f"dagster_taskiq_{name}", MetricType.HISTOGRAM, text, labels, (*buckets, float("inf"))
    )


#: Buckets of times, from a no-op step to a day.
_TASK_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 15, 60, 300, 900, 3600, 14400, 43200, 86400)
_WAIT_SECONDS = (0.01, 0.05, 0.1, 0.5, 1, 5, 15, 60, 300, 900, 3600, 21600)
_CALL_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)

#: Buckets of sizes, from 1 KiB to the usual limit of a message.
_BYTES = tuple(2.0**power for power in range(10, 27, 2))

# --- of a worker ---

WORKER_INFO = _gauge(
    "worker_info", "Always 1; the labels say which worker it is.", "worker", "version"
)
WORKER_STATE = _gauge(
    "worker_state",
    "1 for the state that the worker is in: `starting`, or one of `worker list`.",
    "state",
)
SLOTS = _gauge("worker_slots", "Tasks of a kind that the worker can execute at once.", "kind")
BUSY_SLOTS = _gauge("worker_busy_slots", "Tasks of a kind that it has claimed now.", "kind")
TASKS_STARTED = _counter(
    "worker_tasks_started_total", "Tasks that were given to a process.", "queue", "kind"
)
TASKS_RETRIED = _counter(
    "worker_tasks_retried_total",
    "Those of them that are a later attempt of a step, or a run that is resumed.",
    "queue",
    "kind",
)
TASKS_ENDED = _counter(
    "worker_tasks_ended_total",
    "Tasks that have ended on the worker, whatever became of their results.",
    "queue",
    "kind",
    "outcome",
)
TASKS_STOPPED = _counter(
    "worker_tasks_stopped_total",
    "Those of them that the worker has stopped; `lease_lost` is a lost claim.",
    "queue",
    "kind",
    "reason",
)
TASKS_DROPPED = _counter(
    "worker_tasks_dropped_total",
    "Tasks that were taken and could not be claimed, for good.",
    "queue",
    "kind",
    "reason",
)
TASKS_GIVEN_BACK = _counter(
    "worker_tasks_given_back_total",
    "Times that a task went back to its queue, since its run has another backend.",
    "queue",
    "kind",
)
REFUSED = _counter(
    "worker_messages_refused_total",
    "What was not believed: a `message` of a queue, an `order`, or a `cancel`.",
    "what",
)
QUEUE_WAIT = _histogram(
    "worker_queue_wait_seconds",
    "From the sending of a task to its claim, by the clocks of two hosts; 0 where these say less.",
    _WAIT_SECONDS,
    "queue",
    "kind",
)
RUN_TIME = _histogram(
    "worker_task_seconds",
    "From a task's start in its process to its end, with the loading of code.",
    _TASK_SECONDS,
    "queue",
    "kind",
)
MESSAGE_SIZE = _histogram(
    "worker_message_bytes", "Payload of the tasks that were claimed.", _BYTES, "queue", "kind"
)
RESULT_SIZE = _histogram(
    "worker_result_bytes", "Results that were stored, as they are sent.", _BYTES, "queue", "kind"
)
CHILDREN = _gauge("worker_children", "Processes that wait for tasks or execute them.")
CHILDREN_MEMORY = _gauge(
    "worker_children_memory_bytes",
    "Resident memory of all of them, each with what it shares; without processes that steps start.",
)
WARM_CODE = _gauge(
    "worker_warm_code",
    "1 where processes find this code loaded, 0 where each of them loads it itself; the worker's "
    "log and `worker show` say why.",
    "code",
)
LARGEST_CHILD = _gauge("worker_largest_child_memory_bytes", "The same of the largest one.")
CHILDREN_REPLACED = _counter(
    "worker_children_replaced_total", "Processes that gave way to a fresh one.", "reason"
)
RENEWALS = _histogram(
    "worker_lease_renewal_seconds",
    "From a renewal of all claims of the worker to the backend's answer.",
    _CALL_SECONDS,
)
LEASE_LEFT = _gauge(
    "worker_lease_left_ratio",
    "The least that was left of a claim's lease in the last minute; 1 is all of it, 5/6 is usual, "
    "and below 1/3 steps are stopped.",
)
AWAY = _gauge(
    "worker_server_away",
    "Whether the `broker` cannot be listened to, or the `backend` does not renew claims.",
    "role",
)
OUTAGES = _counter("worker_server_outages_total", "How often that began.", "role")
LOOP_LAG = _gauge(
    "worker_event_loop_lag_seconds",
    "The longest that the event loop, which renews claims, was late in the last minute.",
)

WORKER_METRICS: tuple[Definition, ...] = (
    WORKER_INFO,
    WORKER_STATE,
    SLOTS,
    BUSY_SLOTS,
    TASKS_STARTED,
    TASKS_RETRIED,
    TASKS_ENDED,
    TASKS_STOPPED,
    TASKS_DROPPED,
    TASKS_GIVEN_BACK,
    REFUSED,
    QUEUE_WAIT,
    RUN_TIME,
    MESSAGE_SIZE,
    RESULT_SIZE,
    CHILDREN,
    CHILDREN_MEMORY,
    LARGEST_CHILD,
    WARM_CODE,
    CHILDREN_REPLACED,
    RENEWALS,
    LEASE_LEFT,
    AWAY,
    OUTAGES,
    LOOP_LAG,
)

# --- of the deployment ---

SERVER_UP = _gauge("server_up", "Whether the `broker`, or the `backend`, answers.", "role")
SERVER_ANSWER = _gauge(
    "server_answer_seconds", "How long its answer took, on an open connection.", "role"
)
SERVER_INFO = _gauge(
    "server_info", "Always 1; the labels say which server it is.", "role", "product", "address"
)
DEPTH = _gauge("queue_depth", "Tasks that wait in a queue.", "queue", "kind")
OLDEST = _gauge(
    "queue_oldest_age_seconds",
    "For how long the oldest of them has waited, by the clocks of two hosts; 0 where none waits. "
    "Missing on RabbitMQ, which cannot tell.",
    "queue",
    "kind",
)
RUNNING = _gauge(
    "queue_running",
    "Tasks of it that are executed, as workers have told it in their last heartbeats.",
    "queue",
    "kind",
)
DEMAND = _gauge(
    "queue_demand",
    "Those that wait and those that are executed; of a queue that is paused only the latter.",
    "queue",
    "kind",
)
QUEUE_SLOTS = _gauge(
    "queue_slots",
    "Slots of the workers that listen; one that listens to several queues counts for each.",
    "queue",
    "kind",
)
MISSING_SLOTS = _gauge(
    "queue_missing_slots", "By how many the demand is larger than the slots.", "queue", "kind"
)
QUEUE_WORKERS = _gauge("queue_workers", "Workers that listen to it.", "queue", "kind")
STUCK = _gauge(
    "queue_stuck",
    "Whether tasks wait that no worker will take as things are, and nobody has paused it.",
    "queue",
    "kind",
)
PAUSED_QUEUE = _gauge("queue_paused", "Whether it is paused for all workers.", "queue", "kind")
WORKERS = _gauge("workers", "Workers in the list of workers.", "state")
ALL_SLOTS = _gauge("slots", "Slots of all of them.", "kind")
ALL_BUSY_SLOTS = _gauge("busy_slots", "Those of the slots that have a task.", "kind")
TASKS = _gauge(
    "tasks",
    "Tasks that were claimed and are not over: `running`; `lost`, until the run has judged; "
    "`returned`, until the run sends it again.",
    "state",
)
RUNS = _gauge("runs", "Runs that the backend knows and that are not over.")
TASKS_SENT = _counter(
    "tasks_sent_total", "Tasks that were put into a queue, also a second time.", "queue", "kind"
)
ALL_TASKS_ENDED = _counter(
    "tasks_ended_total",
    "Tasks whose runs know how they have ended: `succeeded`, `failed`, `lost` or `cancelled`.",
    "queue",
    "kind",
    "outcome",
)
ALL_TASKS_RETRIED = _counter(
    "tasks_retried_total",
    "Those that have failed or were lost, and are tried again.",
    "queue",
    "kind",
)
READ_SECONDS = _gauge("read_seconds", "How long it took to read all this.")
READ_AT = _gauge("read_timestamp_seconds", "When it was read, in seconds since the epoch.")

EXPORTER_METRICS: tuple[Definition, ...] = (
    SERVER_UP,
    SERVER_ANSWER,
    SERVER_INFO,
    DEPTH,
    OLDEST,
    RUNNING,
    DEMAND,
    QUEUE_SLOTS,
    MISSING_SLOTS,
    QUEUE_WORKERS,
    STUCK,
    PAUSED_QUEUE,
    WORKERS,
    ALL_SLOTS,
    ALL_BUSY_SLOTS,
    TASKS,
    RUNS,
    TASKS_SENT,
    ALL_TASKS_ENDED,
    ALL_TASKS_RETRIED,
    READ_SECONDS,
    READ_AT,
)

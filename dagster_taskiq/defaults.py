"""All defaults, with their units."""

from __future__ import annotations

#: The queue of a step or run that names none. dagster-celery's name, so that tags keep working.
DEFAULT_QUEUE = "dagster"

#: Priority of a step that names none, and what a run adds to its steps' when it names none.
DEFAULT_STEP_PRIORITY = 5
DEFAULT_RUN_PRIORITY = 0

#: The range that run priority + step priority is clamped to. Ten is what RabbitMQ advises as the
#: largest useful ``x-max-priority``, and what dagster-celery declares.
MIN_PRIORITY = 0
MAX_PRIORITY = 10

#: Prefix of every key and physical queue of ours, so that nothing collides with a Celery queue of
#: the same name on the same server.
KEY_PREFIX = "dagster-taskiq"

#: How long a claim holds without renewal. A dead worker is noticed after at most this time.
LEASE_SECONDS = 30.0

#: The shortest lease that a loaded machine can be expected to renew in time.
MIN_LEASE_SECONDS = 1.0

#: The longest lease and the longest grace period: a worker refuses a task that asks for more.
LONGEST_SECONDS = 24 * 3600.0

#: A lease is renewed every sixth of its length, so that five renewals may fail without effect.
RENEWALS_PER_LEASE = 6

#: Share of the lease after which a worker that cannot renew interrupts its own steps, so that
#: their clean-up code still runs ...
INTERRUPT_AFTER_LEASE_SHARE = 4 / 6

#: ... also when its last try to renew has had no answer yet at this share ...
INTERRUPT_AT_LATEST_LEASE_SHARE = 9 / 12

#: ... and share after which the guard kills them. It must be below 1, since at 1 others may judge.
KILL_AFTER_LEASE_SHARE = 5 / 6

#: Time between SIGTERM and SIGKILL for a cancelled step.
CANCEL_GRACE_SECONDS = 30.0

#: The same, at most, for a step whose run is dead: nobody waits for it.
ORPHAN_GRACE_SECONDS = 5.0

#: The longest time limit of a step: thirty years, which every clock can count.
LONGEST_TIME_LIMIT_SECONDS = 1e9

#: How long the backend keeps a result that nobody has read. The event log is the record.
RESULT_EXPIRES_SECONDS = 24 * 3600

#: How long the record of a run's tasks outlives the last sign of its execution loop. A message
#: redelivered within this time is recognised as an old one.
RUN_RECORD_EXPIRES_SECONDS = 7 * 24 * 3600

#: The same for a run whose loop has come to its end. A message of it that is redelivered finds no
#: loop and is dropped. The record takes some 100 bytes for each attempt.
CLOSED_RECORD_EXPIRES_SECONDS = 3600

#: The longest task or result, in bytes: more is neither sent nor read.
MAX_MESSAGE_BYTES = 64 * 2**20

#: The same of an order and of a worker's record, which are a few hundred bytes.
MAX_CONTROL_BYTES = 64 * 2**10

#: How often the execution loop compares what it waits for with what broker and backend know.
RECONCILE_SECONDS = 3.0

#: How long a task may wait in a queue before the run's log says why, where there is a reason.
WAIT_REASON_SECONDS = 5.0

#: The same where nothing but the tasks before it is the reason: most wait for a moment.
TURN_REASON_SECONDS = 30.0

#: How long a new reason waits to be said after the first one; each time it is said twice as long as
#: before, up to the longest.
FIRST_NEWS_PAUSE_SECONDS = 10.0
LONGEST_NEWS_PAUSE_SECONDS = 640.0

#: How long a task waits while the only workers of its queue execute tasks of another version,
#: before it fails; also how long it goes from one worker to the next that gives it back. Long
#: enough for a rolling update, which may end the old workers first.
FOREIGN_WORKERS_SECONDS = 300.0

#: A worker that has a message in hand and was not heard of for this time is held to be dead.
IN_HAND_SECONDS = 15.0

#: How often a worker tells the backend that it lives, and how long that holds.
HEARTBEAT_SECONDS = 5.0
WORKER_EXPIRES_SECONDS = 30.0

#: How long a worker that was not heard of any more, and has not signed off, is listed as lost.
LOST_WORKER_SECONDS = 600.0

#: How old a signed order to a worker may be, and how far the clocks of two hosts may differ.
CONTROL_AGE_SECONDS = 300.0

#: How many ended attempts the backend keeps of each group (see ``EndGroup``), and for how long. One
#: takes some 600 bytes.
HISTORY_ENDS = 300
HISTORY_EXPIRES_SECONDS = 7 * 24 * 3600

#: How often a run or a worker adds to the history what has ended, at most.
HISTORY_SECONDS = 3.0

#: How often a run tells which steps it holds back, at most.
WITHHELD_SECONDS = 2.0

#: How often Dagster is asked who has the slots of a pool for which steps are held back.
POOL_LOOK_SECONDS = 15.0

#: How long to try to reach a server before the error is reported.
CONNECT_TIMEOUT_SECONDS = 5.0

#: How long what begins waits for a server that is away.
SERVER_PATIENCE_SECONDS = 300.0

#: How long a drained worker waits for its running steps before it cancels them.
DRAIN_TIMEOUT_SECONDS = 3600.0

#: Name of the environment variables that configure what the YAML leaves out.
BROKER_URL_VARIABLE = "DAGSTER_TASKIQ_BROKER_URL"
BROKER_HOST_VARIABLES = ("DAGSTER_TASKIQ_BROKER_HOST", "DAGSTER_CELERY_BROKER_HOST")
BACKEND_URL_VARIABLE = "DAGSTER_TASKIQ_BACKEND_URL"
SIGNING_KEY_VARIABLE = "DAGSTER_TASKIQ_SIGNING_KEY"
DASHBOARD_URL_VARIABLE = "DAGSTER_TASKIQ_DASHBOARD_URL"

#: Joins the loop's event that a step was sent with the worker's that it took it: the UI shows the
#: time between the two as the wait in the queue.
QUEUE_WAIT_MARKER = "taskiq_queue_wait"

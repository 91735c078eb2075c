"""The tags people write on steps and runs, and how they are read.

Our tags come first; dagster-celery's are fallbacks, so that an existing code base runs unchanged.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from dagster_taskiq.defaults import (
    DEFAULT_RUN_PRIORITY,
    LONGEST_TIME_LIMIT_SECONDS,
    MAX_PRIORITY,
    MIN_PRIORITY,
)
from dagster_taskiq.errors import TagError
from dagster_taskiq.messages.time_limits import TimeLimits

QUEUE_TAG = "dagster-taskiq/queue"
PRIORITY_TAG = "dagster-taskiq/priority"
RUN_PRIORITY_TAG = "dagster-taskiq/run_priority"
SOFT_TIMEOUT_TAG = "dagster-taskiq/soft_timeout_seconds"
TIMEOUT_TAG = "dagster-taskiq/timeout_seconds"

#: On a launched run: the task of its present process. The UI hides tags that begin like this, since
#: it would fill each row of the page of runs.
TASK_ID_TAG = ".dagster/taskiq_task_id"

# the same under names like dagster-celery's, for code that imports those
DAGSTER_TASKIQ_QUEUE_TAG = QUEUE_TAG
DAGSTER_TASKIQ_STEP_PRIORITY_TAG = PRIORITY_TAG
DAGSTER_TASKIQ_RUN_PRIORITY_TAG = RUN_PRIORITY_TAG
DAGSTER_TASKIQ_TASK_ID_TAG = TASK_ID_TAG

CELERY_QUEUE_TAG = "dagster-celery/queue"
CELERY_PRIORITY_TAG = "dagster-celery/priority"
CELERY_RUN_PRIORITY_TAG = "dagster-celery/run_priority"

#: Dagster's own priority tag. It orders the run queue and the in-process executors; it does not
#: set the priority of a task, as it does not in dagster-celery.
DAGSTER_PRIORITY_TAG = "dagster/priority"


def step_queue(
    step_tags: Mapping[str, str], run_tags: Mapping[str, str], default_queue: str
) -> str:
    """The queue of a step: its own tag, else the run's, else the default.

    ``dagster-celery/queue`` on a run is not looked at: there it routes only the run itself.
    """
    return (
        _queue(step_tags, QUEUE_TAG)
        or _queue(step_tags, CELERY_QUEUE_TAG)
        or _queue(run_tags, QUEUE_TAG)
        or default_queue
    )


def run_queue(run_tags: Mapping[str, str], default_queue: str) -> str:
    """The queue of a whole run: its tag, else the default."""
    return _queue(run_tags, QUEUE_TAG) or _queue(run_tags, CELERY_QUEUE_TAG) or default_queue


def run_priority(run_tags: Mapping[str, str]) -> int:
    """What the run adds to the priority of each of its steps; not clamped.

    Raises:
        TagError: the tag is not an integer.
    """
    for tag in (RUN_PRIORITY_TAG, CELERY_RUN_PRIORITY_TAG):
        if tag in run_tags:
            return _integer(tag, run_tags[tag])
    return DEFAULT_RUN_PRIORITY


def step_priority(step_tags: Mapping[str, str], default_priority: int) -> int:
    """The step's own part of its priority; not clamped.

    Raises:
        TagError: the tag is not an integer.
    """
    for tag in (PRIORITY_TAG, CELERY_PRIORITY_TAG):
        if tag in step_tags:
            return _integer(tag, step_tags[tag])
    return default_priority


def task_priority(
    step_tags: Mapping[str, str], run_tags: Mapping[str, str], default_priority: int
) -> int:
    """The priority a step's task is sent with: run + step, clamped to 0..10, higher first."""
    return clamp_priority(run_priority(run_tags) + step_priority(step_tags, default_priority))


def clamp_priority(priority: int) -> int:
    """The nearest priority that every broker knows."""
    return max(MIN_PRIORITY, min(MAX_PRIORITY, priority))


def step_time_limits(step_tags: Mapping[str, str]) -> TimeLimits:
    """How long an attempt of the step may take, where its tags say it.

    Raises:
        TagError: a tag is not a number of seconds.
    """
    return TimeLimits(_seconds(step_tags, SOFT_TIMEOUT_TAG), _seconds(step_tags, TIMEOUT_TAG))


def has_misleading_priority(step_tags: Mapping[str, str]) -> bool:
    """Whether a step carries Dagster's own priority tag but none that counts here."""
    return DAGSTER_PRIORITY_TAG in step_tags and not (
        PRIORITY_TAG in step_tags or CELERY_PRIORITY_TAG in step_tags
    )


def _queue(tags: Mapping[str, str], tag: str) -> str | None:
    if tag not in tags:
        return None
    name = tags[tag].strip()
    if not name:
        raise TagError(tag, tags[tag], "the name of a queue")
    return name


def _integer(tag: str, value: str) -> int:
    try:
        return int(value)
    except ValueError:
        raise TagError(tag, value, "an integer") from None


def _seconds(tags: Mapping[str, str], tag: str) -> float | None:
    if tag not in tags:
        return None
    try:
        seconds = float(tags[tag])
    except ValueError:
        seconds = math.nan
    if not 0 <= seconds <= LONGEST_TIME_LIMIT_SECONDS:
        raise TagError(tag, tags[tag], "a number of seconds, 0 for no limit")
    return seconds

"""What workers, queues and runs do now: one read model, for everything that shows it.

It is read from the contracts of backend and broker, so it is the same for every kind of server. The
backend is the truth about who executes what; the workers' own words add what people want to know of
it, and may be some seconds old. Nothing here changes anything on a server.

A dash in a listing is a ``None`` here: the server cannot tell.
"""

from __future__ import annotations

from dagster_taskiq.messages.worker_records import is_named
from dagster_taskiq.overview.reading import (
    MOST_WAITING,
    reach_servers,
    read_backend,
    read_overview,
)
from dagster_taskiq.overview.views import (
    Overview,
    QueueView,
    RunView,
    ServerView,
    TaskStatus,
    TaskView,
)

__all__ = [
    "MOST_WAITING",
    "Overview",
    "QueueView",
    "RunView",
    "ServerView",
    "TaskStatus",
    "TaskView",
    "is_named",
    "reach_servers",
    "read_backend",
    "read_overview",
]

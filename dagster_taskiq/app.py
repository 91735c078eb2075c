"""A Taskiq broker for tools that want one by name: ``dagster_taskiq.app:broker``.

It is made of the same environment variables as everything else, when it is first asked for, and
only sends and looks: workers are started with ``dagster-taskiq worker start``, since Taskiq's own
worker knows neither claims nor slots. It may be named on the command line, as in dagster-celery
(``-A dagster_taskiq.app``), which changes nothing.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from dagster_taskiq.brokers import TaskBroker, open_broker
from dagster_taskiq.config.settings import Settings
from dagster_taskiq.connections import find_servers


@lru_cache(maxsize=1)
def _broker() -> TaskBroker:
    return open_broker(find_servers(Settings.from_config({})).broker)


def __getattr__(name: str) -> Any:
    if name == "broker":
        return _broker()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

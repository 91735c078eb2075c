"""How commands get at the parts that need an optional extra."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any

from dagster_taskiq.errors import ConfigError
from dagster_taskiq.worker.options import WorkerOptions

if TYPE_CHECKING:
    from dagster_taskiq.monitoring.worker_pages import WorkerPages

#: Listened on where no host is named, so that only who asks for it opens a port to others.
DEFAULT_HOST = "127.0.0.1"

#: Package of the extra ``metrics``.
_LIBRARY = "prometheus_client"


def load_metrics(name: str) -> Any:
    """A part of ``monitoring``, by ``module:name``.

    Raises:
        ConfigError: the extra ``metrics`` is not installed.
    """
    try:
        return resolve_name(f"dagster_taskiq.monitoring.{name}")
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != _LIBRARY:
            raise
        raise ConfigError(
            "Metrics need a package that is not here (prometheus-client): "
            "pip install 'dagster-taskiq[metrics]'."
        ) from error


@contextmanager
def worker_pages(
    host: str, port: int | None, options: WorkerOptions
) -> Iterator[WorkerPages | None]:
    """The pages of a worker that is about to start; None where it has no port for them.

    Raises:
        ConfigError: the port cannot be had, or the extra is not installed.
    """
    if port is None:
        yield None
        return
    pages: WorkerPages = load_metrics("worker_pages:WorkerPages")(host, port, options)
    try:
        yield pages
    finally:
        pages.close()

"""What a worker serves with ``--metrics-port``: its metrics and its health."""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable
from http import HTTPStatus

from dagster_taskiq.monitoring.exposition import metrics_page
from dagster_taskiq.monitoring.health import Cause, WorkerHealth
from dagster_taskiq.monitoring.pages import Page, PageServer, lines
from dagster_taskiq.monitoring.worker_metrics import Seen, WorkerMetrics
from dagster_taskiq.worker.observer import Observers, WorkerObserver
from dagster_taskiq.worker.options import WorkerOptions
from dagster_taskiq.worker.worker import Worker

logger = logging.getLogger(__name__)


class WorkerPages:
    """Serves ``/metrics``, ``/health`` and ``/live`` of one worker, from before it is made.

    Args:
        host, port: see ``PageServer``.
        options: of the worker.

    Raises:
        ConfigError: nothing can listen there.
    """

    def __init__(self, host: str, port: int, options: WorkerOptions) -> None:
        self._health = WorkerHealth()
        name = f"{options.name}@{socket.gethostname()}"
        self._metrics = WorkerMetrics(name, options, self._health)
        self._server = PageServer(
            host,
            port,
            {
                "/metrics": metrics_page(self._metrics.registry),
                "/health": self._health_page,
                "/live": self._live_page,
            },
        )
        self._server.start()
        logger.info("Metrics are on %s/metrics, and health on /health.", self.url)

    @property
    def url(self) -> str:
        """Without a path."""
        return self._server.url

    @property
    def observer(self) -> WorkerObserver:
        """For the worker."""
        return Observers(self._metrics, self._health)

    def watch(self, worker: Worker) -> None:
        """Look at a worker and the running event loop, which is its own."""
        self._metrics.seen = Seen(
            lambda: worker.state if self._health.is_ready else "starting",
            lambda: worker.slots,
            lambda: worker.child_pids,
            lambda: worker.code_states,
        )
        self._health.loop_watch.start()

    def ready(self) -> None:
        """The worker takes tasks."""
        self._health.ready()

    def unwatch(self) -> None:
        """The worker has ended."""
        self._health.loop_watch.stop()

    def close(self) -> None:
        """Serve no more."""
        self._server.close()

    def _health_page(self, _accept: str) -> Page:
        return self._page(lambda _: True)

    def _live_page(self, _accept: str) -> Page:
        return self._page(lambda cause: cause.is_mended_by_restart)

    def _page(self, counts: Callable[[Cause], bool]) -> Page:
        state = self._metrics.seen.state()
        causes = [cause.text for cause in self._health.causes(state) if counts(cause)]
        status = HTTPStatus.SERVICE_UNAVAILABLE if causes else HTTPStatus.OK
        return Page(lines(causes or [self._health.note(state)]), status)

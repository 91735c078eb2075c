"""How long a run bears servers that are away or refuse, and what its log says of it."""

from __future__ import annotations

from collections.abc import Iterator

from dagster import DagsterEvent

from dagster_taskiq._dagster.names import EngineEventData
from dagster_taskiq.errors import ServerError
from dagster_taskiq.loop.flights import LoopRun
from dagster_taskiq.servers.patience import Patience


class Outages:
    """The outages of the servers of one run.

    Args:
        run: whose log says once that a server is away; while it stops, every outage is borne.
        patience: how long one is borne.
    """

    def __init__(self, run: LoopRun, patience: Patience) -> None:
        self._context = run.context
        self._flights = run.flights
        self._patience = patience

    def note(self, what: str, error: ServerError) -> Iterator[DagsterEvent]:
        """Note that something has failed.

        Args:
            what: was tried. Its success is what ends the outage.

        Raises:
            ServerError: it is of no use to wait for the server, or was not for the whole time.
        """
        try:
            is_new = self._patience.note(what, error)
        except ServerError:
            if not self._flights.is_stopping:
                raise
            is_new = False  # a stop is told until it is heard or its deadline is over
        if is_new:
            yield DagsterEvent.engine_event(
                self._context, f"{error} The run goes on when it is back.", EngineEventData()
            )

    def over(self, what: str) -> None:
        """Note that something has worked."""
        self._patience.worked(what)

    @property
    def is_waiting(self) -> bool:
        """Whether a server is away, and waited for."""
        return self._patience.is_waiting

"""Why steps wait, in the run's log: an event for each change of reason, one for many steps."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence

from dagster import DagsterEvent

from dagster_taskiq._dagster.names import ActiveExecution, EngineEventData
from dagster_taskiq._dagster.replay import steps_by_pool, withheld_steps
from dagster_taskiq.config.settings import Settings
from dagster_taskiq.loop.dispatcher import Inspection
from dagster_taskiq.loop.flights import Flight, LoopRun
from dagster_taskiq.loop.holding import Holding
from dagster_taskiq.messages.queue_looks import named, queue_metadata, task_metadata
from dagster_taskiq.messages.queue_waits import Listeners, QueueWait, WaitHistory, WaitKind

#: Of more steps that wait in one queue for one reason, one event tells.
_MOST_SINGLE = 5

#: The most places in a queue that are asked for at once.
_MOST_PLACES = 20


class Waiting:
    """Tells in the log of one run why its steps wait.

    Args:
        run: see ``LoopRun``.
        active: knows which steps the run's limits and Dagster's pools hold back.
        settings: the limits.
    """

    def __init__(self, run: LoopRun, active: ActiveExecution, settings: Settings) -> None:
        self._run = run
        self._context = run.context
        self._dispatcher = run.dispatcher
        self._active = active
        self._holding = Holding(run, settings)
        #: What is to be told, by queue and kind of reason.
        self._news: dict[tuple[str, WaitKind], list[tuple[Flight, QueueWait]]] = {}
        #: Of steps that are ready and not sent, by the name of the pool that is full; empty for
        #: the run's own limits: what was told of them, and since when there are any.
        self._histories: dict[str, WaitHistory] = defaultdict(WaitHistory)
        self._since: dict[str, float] = {}

    # --- in a queue ---

    def note(self, flight: Flight, inspection: Inspection) -> None:
        """A task waits in its queue."""
        now, queue = self._run.now(), flight.task.queue
        wait, listeners = inspection.waits.get(queue), inspection.listeners.get(queue)
        news = flight.waits.news(wait, now - flight.sent_at, now, listeners)
        if news is not None:
            self._news.setdefault((queue, news.kind), []).append((flight, news))

    def tell(self, inspection: Inspection) -> Iterator[DagsterEvent]:
        """Tell what was noted.

        Raises:
            ServerError: the connection is not open.
        """
        news, self._news = self._news, {}
        for (queue, _), waiting in news.items():
            flights, wait = [flight for flight, _ in waiting], waiting[0][1]
            flights.sort(key=lambda it: -it.task.priority)
            yield from self._tell_of(queue, wait, flights, inspection.listeners.get(queue))

    def _tell_of(
        self, queue: str, wait: QueueWait, flights: Sequence[Flight], listeners: Listeners | None
    ) -> Iterator[DagsterEvent]:
        look = self._dispatcher.look_into(queue, [it.task for it in flights[:_MOST_PLACES]])
        known = queue_metadata(queue, wait, look, listeners)
        if len(flights) > _MOST_SINGLE:
            keys = [flight.step.key for flight in flights]
            # the first of them may have been taken meanwhile
            first = min(
                flights[:_MOST_PLACES], key=lambda it: look.places.get(it.task_id, math.inf)
            )
            place = look.sentence(first.task_id, first.step.key)
            yield DagsterEvent.engine_event(
                self._context,
                f'{len(keys)} steps wait in queue "{queue}". {wait.reason} {place}'.rstrip(),
                EngineEventData(metadata={**known, "steps": named(keys)}),
            )
            return
        for flight in flights:
            task = flight.task
            text = f'Step "{task.step_key}" waits. {wait.reason} {look.sentence(task.task_id)}'
            yield DagsterEvent.engine_event(
                self._context.for_step(flight.step),
                text.rstrip(),
                EngineEventData(
                    metadata={**known, **task_metadata(task.task_id, task.priority, look)}
                ),
            )

    # --- before the queue ---

    def tell_of_withheld(self) -> Iterator[DagsterEvent]:
        """Tell of steps that are ready and that limits keep from being sent."""
        now, found = self._run.now(), steps_by_pool(self._active)
        if keys := withheld_steps(self._active):
            found[""] = keys
        self._holding.note(found)
        self._since = {pool: self._since.get(pool, now) for pool in found}
        for pool in found.keys() | self._histories.keys():
            wait = QueueWait(WaitKind.LIMITED, "") if pool in found else None
            waited_seconds = now - self._since.get(pool, now)
            if self._histories[pool].news(wait, waited_seconds, now):
                yield self._event_of_withheld(pool, found[pool])

    def _event_of_withheld(self, pool: str, keys: Sequence[str]) -> DagsterEvent:
        count = len(keys)
        verb = "1 step is ready and waits" if count == 1 else f"{count} steps are ready and wait"
        return DagsterEvent.engine_event(
            self._context,
            f"{verb}. {self._holding.reason(pool)}",
            EngineEventData(
                metadata={"reason": WaitKind.LIMITED.value, "steps": named(sorted(keys))}
            ),
        )

    def forget_withheld(self) -> None:
        """No step is held back any more: the run stops."""
        self._holding.note({})

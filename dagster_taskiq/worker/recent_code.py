"""The code that a worker's queues have had tasks of lately, loaded before the next task comes.

So a worker that is started anew, for a deployment or beside others, is as warm as the one before.
The history in the backend names the runs, and Dagster says where their code is. What cannot be
found out is loaded with the first task of it, as any other code.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Collection, Iterable, Sequence

from dagster_taskiq.backend.history import HistoryBackend
from dagster_taskiq.errors import ServerError
from dagster_taskiq.messages.attempt_ends import AttemptEnd
from dagster_taskiq.messages.queue_names import QueueKind
from dagster_taskiq.worker.run_watch import RunWatch
from dagster_taskiq.worker.templates import Templates

logger = logging.getLogger(__name__)

#: How old an execution may be, so that what runs every day counts.
RECENT_SECONDS = 25 * 3600.0

#: The most runs that Dagster is asked for. The code of most is the same.
_MOST_RUNS = 100


class RecentCode:
    """Loads what was executed lately.

    Args:
        history: of the attempts that have ended.
        templates: which load it.
        watch: of its own, which asks Dagster.
    """

    def __init__(self, history: HistoryBackend, templates: Templates, watch: RunWatch) -> None:
        self._history = history
        self._templates = templates
        self._watch = watch

    async def run(self, kinds: Iterable[QueueKind], queues: Sequence[str]) -> None:
        """Load the code of recent tasks once, that of the last one first; until cancelled.

        Args:
            kinds: of the tasks.
            queues: from which they came, as people name them.
        """
        try:
            await self._load({kind.value for kind in kinds}, queues)
            await asyncio.Event().wait()  # a background task that ends has failed
        finally:
            await self._watch.stop()

    async def _load(self, kinds: Collection[str], queues: Sequence[str]) -> None:
        try:
            ends = await self._history.ended()
        except ServerError as error:
            logger.info("What was executed lately is not known: %s", error)
            return
        served = [it for it in ends if it.kind in kinds and it.queue in queues]
        run_ids = recent_runs(served, time.time())
        if run_ids:
            # one after the other, so that tasks that come meanwhile have the other processors
            for location, payload in (await self._watch.find_code(run_ids)).items():
                await self._templates.load_ahead(location, payload)


def recent_runs(ends: Iterable[AttemptEnd], now: float) -> list[str]:
    """The runs that name the code of recent tasks, the last one first; one run a job is enough.

    Args:
        ends: the last one first.
        now: seconds since the epoch.
    """
    newest: dict[str, str] = {}
    for end in ends:
        if now - end.ended_at <= RECENT_SECONDS:
            # who reports the end of a whole run may not know its job
            newest.setdefault(end.job or end.run_id, end.run_id)
    return list(dict.fromkeys(newest.values()))[:_MOST_RUNS]

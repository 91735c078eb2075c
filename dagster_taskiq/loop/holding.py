"""What a run holds back: steps that are ready and not sent, by what holds them, and why."""

from __future__ import annotations

import heapq
import logging
import time
from collections.abc import Collection, Mapping

from dagster_taskiq._dagster.replay import pool_holders
from dagster_taskiq.config.settings import Settings
from dagster_taskiq.defaults import POOL_LOOK_SECONDS
from dagster_taskiq.loop.flights import LoopRun
from dagster_taskiq.messages.plain_text import plain_name, plain_sentence
from dagster_taskiq.messages.queue_looks import named
from dagster_taskiq.messages.withheld_steps import MOST_WITHHELD, Withheld, WithheldGroup

logger = logging.getLogger(__name__)


class Holding:
    """Knows why one run holds steps back, and notes it for people.

    Args:
        run: see ``LoopRun``.
        settings: the limits.
    """

    def __init__(self, run: LoopRun, settings: Settings) -> None:
        self._run = run
        self._settings = settings
        #: By step, since when it is held back, in seconds since the epoch.
        self._since: dict[str, float] = {}
        #: By pool, the reason, and when Dagster is asked for the next one, by the run's clock.
        self._looks: dict[str, tuple[str, float]] = {}

    def reason(self, pool: str) -> str:
        """Why steps are held back, a sentence; of a pool who had its slots some seconds ago.

        Args:
            pool: of Dagster; empty for the run's own limits.
        """
        if not pool:
            return self._limit()
        now = self._run.now()
        reason, due_at = self._looks.get(pool, ("", now))
        if now >= due_at:
            reason = self._ask(pool)
            self._looks[pool] = reason, now + POOL_LOOK_SECONDS
        return reason

    def note(self, found: Mapping[str, Collection[str]]) -> None:
        """Note what is held back now.

        Args:
            found: the keys of the steps by the pool that holds them; empty for the run's limits.
        """
        now = time.time()
        self._since = {it: self._since.get(it, now) for keys in found.values() for it in keys}
        self._looks = {pool: look for pool, look in self._looks.items() if pool in found}
        groups, left = [], MOST_WITHHELD
        for pool in sorted(found):
            if not left:
                break
            first = heapq.nsmallest(left, ((self._since[it], it) for it in found[pool]))
            left -= len(first)
            steps = tuple((key, since) for since, key in first)
            groups.append(WithheldGroup(pool, self.reason(pool), steps))
        more = sum(map(len, found.values())) - (MOST_WITHHELD - left)
        self._run.dispatcher.note_withheld(Withheld(tuple(groups), more))

    def _ask(self, pool: str) -> str:
        """Who has a pool's slots now, as far as Dagster's database tells."""
        try:
            limit, holders = pool_holders(self._run.context.instance, pool)
        except Exception as error:  # it is for people, and no reason to fail a run
            problem = plain_sentence(str(error))
            logger.warning("Who has the slots of pool %r is not known: %s", pool, problem)
            return f'Slots of pool "{pool}" are taken.'
        who = named([plain_name(f"{step} of run {run_id}") for run_id, step in holders])
        return f'Slots of pool "{pool}": {len(holders)} of {limit} are taken, by {who}.'

    def _limit(self) -> str:
        # some may have ended since, and what they have made room for was not looked at yet
        count, limit = self._run.flights.count_when_taken, self._settings.max_concurrent
        if limit is not None and count >= limit:
            verb = "1 step is" if count == 1 else f"{count} steps are"
            return f"max_concurrent is {limit}, and {verb} queued or running."
        return "tag_concurrency_limits are reached by steps that are queued or running."

"""What a run holds back: steps that are ready and not sent, by what holds them, and why."""

from __future__ import annotations

import heapq
import time
from collections.abc import Collection, Mapping

from dagster_taskiq._dagster.replay import pool_holders
from dagster_taskiq.config.settings import Settings
from dagster_taskiq.defaults import POOL_LOOK_SECONDS
from dagster_taskiq.loop.flights import LoopRun
from dagster_taskiq.messages.queue_looks import named
from dagster_taskiq.messages.withheld_steps import MOST_WITHHELD, Withheld, WithheldGroup


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
        #: By pool, who had its slots, and when the next look is due, by the run's clock.
        self._looks: dict[str, tuple[str, float]] = {}

    def reason(self, pool: str) -> str:
        """Why steps are held back now, a sentence.

        Args:
            pool: of Dagster, which is asked for those who have its slots; empty for the run's own
                limits.
        """
        if not pool:
            return self._limit()
        limit, holders = pool_holders(self._run.context.instance, pool)
        who = named([f"{step} of run {run_id}" for run_id, step in holders])
        return f'Slots of pool "{pool}": {len(holders)} of {limit} are taken, by {who}.'

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
            groups.append(WithheldGroup(pool, self._recent_reason(pool), steps))
        more = sum(map(len, found.values())) - (MOST_WITHHELD - left)
        self._run.dispatcher.note_withheld(Withheld(tuple(groups), more))

    def _recent_reason(self, pool: str) -> str:
        """The same, of some seconds ago where Dagster's database would have to be asked."""
        now = self._run.now()
        reason, due_at = self._looks.get(pool, ("", now))
        if not pool or now >= due_at:
            reason = self.reason(pool)
            self._looks[pool] = reason, now + POOL_LOOK_SECONDS
        return reason

    def _limit(self) -> str:
        count, limit = len(self._run.flights), self._settings.max_concurrent
        if limit is not None and count >= limit:
            verb = "1 step is" if count == 1 else f"{count} steps are"
            return f"max_concurrent is {limit}, and {verb} queued or running."
        return "tag_concurrency_limits are reached by steps that are queued or running."

"""The slots of a station: which one gets a task, and what happens where no process comes up."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence

from dagster_taskiq.errors import NoProcessError, SlotError
from dagster_taskiq.worker.slot_base import Slot

logger = logging.getLogger(__name__)

#: Pause before another try to start a child where none can be started.
_SHORTAGE_SECONDS = 1.0


class SlotPool:
    """Hands out idle slots.

    Args:
        slots: not yet prepared.
        what: they execute, in words.
    """

    def __init__(self, slots: Sequence[Slot], what: str) -> None:
        self._slots = list(slots)
        self._what = what
        #: The last used one last.
        self._idle = list(reversed(slots))
        #: Those for which no process could be started.
        self._lacking: set[Slot] = set()

    def __len__(self) -> int:
        return len(self._slots)

    @property
    def is_short(self) -> bool:
        """Whether processes are missing that could not be started."""
        return bool(self._lacking)

    async def start(self) -> None:
        """Warm all slots.

        Raises:
            SlotError: a child cannot be started.
        """
        outcomes = await asyncio.gather(
            *(slot.prepare() for slot in self._slots), return_exceptions=True
        )
        for outcome in outcomes:
            if outcome is not None:
                raise outcome

    async def stop(self) -> None:
        """Kill what still runs."""
        for slot in self._slots:
            await slot.stop()

    async def reload(self) -> None:
        """Give every slot a fresh child: at once where it is idle, else after its task."""
        for slot in self._slots:
            slot.retire()
        await asyncio.gather(*(self._warm(slot) for slot in list(self._idle)))

    @property
    def numbers(self) -> set[int]:
        """Of the slots."""
        return {slot.number for slot in self._slots}

    async def add(self, slot: Slot) -> None:
        """Have one more slot, which is warm then."""
        self._slots.append(slot)
        await self._warm(slot)
        self._idle.append(slot)

    async def remove(self) -> None:
        """Give up the idle slot that was not used for the longest time; there must be one."""
        slot = self._idle.pop(0)
        self._slots.remove(slot)
        self._lacking.discard(slot)
        await slot.stop()

    def take(self, location: str) -> Slot:
        """Take out of the idle slots the one that costs a task of a code location the least.

        It is the last used one whose child has the task's location, else one whose child has none
        yet, else the one that was not used for the longest time, so that the others stay warm.
        """
        for wanted in (location, ""):
            for slot in reversed(self._idle):
                if slot.location == wanted:
                    self._idle.remove(slot)
                    return slot
        return self._idle.pop(0)

    async def put_back(self, slot: Slot, *, is_needed: bool) -> None:
        """Have a slot that was taken among the idle ones again.

        Args:
            is_needed: whether another task may come: the slot is warm again before that, so that
                no task waits for it in our hands.
        """
        try:
            if is_needed and slot not in self._lacking:
                await self._warm(slot)
        finally:
            self._idle.append(slot)

    def note_shortage(self, slot: Slot, error: NoProcessError) -> None:
        """No process could be started for the slot; said once."""
        if not self._lacking:
            logger.error(
                "This worker takes no %s until it can start processes again: %s. Look at its "
                "limits (ulimit -a, pids and memory of its control group).",
                self._what,
                error,
            )
        self._lacking.add(slot)

    async def end_shortage(self, is_draining: Callable[[], bool]) -> None:
        """Wait until every slot can have a process; at once where none lacks one."""
        while self._lacking and not is_draining():
            await asyncio.sleep(_SHORTAGE_SECONDS)
            for slot in list(self._lacking):
                await self._warm(slot)

    async def _warm(self, slot: Slot) -> None:
        try:
            failure = await prepare(slot)
        except NoProcessError as error:
            self.note_shortage(slot, error)
            return
        if slot in self._lacking:
            self._lacking.discard(slot)
            if not self._lacking:
                logger.info("This worker takes %s again.", self._what)
        if failure:
            logger.error("No child: %s. The next task fails with that reason.", failure)


async def prepare(slot: Slot, location: str = "") -> str:
    """Have a slot ready for a task of a location; the reason when it cannot be.

    Raises:
        NoProcessError: it can be later.
    """
    try:
        await slot.prepare(location)
    except NoProcessError:
        raise
    except SlotError as error:
        return str(error)
    return ""

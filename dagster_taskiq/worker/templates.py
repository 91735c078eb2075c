"""Which process a worker's children are forked from, so that code is loaded once.

The *base* has loaded what the worker includes; from it a template for each code location is forked,
and children of no location. Where there is no template that may be used, a child is forked from the
worker's fork server and loads its code itself, as with ``--no-warm-code``: it is *cold*.

    wanted ──▶ loading ──▶ ready ──▶ old: code changed, reload, age ──▶ wanted
                  └──────▶ cold: refused for good, or until it is tried again
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections import OrderedDict
from dataclasses import dataclass

from dagster_taskiq.aio.loop_thread import end_tasks
from dagster_taskiq.errors import NoProcessError, UnusableTemplateError
from dagster_taskiq.worker.child_messages import Execute
from dagster_taskiq.worker.fork_server import has_templates
from dagster_taskiq.worker.forked_process import Forking
from dagster_taskiq.worker.template import Template
from dagster_taskiq.worker.template_process import TemplateOptions

logger = logging.getLogger(__name__)

#: How long a location that could not be loaded is left to its children.
_RETRY_SECONDS = 30.0

#: A template that serves for less than this time has cost more than it was worth. After so many of
#: them in turn their location is left to its children for a while.
_SHORT_LIFE_SECONDS, _SHORT_LIVES, _PAUSE_SECONDS = 60.0, 3, 600.0


@dataclass
class _Place:
    """What is known of the base or a code location.

    Attributes:
        title: for people; what it is called itself is known once it was loaded.
        location: its key; empty of the base.
        payload: of its last task; None of the base.
        is_ahead: whether no task of it has come yet.
        template: the last one.
        loading: ends when the next one is ready, or cannot be had.
        reason: why there is none, for people.
        cold_until: by ``time.monotonic``: when the next one may be loaded.
        loaded_at: by the same clock: when the last one was.
        short_lives: how many of its last templates, in turn, have served for a short time.
    """

    location: str = ""
    title: str = "a code location"
    payload: str | None = None
    is_ahead: bool = False
    template: Template | None = None
    loading: asyncio.Task[None] | None = None
    reason: str = ""
    cold_until: float = 0.0
    loaded_at: float = 0.0
    short_lives: int = 0

    @property
    def usable(self) -> Template | None:
        """The template, if children may be forked from it."""
        return self.template if self.template is not None and self.template.is_usable else None

    def leave_to_children(self, reason: str, seconds: float) -> None:
        """Have no template for a while."""
        self.reason = reason
        self.cold_until = time.monotonic() + seconds

    def retire(self, reason: str, *, is_old: bool) -> None:
        """Have no more children forked from the present template.

        Args:
            reason: for people.
            is_old: whether its children are to be replaced, too.
        """
        if self.template is not None:
            self.template.is_old = is_old
            self.template.retire()
            self.template = None
        self.reason = reason

    def note_short_life(self) -> None:
        """The template was given up; leave its code to its children if that comes too often."""
        is_short = time.monotonic() - self.loaded_at < _SHORT_LIFE_SECONDS
        self.short_lives = self.short_lives + 1 if is_short else 0
        if self.short_lives >= _SHORT_LIVES:
            self.short_lives = 0
            self.leave_to_children(f"{self.reason}, {_SHORT_LIVES} times in turn", _PAUSE_SECONDS)


@dataclass(frozen=True)
class CodeState:
    """How the children of a code location come to their code.

    Attributes:
        title: of the location.
        is_warm: whether they are forked from a template.
        reason: why they are not; empty where they are.
    """

    title: str
    is_warm: bool
    reason: str = ""


class Templates:
    """The templates of one worker.

    Args:
        forking: see there.
        include: modules that the base loads.
        log_level: a name.
        most: how many code locations have a template at once.
    """

    def __init__(
        self,
        forking: Forking,
        include: tuple[str, ...],
        log_level: str,
        most: int,
    ) -> None:
        self._forking = forking
        self._include = include
        self._log_level = log_level
        self._most = most
        self._base = _Place(title=", ".join(("Dagster's instance", *include)))
        if not has_templates():
            self._base.leave_to_children("this Python's fork server is not known", math.inf)
        #: By code location, the one of the last task last.
        self._locations: OrderedDict[str, _Place] = OrderedDict()
        #: Those that have not ended; a retired one lives on with its children.
        self._alive: set[Template] = set()
        #: That are under way, also of what was forgotten meanwhile.
        self._loads: set[asyncio.Task[None]] = set()
        self._is_stopped = False

    async def ready(self, location: str) -> Template | None:
        """What a child of a location is forked from now: its template, else the base.

        Args:
            location: empty for any.

        Returns:
            None for a cold child.
        """
        place = self._locations.get(location)
        if place is not None and place.usable is not None:
            return place.usable
        await self._have(self._base)
        return self._base.usable

    async def load(self, order: Execute) -> None:
        """Have the template of a task's code location ready, where it can be."""
        location = order.code_location
        if not location:
            return
        place = self._locations.setdefault(location, _Place(location))
        place.payload, place.is_ahead = order.payload, False
        self._locations.move_to_end(location)
        while len(self._locations) > self._most:
            _, surplus = self._locations.popitem(last=False)
            self._forget(surplus, is_old=False)
        await self._have(place)

    async def load_ahead(self, location: str, payload: str) -> None:
        """Have the template of a code location ready before its first task comes.

        Where it cannot be loaded, its first task will tell. It is the first one to make room.

        Args:
            location: its key.
            payload: of an earlier task of it.
        """
        if location in self._locations or len(self._locations) >= self._most:
            return
        place = self._locations[location] = _Place(location, payload=payload, is_ahead=True)
        self._locations.move_to_end(location, last=False)
        await self._have(place)
        if place.is_ahead and place.usable is None and place.cold_until < math.inf:
            self._locations.pop(location, None)

    def discard(self, template: Template, reason: str, *, has_served: bool = False) -> None:
        """What a template has loaded is not to be executed any more.

        Args:
            template: which.
            reason: for people.
            has_served: whether it has served for as long as it may, which is never too short.
        """
        if template.is_old:
            return
        for place in (self._base, *self._locations.values()):
            if place.template is template:
                logger.info("%s is loaded anew: %s.", place.title, reason)
                place.retire(reason, is_old=True)
                if not has_served:
                    place.note_short_life()
        # it may have loaded the same, and its next children would find out only then
        self._base.retire(reason, is_old=True)

    def _note_end(self, place: _Place, template: Template) -> None:
        self._alive.discard(template)
        if place.template is template and not self._is_stopped:
            logger.warning("The process that had loaded %s has ended.", place.title)
            place.retire("its process has ended", is_old=False)
            place.note_short_life()

    async def reload(self) -> None:
        """Load everything anew."""
        places = [self._base, *self._locations.values()]
        for place in places:
            self._forget(place, is_old=True)
            place.cold_until, place.short_lives = 0.0, 0
        await asyncio.gather(*map(self._have, places))

    async def stop(self) -> None:
        """End all of them, when no child is forked any more."""
        self._is_stopped = True
        await end_tasks(self._loads)
        for template in list(self._alive):
            await template.stop()

    @property
    def pids(self) -> set[int]:
        """Of the templates; any thread may ask."""
        return {it.pid for it in list(self._alive)}

    @property
    def states(self) -> list[CodeState]:
        """Of all that is known; any thread may ask.

        Of locations with one title, which are one for people, it is that of the last task's.
        """
        places = (self._base, *list(self._locations.values()))
        known = {it.title: it for it in places if it.usable or it.reason}
        return [
            CodeState(it.title, it.usable is not None, "" if it.usable else it.reason)
            for it in known.values()
        ]

    def _forget(self, place: _Place, *, is_old: bool) -> None:
        if place.loading is not None:
            place.loading.cancel()
            place.loading = None
        place.retire("", is_old=is_old)

    async def _have(self, place: _Place) -> None:
        """Have a template, unless there is one or cannot be one now."""
        loading = None
        # a reload may have put another load in its place meanwhile
        while place.loading is not loading or loading is None:
            if place.usable or self._is_stopped or not self._keeps(place):
                return
            if place.loading is None or place.loading.done():
                if time.monotonic() < place.cold_until:
                    return
                place.loading = asyncio.create_task(self._load(place), name="template")
                self._loads.add(place.loading)
                place.loading.add_done_callback(self._loads.discard)
            loading = place.loading
            # several wait for it, of whom one may be cancelled
            await asyncio.wait({loading})

    def _keeps(self, place: _Place) -> bool:
        """Whether no other location has taken its place meanwhile."""
        return place is self._base or self._locations.get(place.location) is place

    async def _load(self, place: _Place) -> None:
        base = None
        if place is not self._base:
            await self._have(self._base)
            base = self._base.usable
            if base is None:
                place.leave_to_children(f"{self._base.title}: {self._base.reason}", 0.0)
                return
        began_at = time.monotonic()
        options = TemplateOptions(self._include, self._log_level, place.location, place.payload)
        try:
            template = await Template.start(self._forking, options, base)
        except UnusableTemplateError as error:
            place.title = error.title or place.title
            self._note_failure(place, str(error), math.inf if error.is_final else _RETRY_SECONDS)
            return
        except NoProcessError as error:
            self._note_failure(place, str(error), _RETRY_SECONDS)
            return
        place.template, place.reason = template, ""
        place.title = template.title or place.title
        place.loaded_at = time.monotonic()
        self._alive.add(template)
        template.exited.add_done_callback(lambda _: self._note_end(place, template))
        seconds = place.loaded_at - began_at
        logger.info("Loaded %s in %.1f s: children are forked from it.", place.title, seconds)

    def _note_failure(self, place: _Place, reason: str, seconds: float) -> None:
        place.leave_to_children(reason, seconds)
        if place.is_ahead and seconds < math.inf:
            logger.info("%s, which was executed lately, is not loaded: %s.", place.title, reason)
        else:
            logger.warning("Each child loads %s itself: %s.", place.title, reason)

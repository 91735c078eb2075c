"""The page as HTML: one template a part, so that a part that has changed can be sent alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from dagster_taskiq.dashboard import charts
from dagster_taskiq.dashboard.actions import ACTIONS, Action, Subject
from dagster_taskiq.dashboard.ended import end_table, unknown_note
from dagster_taskiq.dashboard.face import Face
from dagster_taskiq.dashboard.flight import run_rows, unseen_notes
from dagster_taskiq.dashboard.looks import LOOK_SECONDS, Look
from dagster_taskiq.dashboard.orders import Done
from dagster_taskiq.dashboard.rows import MOST_WORKERS, queue_rows, server_row, worker_rows
from dagster_taskiq.dashboard.summary import alerts, figures, hour_charts
from dagster_taskiq.dashboard.words import DASH, count_of, moment
from dagster_taskiq.version import __version__


class View(str, Enum):
    """A page that is kept up to date."""

    OVERVIEW = ""
    RUN = "run"
    ENDED = "ended"


#: The parts of each page, in their order.
PARTS: Mapping[View, Sequence[str]] = {
    View.OVERVIEW: (
        "alerts",
        "figures",
        "charts",
        "orders",
        "workers",
        "queues",
        "flight",
        "ended",
        "servers",
    ),
    View.RUN: ("alerts", "flight", "ended"),
    View.ENDED: ("ended",),
}


@dataclass(frozen=True)
class Wish:
    """What somebody wants to see.

    Attributes:
        run_id: for the page of a run.
    """

    view: View = View.OVERVIEW
    run_id: str = ""


@dataclass
class Pages:
    """Makes HTML of looks; each page of a look is made once, for all its viewers."""

    face: Face
    _state: tuple[int, int] = (-1, 0)
    _made: dict[Wish, Mapping[str, str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._templates = Environment(
            loader=PackageLoader("dagster_taskiq.dashboard"),
            autoescape=True,  # whatever the name of the template
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        self._templates.globals.update(
            face=self.face,
            version=__version__,
            moment=moment,
            count_of=count_of,
            dash=DASH,
            actions_on=self._actions_on,
            chart_size=(charts.WIDTH, charts.HEIGHT),
            look_seconds=LOOK_SECONDS,
        )

    def parts(self, look: Look, done: Sequence[Done], wish: Wish) -> Mapping[str, str]:
        """The parts of a page by their names.

        Args:
            done: what was ordered here, the last first.
        """
        state = (look.number, done[0].number if done else 0)
        if state != self._state:
            self._state = state
            self._made.clear()
        if wish not in self._made:
            self._made[wish] = self._make(look, done, wish)
        return self._made[wish]

    def _make(self, look: Look, done: Sequence[Done], wish: Wish) -> Mapping[str, str]:
        now, overview = look.at, look.overview
        runs, more_runs = run_rows(look, wish.run_id)
        workers = worker_rows(look)
        context: dict[str, Any] = {
            "look": look,
            "now": now,
            "view": wish.view.value,
            "alerts": alerts(look),
            "figures": figures(look),
            "charts": hour_charts(look),
            "orders": done,
            "workers": workers[:MOST_WORKERS],
            "more_workers": max(0, len(workers) - MOST_WORKERS),
            "queues": queue_rows(look),
            "runs": runs,
            "more_runs": more_runs,
            "ended": end_table(look.ends, now, wish.run_id, are_all=wish.view is not View.OVERVIEW),
            "ends_note": unknown_note(look.ends, now),
            "unseen": unseen_notes(overview.queues),
            "servers": [server_row(it) for it in overview.servers],
        }
        parts = PARTS[wish.view]
        return {name: _dense(self.render(f"part_{name}.html", **context)) for name in parts}

    def page(self, look: Look, done: Sequence[Done], wish: Wish) -> str:
        """A whole page."""
        query = {"view": wish.view.value, "run": wish.run_id}
        return self.render(
            "page.html",
            parts=self.parts(look, done, wish),
            look=look,
            events=self.face.path("events", **{key: it for key, it in query.items() if it}),
            view=wish.view.value,
            run_id=wish.run_id,
        )

    def render(self, template: str, **context: Any) -> str:
        """Another page."""
        return self._templates.get_template(template).render(context)

    def _actions_on(self, subject: str, row: Any) -> list[Action]:
        """What can be ordered about a row of a table."""
        if not self.face.may_act:
            return []
        return [it for it in ACTIONS.values() if it.subject is Subject(subject) and it.fits(row)]


def _dense(html: str) -> str:
    """Without the indentation of the templates, which would be a third of what is sent."""
    return "\n".join(line for it in html.splitlines() if (line := it.strip()))

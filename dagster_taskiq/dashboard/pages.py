"""The page as HTML: one template a part, so that a part that has changed can be sent alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from dagster_taskiq.dashboard import charts
from dagster_taskiq.dashboard.actions import ACTIONS, Action, Subject
from dagster_taskiq.dashboard.face import Face
from dagster_taskiq.dashboard.looks import LOOK_SECONDS, Look
from dagster_taskiq.dashboard.orders import Done
from dagster_taskiq.dashboard.rows import (
    MOST_RUNS,
    queue_rows,
    run_rows,
    server_row,
    unseen_notes,
    worker_rows,
)
from dagster_taskiq.dashboard.summary import alerts, figures, sampled_charts
from dagster_taskiq.dashboard.words import DASH, count_of, moment
from dagster_taskiq.version import __version__

#: The parts of the page, in their order.
PARTS = (
    "alerts",
    "figures",
    "charts",
    "orders",
    "workers",
    "queues",
    "flight",
    "servers",
)

#: Those of the page of one run.
RUN_PARTS = ("alerts", "flight")


@dataclass
class Pages:
    """Makes HTML of looks; each part of a look is made once, for all viewers."""

    face: Face
    _made: dict[tuple[int, int, str], Mapping[str, str]] = field(default_factory=dict)

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

    def parts(self, look: Look, done: Sequence[Done], run_id: str = "") -> Mapping[str, str]:
        """The parts of the page by their names.

        Args:
            done: what was ordered here, the last first.
            run_id: for the page of one run.
        """
        key = (look.number, len(done) and done[0].number, run_id)
        if key not in self._made:
            old = [it for it in self._made if it[:2] != key[:2]]
            for it in old:
                del self._made[it]
            self._made[key] = self._make(look, done, run_id)
        return self._made[key]

    def _make(self, look: Look, done: Sequence[Done], run_id: str) -> Mapping[str, str]:
        now, overview = look.at, look.overview
        runs = run_rows(look, run_id)
        context: dict[str, Any] = {
            "look": look,
            "now": now,
            "run_id": run_id,
            "alerts": alerts(look),
            "figures": figures(look),
            "charts": sampled_charts(look),
            "orders": done,
            "workers": worker_rows(look),
            "queues": queue_rows(look),
            "runs": runs[:MOST_RUNS],
            "more_runs": max(0, len(runs) - MOST_RUNS),
            "unseen": unseen_notes(overview.queues),
            "servers": [server_row(it) for it in overview.servers],
        }
        names = RUN_PARTS if run_id else PARTS
        return {
            name: self._templates.get_template(f"part_{name}.html").render(context)
            for name in names
        }

    def page(self, look: Look, done: Sequence[Done], run_id: str = "") -> str:
        """The whole page, or that of one run."""
        events = self.face.path("events", **({"run": run_id} if run_id else {}))
        return self.render(
            "page.html",
            parts=self.parts(look, done, run_id),
            look=look,
            events=events,
            run_id=run_id,
        )

    def render(self, template: str, **context: Any) -> str:
        """Another page."""
        return self._templates.get_template(template).render(context)

    def _actions_on(self, subject: str, row: Any) -> list[Action]:
        """What can be ordered about a row of a table."""
        if not self.face.may_act:
            return []
        return [it for it in ACTIONS.values() if it.subject is Subject(subject) and it.fits(row)]

"""What the demo shows: a table that is redrawn on a terminal, else a line for each change."""

from __future__ import annotations

import time
from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from dagster_taskiq.demo.progress import State, Step

if TYPE_CHECKING:
    from typing_extensions import Self

_STYLES = {
    State.WAITING: "yellow",
    State.RUNNING: "bold cyan",
    State.RETRYING: "magenta",
    State.DONE: "green",
    State.FAILED: "bold red",
    State.STOPPED: "red",
}


class Display:
    """Shows how it goes on, then what came of it."""

    def __init__(self) -> None:
        self._console = Console(highlight=False)
        self._live = Live(console=self._console, auto_refresh=False, transient=True)
        self._phase = ""
        self._steps: list[Step] = []
        self._started_at = time.monotonic()

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._live.stop()

    def phase(self, text: str) -> None:
        """What is being done now."""
        self._phase = text
        if self._live.is_started:
            self.refresh()
        else:
            self._line(text)

    def show(self, steps: Sequence[Step], changed: Sequence[Step]) -> None:
        """The steps so far, and which of them differ from the last time."""
        self._steps = list(steps)
        if self._live.is_started:
            self.refresh()
            return
        for step in changed:
            where = f" on worker {step.worker}, pid {step.pid}" if step.worker else ""
            attempt = f", attempt {step.attempts}" if step.attempts > 1 else ""
            self._line(f"{step.key}: {step.state.value} ({step.queue}{attempt}){where}")

    def refresh(self) -> None:
        """Draw again: the seconds go on."""
        if self._live.is_started:
            header = Text(f"{self._elapsed():5.1f} s  {self._phase}", style="bold")
            rows = [self._progress_table()] if self._steps else []
            self._live.update(Group(header, *rows), refresh=True)

    def finish(self, steps: Sequence[Step]) -> None:
        """The table of what was done where."""
        self._live.stop()
        table = _table("step", "queue", "worker", "child pid>", "attempts>", "seconds>")
        for step in sorted(steps, key=lambda step: step.started_at or 0):
            table.add_row(
                Text(step.key, style=_STYLES[step.state]),
                step.queue,
                step.worker,
                step.pid,
                str(step.attempts),
                _seconds(step),
            )
        self._console.print(table)
        self.say(
            f"\nAll {len(steps)} steps succeeded. After {self._elapsed():.0f} s everything that "
            "was started has been stopped."
        )

    def say(self, text: str) -> None:
        """A sentence that stays."""
        self._console.print(Text(text))

    def _progress_table(self) -> Table:
        table = _table("step", "queue", "priority>", "state", "worker", "seconds>")
        for step in self._steps:
            state = step.state.value
            if step.attempts > 1 and step.state in (State.WAITING, State.RUNNING):
                state += f" ({step.attempts})"
            table.add_row(
                Text(step.key),
                step.queue,
                str(step.priority),
                Text(state, style=_STYLES[step.state]),
                step.worker,
                _seconds(step),
            )
        return table

    def _line(self, text: str) -> None:
        self._console.print(Text(f"{self._elapsed():5.1f} s  {text}"), soft_wrap=True)

    def _elapsed(self) -> float:
        return time.monotonic() - self._started_at


def _table(*columns: str) -> Table:
    """A table of these columns; ``>`` at the end of a name is one of numbers."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in columns:
        is_number = name.endswith(">")
        table.add_column(
            name.rstrip(">"), justify="right" if is_number else "left", overflow="fold"
        )
    return table


def _seconds(step: Step) -> str:
    seconds = step.seconds(time.time())
    return "" if seconds is None else f"{seconds:.1f}"

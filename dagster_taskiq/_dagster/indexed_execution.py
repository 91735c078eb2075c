"""``ActiveExecution`` at a cost for each step that does not grow with the plan."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from dagster._core.execution.plan.active import ActiveExecution


class IndexedExecution(ActiveExecution):
    """Dagster's state of a run's steps; it looks at a step when its last dependency has ended.

    Dagster's own looks at every step that waits, in each of its updates, of which a round of the
    loop has three. What becomes of a step is still for Dagster's update to decide: it is given the
    steps that are due in place of all that wait, and what has come of the steps before them.
    """

    #: None until Dagster has made its first update, in its constructor.
    _due: _DueSteps | None = None

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._due = _DueSteps(self._pending, self._ends())

    def _ends(self) -> tuple[set[str], ...]:
        """Where Dagster has the steps that others need not wait for any more."""
        return self._success, self._skipped, self._failed, self._abandoned

    def _update(self) -> None:
        due = self._due
        if due is None or self._new_dynamic_mappings:
            # dynamic outputs make new steps, and new dependencies of known ones
            super()._update()
            self._due = _DueSteps(self._pending, self._ends())
        elif due or self._waiting_to_retry:
            keys = due.in_order()
            with self._cut_to(keys):
                super()._update()
                assert not self._pending, "Dagster has left steps whose dependencies have ended"
            for key in keys:
                del self._pending[key]
            due.clear()

    @contextmanager
    def _cut_to(self, keys: Sequence[str]) -> Iterator[None]:
        """Have the state show a few of the steps that wait, and the ends that they depend on."""
        pending, ends = self._pending, self._ends()
        known = set().union(*(self._read_by(key) for key in keys))
        self._pending = {key: pending[key] for key in keys}
        self._success, self._skipped, self._failed, self._abandoned = (it & known for it in ends)
        try:
            yield
        finally:
            self._pending = pending
            self._success, self._skipped, self._failed, self._abandoned = ends

    def _read_by(self, key: str) -> set[str]:
        """The steps of whose ends Dagster asks to decide over a step."""
        inputs = self.get_step_by_key(key).step_inputs
        handles = (it.get_step_output_handle_dependencies() for it in inputs)
        return self._pending[key].union(it.step_key for found in handles for it in found)

    def _mark_complete(self, step_key: str) -> None:
        super()._mark_complete(step_key)
        if self._due is None:
            return
        if step_key in self._pending:
            self._due.note_again(step_key)
        elif any(step_key in ended for ended in self._ends()):
            self._due.note_end(step_key)


class _DueSteps:
    """Which of the waiting steps wait for nothing any more.

    Args:
        pending: the steps that wait, in Dagster's order, and what they depend on.
        ends: the steps that have ended.
    """

    def __init__(self, pending: dict[str, set[str]], ends: Collection[set[str]]) -> None:
        ended = set().union(*ends)
        self._keys: list[str] = []
        #: By step, its place in the order in which Dagster looks at those that wait.
        self._places = {key: place for place, key in enumerate(pending)}
        self._next_place = len(pending)
        #: By step, how many of its dependencies have not ended, and by dependency who waits for it.
        self._missing: dict[str, int] = {}
        self._waiting: dict[str, list[str]] = defaultdict(list)
        for key, dependencies in pending.items():
            missing = dependencies - ended
            self._missing[key] = len(missing)
            for dependency in missing:
                self._waiting[dependency].append(key)
            if not missing:
                self._keys.append(key)

    def __bool__(self) -> bool:
        return bool(self._keys)

    def note_end(self, step_key: str) -> None:
        """A step has ended, and is not tried again."""
        for key in self._waiting.pop(step_key, ()):
            self._missing[key] -= 1
            if not self._missing[key]:
                self._keys.append(key)

    def note_again(self, step_key: str) -> None:
        """A step waits again, behind all others, to be tried again at once."""
        self._places[step_key] = self._next_place
        self._next_place += 1
        self._keys.append(step_key)

    def in_order(self) -> list[str]:
        """Those that are due."""
        return sorted(self._keys, key=self._places.__getitem__)

    def clear(self) -> None:
        """Those that were due do not wait any more."""
        self._keys.clear()

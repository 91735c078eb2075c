"""How whole runs have ended on a worker, for the history; steps' ends are told by their runs."""

from __future__ import annotations

import time

from dagster_taskiq.backend.history_log import HistoryLog
from dagster_taskiq.execution.tasks import EXIT_SUPERSEDED
from dagster_taskiq.messages.attempt_ends import AttemptEnd, EndOutcome
from dagster_taskiq.messages.envelope import Envelope
from dagster_taskiq.messages.plain_text import plain_sentence
from dagster_taskiq.messages.queue_names import QueueKind
from dagster_taskiq.messages.results import Outcome, Place, TaskResult
from dagster_taskiq.worker.answers import cause_of
from dagster_taskiq.worker.observer import WorkerObserver

#: Of a run that has failed by itself, of which a worker knows no more.
_FAILED = "The run has failed: its log in Dagster says why."


class RunEnds(WorkerObserver):
    """Notes each run that has ended here and will not go on elsewhere.

    Args:
        history: which is told.
    """

    def __init__(self, history: HistoryLog) -> None:
        self._history = history
        #: When each run under way began, by its task id; seconds since the epoch.
        self._begun: dict[str, float] = {}

    def began(self, envelope: Envelope, place: Place) -> None:
        """See ``WorkerObserver``."""
        if envelope.kind is QueueKind.RUNS:
            self._begun[envelope.task_id] = time.time()

    def completed(
        self, envelope: Envelope, result: TaskResult, *, is_cancelled: bool, size_bytes: int
    ) -> None:
        """See ``WorkerObserver``."""
        # another worker may begin the one, and another process of the run goes on with the other
        is_elsewhere = result.outcome is Outcome.REFUSED or result.exit_code == EXIT_SUPERSEDED
        if envelope.kind is not QueueKind.RUNS or is_elsewhere:
            return
        outcome = _outcome_of(result, is_cancelled=is_cancelled)
        reason = cause_of(result) or (_FAILED if outcome is EndOutcome.FAILED else "")
        place = result.place
        self._history.note_end(
            AttemptEnd(
                task_id=envelope.task_id,
                run_id=envelope.run_id,
                step_key="",
                attempt=envelope.attempt,
                queue=envelope.queue,
                outcome=outcome,
                ended_at=time.time(),
                worker=place.worker,
                host=place.host,
                slot=place.slot,
                sent_at=envelope.sent_at or None,
                started_at=self._begun.get(envelope.task_id),
                reason=plain_sentence(reason),
            )
        )

    def released(self, envelope: Envelope) -> None:
        """See ``WorkerObserver``."""
        self._begun.pop(envelope.task_id, None)


def _outcome_of(result: TaskResult, *, is_cancelled: bool) -> EndOutcome:
    if is_cancelled:
        return EndOutcome.CANCELLED
    if result.outcome is Outcome.DIED:
        return EndOutcome.LOST
    is_success = result.outcome is Outcome.FINISHED and not result.exit_code
    return EndOutcome.SUCCEEDED if is_success else EndOutcome.FAILED

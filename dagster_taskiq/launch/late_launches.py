"""Runs that could not be sent, since a server is away: sent when it is back.

Dagster fails a run whose launch raises, also one that is to be resumed and whose steps still run.
A run that came from Dagster's queue goes back there, unless the server may have got it, and the
daemon launches it again. Any other run is sent later by the process that launched it.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from dagster import DagsterEvent, DagsterEventType, DagsterInstance, DagsterRun, DagsterRunStatus

from dagster_taskiq._dagster.names import EngineEventData
from dagster_taskiq.errors import (
    LauncherClosedError,
    ServerError,
    TagError,
    TooLargeError,
    UnloadableCodeError,
)
from dagster_taskiq.launch.background import Background
from dagster_taskiq.servers.patience import is_passing, out_of_patience

logger = logging.getLogger(__name__)

#: How often to try again.
RETRY_SECONDS = 2.0

#: Errors by which a run can never be sent, whatever the servers do.
_OF_THE_RUN = (TagError, TooLargeError, UnloadableCodeError)


@dataclass(frozen=True)
class _Late:
    """A run that is to be sent while it has a status, and until when, in Unix time."""

    status: DagsterRunStatus
    send: Callable[[DagsterRun], None]
    deadline: float


class LateLaunches:
    """The runs that one launcher has put off.

    Args:
        background: where they are sent.
        patience_seconds: the setting ``server_patience_seconds``, for runs that have not begun.
    """

    def __init__(self, background: Background, patience_seconds: float) -> None:
        self._background = background
        self._patience_seconds = patience_seconds
        self._late: dict[str, _Late] = {}
        self._lock = threading.Lock()

    def put_off(
        self,
        instance: DagsterInstance,
        run: DagsterRun,
        error: ServerError,
        send: Callable[[DagsterRun], None],
        *,
        may_have_been_sent: bool,
    ) -> None:
        """Have a run launched later.

        Args:
            error: why it cannot be now.
            send: sends it; raises ``ServerError``.
            may_have_been_sent: whether the server may have got it all the same. A worker refuses a
                run that Dagster has as queued.

        Raises:
            ServerError: it has been tried for the whole time that is set.
        """
        tried = _records(instance, run.run_id, DagsterEventType.PIPELINE_STARTING)
        began = tried[0] if tried else time.time()
        if time.time() - began >= self._patience_seconds:
            raise out_of_patience(error, self._patience_seconds)
        is_queued = bool(_records(instance, run.run_id, DagsterEventType.PIPELINE_ENQUEUED))
        if len(tried) < 2:  # later tries say nothing new
            where = "It goes back to Dagster's queue until" if is_queued else "It is sent when"
            _say(instance, run, f"The run cannot be launched. {error} {where} the server is back.")
        if is_queued and not may_have_been_sent:
            event = DagsterEvent(DagsterEventType.PIPELINE_ENQUEUED.value, run.job_name)
            instance.report_dagster_event(event, run.run_id)
        else:
            deadline = began + self._patience_seconds
            self._add(instance, run, _Late(DagsterRunStatus.STARTING, send, deadline))

    def put_off_resume(
        self,
        instance: DagsterInstance,
        run: DagsterRun,
        error: ServerError,
        send: Callable[[DagsterRun], None],
    ) -> None:
        """Have a run resumed later, however late: its steps may be running."""
        _say(instance, run, f"The run cannot be resumed. {error} It is sent when it is back.")
        self._add(instance, run, _Late(DagsterRunStatus.STARTED, send, float("inf")))

    def _add(self, instance: DagsterInstance, run: DagsterRun, late: _Late) -> None:
        with self._lock:
            self._late[run.run_id] = late
        self._background.repeat(
            "late-launches",
            lambda: self._send_all(instance),
            RETRY_SECONDS,
            "Cannot launch runs that wait for a server",
        )

    def _send_all(self, instance: DagsterInstance) -> bool:
        """Try to send all; whether none is left."""
        with self._lock:
            late = dict(self._late)
        for run_id, it in late.items():
            try:
                is_settled = self._try_to_send(instance, run_id, it)
            except LauncherClosedError:
                raise
            except Exception as error:
                # storage that is away now may be back the next time; the other runs have their turn
                logger.warning("Cannot launch run %s: %s: %s", run_id, type(error).__name__, error)
                continue
            if is_settled:
                with self._lock:
                    if self._late.get(run_id) is it:
                        del self._late[run_id]
        with self._lock:
            return not self._late

    def _try_to_send(self, instance: DagsterInstance, run_id: str, late: _Late) -> bool:
        """Try to send a run; True when nothing is left to do for it."""
        run = instance.get_run_by_id(run_id)
        if run is None or run.status is not late.status:
            return True
        try:
            late.send(run)
        except ServerError as error:
            if is_passing(error, has_worked=True) and time.time() < late.deadline:
                return False
            instance.report_run_failed(run, str(out_of_patience(error, self._patience_seconds)))
        except _OF_THE_RUN as error:
            instance.report_run_failed(run, f"The run cannot be launched. {error}")
        return True


def _say(instance: DagsterInstance, run: DagsterRun, text: str) -> None:
    instance.report_engine_event(text, run, EngineEventData())


def _records(instance: DagsterInstance, run_id: str, kind: DagsterEventType) -> list[float]:
    """When the first two events of a kind were logged, in Unix time."""
    found = instance.get_records_for_run(run_id, of_type=kind, limit=2).records
    return [record.timestamp for record in found]

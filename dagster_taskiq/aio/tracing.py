"""The seam of tracing: what a tracer hears of a run and of its steps. By default nothing is done.

All of it is called for each step, so that the methods here must cost nothing, and those of a tracer
must not raise.
"""

from __future__ import annotations

from collections.abc import Mapping

#: The context of a span as it travels: W3C's ``traceparent``, and ``tracestate`` if there is one.
TraceContext = Mapping[str, str]

_NO_CONTEXT: TraceContext = {}


class AttemptTrace:
    """One attempt of a step, in the process of its run.

    Attributes:
        context: that its message carries; empty without a tracer.
    """

    context: TraceContext = _NO_CONTEXT

    def submitted(self, began_at: int, ended_at: int) -> None:
        """Its task was sent.

        Args:
            began_at, ended_at: when, in nanoseconds since the epoch.
        """

    def sent_again(self) -> None:
        """Its task is to be sent again under the same id."""

    def ended(
        self, outcome: str, reason: str = "", worker: str = "", *, is_retried: bool = False
    ) -> None:
        """It is over; later calls count for nothing.

        Args:
            outcome: a word; ``succeeded`` where nothing is wrong.
            reason: why it is another one, in sentences.
            worker: that executed it.
            is_retried: whether another attempt follows.
        """


class RunTrace:
    """One run, in its own process."""

    def attempt(
        self, step_key: str, attempt: int, queue: str, priority: int, task_id: str
    ) -> AttemptTrace:
        """An attempt of a step begins: it is about to be sent."""
        del step_key, attempt, queue, priority, task_id
        return NO_ATTEMPT_TRACE

    def ended(self, reason: str = "") -> None:
        """The loop of the run is over, with all attempts of it; later calls count for nothing.

        Args:
            reason: why it did not come to its end; empty where it did.
        """


class StepTrace:
    """One attempt of a step, in the process that executes it."""

    #: Of the trace, for people; empty without a tracer.
    trace_id: str = ""

    def begin(self, attributes: Mapping[str, str | int], sent_at: float, claimed_at: float) -> None:
        """The code is loaded, and the step is about to be executed in this thread.

        Args:
            attributes: what is known of the step.
            sent_at, claimed_at: when its task was sent and claimed, in seconds since the epoch; 0
                where that is not known.
        """

    def note(self, outcome: str, reason: str) -> None:
        """How its execution has ended, by Dagster; see ``AttemptTrace``."""

    def ended(self, outcome: str, reason: str) -> None:
        """This thread goes on with something else.

        Args:
            outcome, reason: what it came to where none was noted.
        """


class Tracing:
    """Makes the traces of one process."""

    def run(self, run_id: str, job_name: str) -> RunTrace:
        """The loop of a run begins."""
        del run_id, job_name
        return NO_RUN_TRACE

    def step(self, context: TraceContext) -> StepTrace:
        """A step has come to this process, with the context of its attempt."""
        del context
        return _NO_STEP

    def flush(self) -> None:
        """Have everything exported that has ended, or give up after some seconds."""


NO_ATTEMPT_TRACE = AttemptTrace()
_NO_STEP = StepTrace()
NO_RUN_TRACE = RunTrace()


def no_tracing() -> Tracing:
    """What traces nothing."""
    return Tracing()

"""Spans of runs, attempts and steps, by OpenTelemetry; imported only where there is a provider.

run JOB                        in the run's process
  step KEY                     there too, from when the attempt is sent to its end
    submit QUEUE               there too, while its message is sent
    queue QUEUE                from when it was sent until a worker had claimed it
    execute KEY                in the process that executes it, where the step's own spans join
"""

from __future__ import annotations

import functools
import logging
import threading
from collections.abc import Callable, Mapping
from contextvars import Token
from typing import Any, TypeVar

from opentelemetry import context as otel_context
from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.trace import (
    INVALID_SPAN,
    ProxyTracerProvider,
    Span,
    SpanKind,
    Status,
    StatusCode,
    Tracer,
    TracerProvider,
)
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from dagster_taskiq.aio.tracing import (
    NO_ATTEMPT_TRACE,
    NO_RUN_TRACE,
    AttemptTrace,
    RunTrace,
    StepTrace,
    TraceContext,
    Tracing,
)
from dagster_taskiq.version import __version__

logger = logging.getLogger(__name__)

#: How long a process waits for its spans to be exported, after a step and at the end of a run.
FLUSH_SECONDS = 2.0

#: The longest reason of a status.
_MAX_REASON_LENGTH = 1000

_W3C = TraceContextTextMapPropagator()

Returns = TypeVar("Returns")


def open_tracing(*, is_configured: bool) -> Tracing | None:
    """What traces this process; None where it has no provider.

    Args:
        is_configured: whether OpenTelemetry's variables say how to make one, unless there is one.
    """
    if is_configured and _is_without_provider():
        _configure()
    return None if _is_without_provider() else OtelTracing(trace.get_tracer_provider())


def _is_without_provider() -> bool:
    return isinstance(trace.get_tracer_provider(), ProxyTracerProvider)


@functools.cache
def _configure() -> None:
    """Make a provider; what cannot be made is said once."""
    try:
        # the API may be installed without the SDK
        from dagster_taskiq.telemetry.traces_setup import set_up_provider  # noqa: PLC0415

        set_up_provider()
    except ImportError as error:
        logger.warning(
            "Nothing is traced: %s. pip install 'dagster-taskiq[otel]', and the exporter.", error
        )
    except Exception as error:  # of an exporter, or a variable that is wrong
        logger.warning(
            "Nothing is traced: OpenTelemetry cannot be set up by its environment variables: %s",
            error,
        )


def _harmless(method: Callable[..., Returns]) -> Callable[..., Returns]:
    """An error of a user's span processor or sampler is logged, and fails neither run nor step."""

    @functools.wraps(method)
    def call(self: Any, *arguments: Any, **more: Any) -> Returns:
        try:
            return method(self, *arguments, **more)
        except Exception:
            _log_error(method.__qualname__)
            return _INSTEAD.get(method.__qualname__)  # type: ignore[return-value]

    return call


@functools.cache
def _log_error(name: str) -> None:
    logger.warning("Tracing fails in %s; said once.", name, exc_info=True)


#: What a method returns that has failed.
_INSTEAD: dict[str, Any] = {
    "OtelTracing.run": NO_RUN_TRACE,
    "_OtelRun.attempt": NO_ATTEMPT_TRACE,
}


class OtelTracing(Tracing):
    """Traces by a provider."""

    def __init__(self, provider: TracerProvider) -> None:
        self._provider = provider
        self._tracer = provider.get_tracer("dagster_taskiq", __version__)
        self._flushing: threading.Thread | None = None

    @_harmless
    def run(self, run_id: str, job_name: str) -> RunTrace:
        """See ``Tracing``."""
        attributes = {"dagster.run_id": run_id, "dagster.job_name": job_name}
        span = self._tracer.start_span(f"run {job_name}", attributes=attributes)
        return _OtelRun(self._tracer, span, run_id)

    def step(self, context: TraceContext) -> StepTrace:
        """See ``Tracing``."""
        return _OtelStep(self._tracer, context)

    def flush(self) -> None:
        """See ``Tracing``.

        An exporter may take as long as it likes, so it is waited for in a thread. While it is still
        at it no other flush is begun.
        """
        flush = getattr(self._provider, "force_flush", None)
        if flush is None or (self._flushing is not None and self._flushing.is_alive()):
            return
        thread = threading.Thread(target=_flush, args=(flush,), name="flush-traces", daemon=True)
        self._flushing = thread
        try:
            thread.start()
        except RuntimeError:
            return  # the system has no thread left: its spans are exported later
        thread.join(FLUSH_SECONDS)


def _flush(flush: Callable[[int], object]) -> None:
    try:
        flush(int(FLUSH_SECONDS * 1000))
    except Exception:
        _log_error("flush")


class _OtelRun(RunTrace):
    def __init__(self, tracer: Tracer, span: Span, run_id: str) -> None:
        self._tracer = tracer
        self._span = span
        self._context = trace.set_span_in_context(span, Context())
        self._run_id = run_id
        self._open: set[_OtelAttempt] = set()
        self._failed = 0
        self._is_over = False

    @_harmless
    def attempt(
        self, step_key: str, attempt: int, queue: str, priority: int, task_id: str
    ) -> AttemptTrace:
        """See ``RunTrace``."""
        attributes: dict[str, str | int] = {
            "dagster.run_id": self._run_id,
            "dagster.step_key": step_key,
            "dagster.attempt": attempt,
            "dagster_taskiq.queue": queue,
            "dagster_taskiq.priority": priority,
            "dagster_taskiq.task_id": task_id,
        }
        span = self._tracer.start_span(f"step {step_key}", self._context, attributes=attributes)
        found = _OtelAttempt(self._tracer, span, queue, self._note_end)
        self._open.add(found)
        return found

    def _note_end(self, attempt: _OtelAttempt, *, is_failure: bool) -> None:
        self._open.discard(attempt)
        self._failed += is_failure

    @_harmless
    def ended(self, reason: str = "") -> None:
        """See ``RunTrace``."""
        if self._is_over:
            return
        self._is_over = True
        for attempt in list(self._open):
            attempt.ended("left", reason or "The run's loop has ended.")
        count = self._failed
        if not reason and count:
            reason = "1 step has failed." if count == 1 else f"{count} steps have failed."
        _end(self._span, reason)


class _OtelAttempt(AttemptTrace):
    def __init__(
        self, tracer: Tracer, span: Span, queue: str, note_end: Callable[..., None]
    ) -> None:
        self._tracer = tracer
        self._span = span
        self._context = trace.set_span_in_context(span, Context())
        self._queue = queue
        self._note_end = note_end
        self._is_over = False
        carrier: dict[str, str] = {}
        _W3C.inject(carrier, self._context)
        self.context = carrier

    @_harmless
    def submitted(self, began_at: int, ended_at: int) -> None:
        """See ``AttemptTrace``."""
        name = f"submit {self._queue}"
        span = self._tracer.start_span(
            name, self._context, kind=SpanKind.PRODUCER, start_time=began_at
        )
        span.end(ended_at)

    @_harmless
    def sent_again(self) -> None:
        """See ``AttemptTrace``."""
        self._span.add_event("sent again")

    @_harmless
    def ended(
        self, outcome: str, reason: str = "", worker: str = "", *, is_retried: bool = False
    ) -> None:
        """See ``AttemptTrace``."""
        if self._is_over:
            return
        self._is_over = True
        attributes: dict[str, str | bool] = {
            "dagster_taskiq.outcome": outcome,
            "dagster_taskiq.is_retried": is_retried,
        }
        if worker:
            attributes["dagster_taskiq.worker"] = worker
        self._span.set_attributes(attributes)
        is_failure = outcome != "succeeded"
        _end(self._span, reason or outcome if is_failure else "")
        self._note_end(self, is_failure=is_failure and not is_retried)


class _OtelStep(StepTrace):
    def __init__(self, tracer: Tracer, carrier: TraceContext) -> None:
        self._tracer = tracer
        self._carrier = carrier
        self._span: Span = INVALID_SPAN
        self._token: Token[Context] | None = None
        self._noted: tuple[str, str] | None = None

    @_harmless
    def begin(self, attributes: Mapping[str, str | int], sent_at: float, claimed_at: float) -> None:
        """See ``StepTrace``."""
        parent = _W3C.extract(self._carrier, Context())
        if sent_at and claimed_at:
            name = f"queue {attributes['dagster_taskiq.queue']}"
            waited = self._tracer.start_span(name, parent, start_time=_nanoseconds(sent_at))
            waited.end(_nanoseconds(claimed_at))
        self._span = self._tracer.start_span(
            f"execute {attributes['dagster.step_key']}",
            parent,
            kind=SpanKind.CONSUMER,
            attributes=attributes,
        )
        self.trace_id = trace.format_trace_id(self._span.get_span_context().trace_id)
        self._token = otel_context.attach(trace.set_span_in_context(self._span))

    def note(self, outcome: str, reason: str) -> None:
        """See ``StepTrace``."""
        self._noted = outcome, reason

    @_harmless
    def ended(self, outcome: str, reason: str) -> None:
        """See ``StepTrace``."""
        if self._token is None:
            return  # it did not come to its code
        otel_context.detach(self._token)
        self._token = None
        outcome, reason = self._noted or (outcome, reason)
        self._span.set_attribute("dagster_taskiq.outcome", outcome)
        _end(self._span, "" if outcome == "succeeded" else reason or outcome)


def _end(span: Span, problem: str) -> None:
    if problem:
        span.set_status(Status(StatusCode.ERROR, problem[:_MAX_REASON_LENGTH]))
    else:
        span.set_status(Status(StatusCode.OK))
    span.end()


def _nanoseconds(seconds: float) -> int:
    return int(seconds * 1e9)

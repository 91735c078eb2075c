"""A job whose code sets up OpenTelemetry wherever it is loaded: in its run, in a worker's child.

Its spans leave a process only when they are flushed.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path

from dagster import OpExecutionContext, RetryPolicy, job, op
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult

from dagster_taskiq import taskiq_executor
from dagster_taskiq_tests.acceptance.ops import DIRECTORY_VARIABLE


class _FileExporter(SpanExporter):
    """Writes a line of JSON for each span into the file ``spans`` in the stack's directory."""

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        path = Path(os.environ[DIRECTORY_VARIABLE]) / "spans"
        lines = [f"{json.dumps(_line(span))}\n" for span in spans]
        with path.open("a", encoding="utf8") as file:
            file.write("".join(lines))
        return SpanExportResult.SUCCESS


def _line(span: ReadableSpan) -> dict[str, object]:
    return {
        "name": span.name,
        "trace": trace.format_trace_id(span.context.trace_id),
        "id": trace.format_span_id(span.context.span_id),
        "parent": span.parent and trace.format_span_id(span.parent.span_id),
        "status": span.status.status_code.name,
        "reason": span.status.description,
        "start": span.start_time,
        "end": span.end_time,
        "attributes": dict(span.attributes or {}),
        "pid": os.getpid(),
    }


def _set_up() -> None:
    provider = TracerProvider()
    never = 3_600_000
    provider.add_span_processor(BatchSpanProcessor(_FileExporter(), schedule_delay_millis=never))
    trace.set_tracer_provider(provider)


_set_up()


@op(retry_policy=RetryPolicy(max_retries=1))
def flaky(context: OpExecutionContext) -> None:
    with trace.get_tracer("mine").start_as_current_span("own work"):
        if context.retry_number == 0:
            raise ValueError("the first one")


@job(executor_def=taskiq_executor)
def traced() -> None:
    flaky()

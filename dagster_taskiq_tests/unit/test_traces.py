"""Traces: which spans there are, whose children they are, how they end, and what they cost."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from dagster import DagsterInstance
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF
from opentelemetry.trace import ProxyTracerProvider, StatusCode

from dagster_taskiq import executor as executor_module
from dagster_taskiq.aio.tracing import Tracing
from dagster_taskiq.errors import UntrustedError
from dagster_taskiq.execution.arrivals import Arrival
from dagster_taskiq.execution.tasks import TaskRunner
from dagster_taskiq.loop.core_execution_loop import core_execution_loop
from dagster_taskiq.loop.dispatcher import StepTask
from dagster_taskiq.messages.envelope import PROTOCOL, Envelope
from dagster_taskiq.messages.results import TaskResult
from dagster_taskiq.messages.signing import Signer
from dagster_taskiq.telemetry import traces, traces_otel, traces_setup
from dagster_taskiq.telemetry.traces import FoundTracing
from dagster_taskiq.telemetry.traces_otel import OtelTracing
from dagster_taskiq_tests.messages import STEP_TASK
from dagster_taskiq_tests.unit import loop_jobs as jobs
from dagster_taskiq_tests.unit.test_core_execution_loop import (
    EXPIRE_STARTED,
    PLACE,
    RUN,
    SUCCESS,
    WAIT,
    Clock,
    FakeDispatcher,
    execute,
)

SECONDS = 60.0

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


# --- the message ---


def sealed(envelope: Envelope, signer: Signer) -> bytes:
    return envelope.to_message("queue", signer).message


def test_a_message_carries_the_context_under_its_signature() -> None:
    """It arrives as it was sent, and cannot be exchanged."""
    signer = Signer(["k" * 32])
    sent = replace(STEP_TASK, trace={"traceparent": PARENT, "tracestate": "a=1"})
    data = sealed(sent, signer)
    assert Envelope.from_bytes(data, signer) == sent
    with pytest.raises(UntrustedError):
        Envelope.from_bytes(data.replace(b"b7ad6b", b"b7ad6c"), signer)


def test_a_message_without_a_trace_is_as_it_always_was() -> None:
    """And one of an older version, which has no such field, is read; the protocol is the same."""
    assert "trace" not in STEP_TASK.header()
    assert Envelope.from_bytes(sealed(STEP_TASK, Signer()), Signer()).trace == {}
    assert PROTOCOL == 2


@pytest.mark.parametrize(
    "found",
    [
        None,
        7,
        "text",
        [],
        {"traceparent": 7},
        {"traceparent": "x" * 513},
        {"traceparent": "\u2603"},
        {"traceparent": "a\nb"},
        {"other": "x"},
    ],
)
def test_what_is_no_context_is_left_out(found: Any) -> None:
    """It is no reason to refuse a task."""
    header = {**STEP_TASK.header(), "trace": found}
    assert Envelope.from_header(header, STEP_TASK.payload).trace == {}


# --- runs, attempts, steps ---


class Traced(FakeDispatcher):
    """Executes steps in a process that is traced too."""

    def __init__(self, clock: Clock, instance: DagsterInstance, tracing: Tracing) -> None:
        super().__init__(clock, instance)
        self.tracing = tracing
        self.current: list[int] = []

    def execute(self, task: StepTask) -> TaskResult:
        runner = TaskRunner(tracing=self.tracing)
        arrival = Arrival(task.queue, task.attempt, 1.5, time.time() - 2, task.trace)
        result = runner.execute_plan(task.make_payload(), PLACE, arrival)
        self.current.append(trace.get_current_span().get_span_context().span_id)
        return result


class Spans:
    """What was exported."""

    def __init__(self, exporter: InMemorySpanExporter) -> None:
        self._exporter = exporter

    def all(self) -> list[ReadableSpan]:
        return list(self._exporter.get_finished_spans())

    def named(self, name: str) -> list[ReadableSpan]:
        """In the order in which they began."""
        found = [span for span in self.all() if span.name == name]
        return sorted(found, key=lambda span: span.start_time or 0)

    def one(self, name: str) -> ReadableSpan:
        (span,) = self.named(name)
        return span

    def parents(self) -> dict[str, str | None]:
        """By name, the name of a span's parent."""
        names = {span.context.span_id: span.name for span in self.all()}
        return {it.name: it.parent and names[it.parent.span_id] for it in self.all()}


def ending(span: ReadableSpan) -> tuple[StatusCode, object, object]:
    """Status, outcome, and whether the attempt is retried."""
    attributes = span.attributes or {}
    return (
        span.status.status_code,
        attributes.get("dagster_taskiq.outcome"),
        attributes.get("dagster_taskiq.is_retried"),
    )


@pytest.fixture
def exporter() -> InMemorySpanExporter:
    return InMemorySpanExporter()


@pytest.fixture
def spans(exporter: InMemorySpanExporter) -> Spans:
    return Spans(exporter)


@pytest.fixture
def tracing(exporter: InMemorySpanExporter) -> OtelTracing:
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    return OtelTracing(provider)


@pytest.fixture(scope="module")
def instance(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DagsterInstance]:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("DAGSTER_HOME", raising=False)
        with DagsterInstance.local_temp(str(tmp_path_factory.mktemp("instance"))) as instance:
            yield instance


@pytest.fixture
def fake(
    tracing: OtelTracing, instance: DagsterInstance, monkeypatch: pytest.MonkeyPatch
) -> Traced:
    return install(Traced(Clock(), instance, tracing), monkeypatch)


def install(fake: Traced, monkeypatch: pytest.MonkeyPatch) -> Traced:
    monkeypatch.delenv("DAGSTER_HOME", raising=False)
    loop = partial(core_execution_loop, now=fake.clock.monotonic)
    monkeypatch.setattr(executor_module, "core_execution_loop", loop)
    monkeypatch.setattr(executor_module, "find_tracing", lambda: fake.tracing)
    monkeypatch.setattr(executor_module, "_open_dispatcher", lambda *_: fake)
    return fake


def test_one_trace_from_the_run_to_the_code_of_a_step(
    fake: Traced, instance: DagsterInstance, spans: Spans, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each span under the one that it is part of; the step's code finds its own as the current."""
    seen: list[trace.SpanContext] = []
    monkeypatch.setattr(
        jobs, "on_trace", lambda: seen.append(trace.get_current_span().get_span_context())
    )
    ran = execute(jobs.traced_job, instance)
    assert ran.status is SUCCESS
    assert spans.parents() == {
        "run traced_job": None,
        "step traced": "run traced_job",
        "submit dagster": "step traced",
        "queue dagster": "step traced",
        "execute traced": "step traced",
    }
    assert len({span.context.trace_id for span in spans.all()}) == 1
    assert {span.status.status_code for span in spans.all()} <= {StatusCode.OK, StatusCode.UNSET}
    executed = spans.one("execute traced")
    assert [it.span_id for it in seen] == [executed.context.span_id]
    assert fake.current == [0], "the step's span is not the current one any more"
    attributes = executed.attributes or {}
    assert attributes["dagster.run_id"] == ran.run_id
    assert attributes["dagster_taskiq.worker"] == PLACE.worker
    attempt = spans.one("step traced")
    assert ending(attempt) == (StatusCode.OK, "succeeded", False)
    assert (attempt.attributes or {})["dagster_taskiq.worker"] == PLACE.worker
    waited = spans.one("queue dagster")
    assert (waited.end_time or 0) - (waited.start_time or 0) == pytest.approx(1.5e9, rel=0.01)
    # people find the trace by the step's event
    trace_id = trace.format_trace_id(executed.context.trace_id)
    (said,) = (event for event in ran.events if "Executing step" in str(event.message))
    assert said.engine_event_data.metadata["trace id"].value == trace_id


def test_each_attempt_of_a_step_has_its_span(
    fake: Traced, instance: DagsterInstance, spans: Spans
) -> None:
    """Those that are retried end with the reason, under the run that succeeds in the end."""
    fake.on_wait = lambda _: time.sleep(0.001)  # Dagster delays retries by the real clock
    assert execute(jobs.retry_job, instance).status is SUCCESS
    attempts = spans.named("step third_time")
    retried = (StatusCode.ERROR, "failed", True)
    assert [ending(it) for it in attempts] == [
        retried,
        retried,
        (StatusCode.OK, "succeeded", False),
    ]
    assert attempts[0].status.description == "ValueError: attempt 0"
    assert [(it.attributes or {})["dagster.attempt"] for it in attempts] == [1, 2, 3]
    executions = spans.named("execute third_time")
    assert [it.parent and it.parent.span_id for it in executions] == [
        it.context.span_id for it in attempts
    ]
    assert executions[0].status.status_code is StatusCode.ERROR
    assert "attempt 0" in str(executions[0].status.description)
    assert spans.one("run retry_job").status.status_code is StatusCode.OK


def test_what_fails_ends_its_spans_with_the_reason(
    fake: Traced, instance: DagsterInstance, spans: Spans
) -> None:
    """The run's too; what only depended on it was no attempt."""
    execute(jobs.exhausted_job, instance)
    last = spans.named("step never")[-1]
    assert ending(last) == (StatusCode.ERROR, "failed", False)
    assert "never" in str(last.status.description)
    run = spans.one("run exhausted_job")
    assert run.status.status_code is StatusCode.ERROR
    assert run.status.description == "1 step has failed."
    assert spans.named("step add_one") == []


def test_a_lost_attempt_ends_as_lost(fake: Traced, instance: DagsterInstance, spans: Spans) -> None:
    """With the worker that had it, and retried where its policy says so."""
    fake.plan["patient"] = [EXPIRE_STARTED, RUN]
    assert execute(jobs.patient_job, instance).status is SUCCESS
    lost, second = spans.named("step patient")
    assert ending(lost) == (StatusCode.ERROR, "lost", True)
    assert "The worker is gone" in str(lost.status.description)
    assert (lost.attributes or {})["dagster_taskiq.worker"] == PLACE.worker
    assert ending(second) == (StatusCode.OK, "succeeded", False)


def test_a_cancelled_attempt_ends_with_the_run(
    fake: Traced, instance: DagsterInstance, spans: Spans
) -> None:
    """What waited in its queue is withdrawn; nothing is left open."""
    fake.plan["one"] = [WAIT]
    fake.on_wait = lambda number: os.kill(os.getpid(), signal.SIGTERM) if number == 2 else None
    execute(jobs.single_job, instance)
    withdrawn = spans.one("step one")
    assert ending(withdrawn) == (StatusCode.ERROR, "cancelled", False)
    assert "before a worker had started" in str(withdrawn.status.description)
    assert spans.one("run single_job").status.status_code is StatusCode.ERROR


def test_what_is_not_sampled_is_not_sampled_anywhere(
    exporter: InMemorySpanExporter, instance: DagsterInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The child goes by the flag in the message, whatever its own sampler."""
    off = TracerProvider(sampler=ALWAYS_OFF)
    on = TracerProvider()
    for provider in (off, on):
        provider.add_span_processor(SimpleSpanProcessor(exporter))
    fake = install(Traced(Clock(), instance, OtelTracing(off)), monkeypatch)
    in_run, fake.tracing = fake.tracing, OtelTracing(on)
    monkeypatch.setattr(executor_module, "find_tracing", lambda: in_run)
    assert execute(jobs.single_job, instance).status is SUCCESS
    flags = int(fake.sent[0].trace["traceparent"].rpartition("-")[2], 16)
    assert not flags & trace.TraceFlags.SAMPLED
    assert exporter.get_finished_spans() == ()


class Broken(SpanProcessor):
    """A user's own, which raises."""

    def on_start(self, span: Any, parent_context: Any = None) -> None:
        raise ValueError("no such attribute")

    def on_end(self, span: Any) -> None:
        raise ValueError("no such attribute")


def test_an_error_of_a_tracer_fails_nothing(
    instance: DagsterInstance,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """It is logged once for each kind."""
    traces_otel._log_error.cache_clear()
    provider = TracerProvider()
    provider.add_span_processor(Broken())
    install(Traced(Clock(), instance, OtelTracing(provider)), monkeypatch)
    assert execute(jobs.diamond_job, instance).status is SUCCESS
    said = [it.message for it in caplog.records if "Tracing fails" in it.message]
    assert "Tracing fails in OtelTracing.run; said once." in said
    assert len(said) == len(set(said))


# --- the end of a step ---


class Silent(SpanExporter):
    """Does not come back until it is told to."""

    def __init__(self) -> None:
        self.go_on = threading.Event()
        self.flushes = 0

    def export(self, spans: Any) -> SpanExportResult:
        return SpanExportResult.SUCCESS

    def force_flush(self, timeout_millis: int = 30000) -> bool:
        self.flushes += 1
        return self.go_on.wait(SECONDS)


def test_an_exporter_that_does_not_answer_holds_up_no_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It is waited for once, for a moment, and not again while it is still at it."""
    monkeypatch.setattr(traces_otel, "FLUSH_SECONDS", 0.05)
    exporter = Silent()
    provider = TracerProvider(shutdown_on_exit=False)
    tracing = OtelTracing(provider)
    monkeypatch.setattr(provider, "force_flush", exporter.force_flush)
    began = time.monotonic()
    tracing.flush()
    tracing.flush()
    assert time.monotonic() - began < SECONDS / 2
    assert exporter.flushes == 1
    exporter.go_on.set()
    assert tracing._flushing is not None
    tracing._flushing.join(SECONDS)
    tracing.flush()
    assert exporter.flushes == 2


# --- whether there is anything to trace for ---


@pytest.fixture
def no_provider(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Whatever other tests of this process have set."""
    proxy = ProxyTracerProvider()
    monkeypatch.setattr(trace, "get_tracer_provider", lambda: proxy)
    caches = (traces._is_installed, traces_otel._configure)
    for it in caches:
        it.cache_clear()
    yield
    for it in caches:
        it.cache_clear()


_EAGER = """
import sys
from dagster import DagsterInstance, execute_job, reconstructable
from dagster_taskiq_tests.unit.loop_jobs import single_job
config = {"execution": {"config": {"config_source": {"task_always_eager": True}}}}
with DagsterInstance.local_temp(sys.argv[1]) as instance:
    assert execute_job(reconstructable(single_job), instance, config).success
print(sorted(it for it in sys.modules if it.startswith("opentelemetry")), file=sys.stderr)
"""


def run_eager(directory: Path, **variables: str) -> tuple[str, str, str]:
    """Run a job in a process of its own: output, last line of errors, and all of them."""
    done = subprocess.run(
        [sys.executable, "-c", _EAGER, str(directory)],
        env={"PATH": "", "PYTHONPATH": ":".join(sys.path), **variables},
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr.splitlines()[-1], done.stderr


def test_without_a_provider_nothing_is_imported(tmp_path: Path) -> None:
    """Though the packages are installed."""
    assert run_eager(tmp_path, OTEL_TRACES_EXPORTER="none")[1] == "[]"


def test_open_telemetrys_own_variables_make_a_provider(tmp_path: Path) -> None:
    """Also its sampler, resource and the rest, as it reads them itself."""
    output, _, _ = run_eager(
        tmp_path, OTEL_TRACES_EXPORTER="console", OTEL_SERVICE_NAME="the-service"
    )
    decoder, found, rest = json.JSONDecoder(), [], output[output.index("{") :]
    while rest:
        span, end = decoder.raw_decode(rest)
        found.append(span)
        rest = rest[end:].lstrip()
    assert {it["name"] for it in found} == {
        "run single_job",
        "step one",
        "submit dagster",
        "execute one",
    }
    assert len({it["context"]["trace_id"] for it in found}) == 1
    assert found[0]["resource"]["attributes"]["service.name"] == "the-service"


@pytest.mark.usefixtures("no_provider")
@pytest.mark.parametrize(
    ("exporter", "protocol", "missing"),
    [
        ("nobody_has_it", None, "'nobody_has_it'"),
        ("otlp", None, "'otlp_proto_grpc'"),
        ("otlp", "http/protobuf", "'otlp_proto_http'"),
        ("otlp", "http/json", "'http/json'"),
    ],
)
def test_an_exporter_that_is_not_installed_is_said_once(
    exporter: str,
    protocol: str | None,
    missing: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """And the run goes on without traces."""
    monkeypatch.setattr(traces_setup, "entry_points", lambda **_: [])
    monkeypatch.setenv(traces.EXPORTER_VARIABLE, exporter)
    if protocol is not None:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", protocol)
    found = FoundTracing()
    for _ in range(2):
        found.run("run", "job").ended()
    (said,) = caplog.messages
    assert f"OTEL_TRACES_EXPORTER names {exporter!r}, and no exporter {missing} is" in said


@pytest.mark.usefixtures("no_provider")
def test_without_the_packages_it_is_said_what_to_install(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Once, and only where traces are asked for."""
    monkeypatch.setattr(traces, "find_spec", lambda _: None)
    monkeypatch.setenv(traces.EXPORTER_VARIABLE, "otlp")
    for _ in range(2):
        FoundTracing().run("run", "job").ended()
    (said,) = caplog.messages
    assert "pip install 'dagster-taskiq[otel]'" in said


@pytest.mark.usefixtures("no_provider")
def test_a_step_whose_code_sets_the_provider_is_traced(
    monkeypatch: pytest.MonkeyPatch, tracing: OtelTracing, spans: Spans
) -> None:
    """Its code is loaded when its process has been asked for long."""
    found = FoundTracing()
    step = found.step({"traceparent": PARENT})
    attributes: Mapping[str, str | int] = {"dagster.step_key": "s", "dagster_taskiq.queue": "q"}
    found.step({}).begin(attributes, 0, 0)
    monkeypatch.setattr(trace, "get_tracer_provider", lambda: tracing._provider)
    step.begin(attributes, 0, 0)
    step.ended("failed", "why")
    span = spans.one("execute s")
    assert span.parent is not None
    assert trace.format_span_id(span.parent.span_id) == PARENT.split("-")[2]
    assert span.status.description == "why"

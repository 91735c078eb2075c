"""Finds out whether a process is to be traced by OpenTelemetry.

It is, where a tracer provider is set in it, by the user's code or by ``opentelemetry-instrument``;
or where ``OTEL_TRACES_EXPORTER`` names an exporter: then one is made from OpenTelemetry's
variables. Otherwise nothing of OpenTelemetry is imported.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Mapping
from functools import cache
from importlib.util import find_spec

from dagster_taskiq.aio.tracing import RunTrace, StepTrace, TraceContext, Tracing

logger = logging.getLogger(__name__)

#: Names the exporter of a provider that is made here.
EXPORTER_VARIABLE = "OTEL_TRACES_EXPORTER"

#: Of OpenTelemetry's API; whoever sets a provider has imported it.
_API = "opentelemetry.trace"

_NOBODY = Tracing()


class FoundTracing(Tracing):
    """Traces from the first run or step on for which there is a provider.

    It is asked anew for each, since the code of a step may set one when it is loaded.
    """

    def __init__(self) -> None:
        self._tracing: Tracing | None = None

    def run(self, run_id: str, job_name: str) -> RunTrace:
        """See ``Tracing``."""
        return self.find().run(run_id, job_name)

    def step(self, context: TraceContext) -> StepTrace:
        """See ``Tracing``."""
        return _FoundStep(self.find, context)

    def flush(self) -> None:
        """See ``Tracing``."""
        if self._tracing is not None:
            self._tracing.flush()

    def find(self) -> Tracing:
        """What there is now."""
        if self._tracing is None:
            if _API not in sys.modules and not _is_configured():
                return _NOBODY
            self._tracing = _open_tracing(is_configured=_is_configured())
        return self._tracing or _NOBODY


class _FoundStep(StepTrace):
    """A step whose code, when it is loaded, may set the provider."""

    def __init__(self, find: Callable[[], Tracing], context: TraceContext) -> None:
        self._find = find
        self._context = context
        self._trace = StepTrace()

    def begin(self, attributes: Mapping[str, str | int], sent_at: float, claimed_at: float) -> None:
        """See ``StepTrace``."""
        self._trace = self._find().step(self._context)
        self._trace.begin(attributes, sent_at, claimed_at)
        self.trace_id = self._trace.trace_id

    def note(self, outcome: str, reason: str) -> None:
        """See ``StepTrace``."""
        self._trace.note(outcome, reason)

    def ended(self, outcome: str, reason: str) -> None:
        """See ``StepTrace``."""
        self._trace.ended(outcome, reason)


def find_tracing() -> Tracing:
    """The tracing of this process, which a child of a worker is given by the name of this."""
    return FoundTracing()


def _is_configured() -> bool:
    return os.environ.get(EXPORTER_VARIABLE, "none") not in ("", "none")


def _open_tracing(*, is_configured: bool) -> Tracing | None:
    if not _is_installed():
        return None
    from dagster_taskiq.telemetry.traces_otel import open_tracing  # noqa: PLC0415

    return open_tracing(is_configured=is_configured)


@cache
def _is_installed() -> bool:
    """Whether the API is there; said once where it is asked for and is not."""
    is_installed = find_spec("opentelemetry") is not None and find_spec(_API) is not None
    if not is_installed:
        logger.warning(
            "%s is set, but OpenTelemetry is not installed, so nothing is traced: pip install "
            "'dagster-taskiq[otel]'",
            EXPORTER_VARIABLE,
        )
    return is_installed

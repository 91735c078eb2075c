"""A tracer provider by OpenTelemetry's environment variables.

Sampler, resource, limits and batches are read by the SDK itself, endpoints and headers by the
exporters. What is left is to find the exporter, as ``opentelemetry-instrument`` does.
"""

from __future__ import annotations

import os
from importlib.metadata import entry_points

from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor

from dagster_taskiq.errors import ConfigError

#: The exporter of each protocol.
_OTLP = {"grpc": "otlp_proto_grpc", "http/protobuf": "otlp_proto_http"}

#: By priority, the variables that name the protocol.
_PROTOCOL_VARIABLES = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")


def set_up_provider() -> None:
    """Set the provider of this process, with the exporters of ``OTEL_TRACES_EXPORTER``.

    Raises:
        ConfigError: an exporter is not installed.
    """
    provider = TracerProvider()
    for name in os.environ["OTEL_TRACES_EXPORTER"].split(","):
        provider.add_span_processor(BatchSpanProcessor(_exporter_class(name.strip())()))
    trace.set_tracer_provider(provider)


def _exporter_class(name: str) -> type:
    known = _OTLP.get(_protocol(), "") if name == "otlp" else name
    found = list(entry_points(group="opentelemetry_traces_exporter", name=known))
    if not found:
        raise ConfigError(
            f"OTEL_TRACES_EXPORTER names {name!r}, and no exporter {known or _protocol()!r} is "
            "installed; for 'otlp' install opentelemetry-exporter-otlp."
        )
    exporter: type = found[0].load()
    return exporter


def _protocol() -> str:
    named = [value for it in _PROTOCOL_VARIABLES if (value := os.getenv(it))]
    return named[0] if named else "grpc"

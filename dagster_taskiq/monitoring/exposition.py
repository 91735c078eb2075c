"""Metrics as Prometheus reads them."""

from __future__ import annotations

import threading
from collections.abc import Mapping

from prometheus_client import CollectorRegistry, disable_created_metrics
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric

from dagster_taskiq.monitoring.definitions import Definition, MetricType
from dagster_taskiq.monitoring.pages import MakePage, Page

# a second line for each counter and each histogram, which Prometheus itself does not use
disable_created_metrics()  # type: ignore[no-untyped-call]


def family(definition: Definition, values: Mapping[tuple[str, ...], float]) -> Metric:
    """A counter or gauge with its values by their labels."""
    make = CounterMetricFamily if definition.type is MetricType.COUNTER else GaugeMetricFamily
    metric = make(definition.name, definition.text, labels=definition.labels)
    for labels, value in values.items():
        metric.add_metric(labels, value)
    return metric


def metrics_page(registry: CollectorRegistry) -> MakePage:
    """The page with all metrics of a registry."""
    turn = threading.Lock()

    def page(accept: str) -> Page:
        encode, content_type = choose_encoder(accept)
        # several at once would take the interpreter from the worker's event loop
        with turn:
            return Page(encode(registry), content_type=content_type)

    return page

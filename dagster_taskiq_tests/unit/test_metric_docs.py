"""Documents, alerts, dashboard and examples name metrics and labels that there are."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from dagster_taskiq.cli import main
from dagster_taskiq.monitoring.definitions import EXPORTER_METRICS, WORKER_METRICS, MetricType
from dagster_taskiq_tests.cli_runner import cli_runner
from dagster_taskiq_tests.metric_tables import PAGE, written
from dagster_taskiq_tests.unit.test_imports import PACKAGE

MONITORING = PACKAGE.parent / "example" / "monitoring"
EXAMPLES = sorted(MONITORING.iterdir())

#: Of Prometheus itself.
_OF_TARGETS = {"instance", "job"}


def _samples() -> dict[str, set[str]]:
    """The labels of each name that a query may have."""
    found = {}
    for metric in (*WORKER_METRICS, *EXPORTER_METRICS):
        labels = {*metric.labels, *_OF_TARGETS}
        if metric.type is MetricType.HISTOGRAM:
            found[f"{metric.name}_bucket"] = {*labels, "le"}
            found[f"{metric.name}_sum"] = found[f"{metric.name}_count"] = labels
        else:
            found[metric.name] = labels
    return found


SAMPLES = _samples()


def _check_query(query: str) -> None:
    """Every metric in it exists, has the labels that are asked for, and those it is summed by."""
    found = re.findall(r"(dagster_taskiq_\w+)(?:\{([^}]*)\})?", query)
    common = set.intersection(*(SAMPLES[name] for name, _ in found)) if found else _OF_TARGETS
    for name, selector in found:
        assert set(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", selector)) <= SAMPLES[name], query
    for labels in re.findall(r"by\s*\(([^)]*)\)", query):
        assert {it.strip() for it in labels.split(",")} <= common, query
    assert query.count("(") == query.count(")")
    assert re.findall(r"rate\((?!dagster_taskiq_\w+_(?:total|bucket|sum|count)\b)", query) == []


@pytest.mark.parametrize(
    "query",
    [
        "sum(dagster_taskiq_nothing)",
        "dagster_taskiq_queue_depth{worker='x'}",
        "sum by (outcome) (dagster_taskiq_queue_depth)",
        "rate(dagster_taskiq_queue_depth[5m])",
    ],
)
def test_the_check_finds_what_does_not_exist(query: str) -> None:
    """A test that cannot fail would be none."""
    with pytest.raises((AssertionError, KeyError)):
        _check_query(query)


def test_the_tables_of_the_page_are_those_of_the_code() -> None:
    """``python -m dagster_taskiq_tests.metric_tables`` writes them."""
    text = PAGE.read_text(encoding="utf8")
    assert written(text) == text


def test_names_follow_the_conventions_of_prometheus() -> None:
    """Counters end in _total; units are basic ones and last; nothing is there twice."""
    names = [metric.name for metric in (*WORKER_METRICS, *EXPORTER_METRICS)]
    assert len(names) == len(set(names))
    for metric in (*WORKER_METRICS, *EXPORTER_METRICS):
        assert re.fullmatch(r"dagster_taskiq_[a-z_]+", metric.name)
        assert metric.name.endswith("_total") == (metric.type is MetricType.COUNTER)
        assert not re.search(r"_(ms|milliseconds|minutes|kib|mib|percent)(_|$)", metric.name)
        assert not {"run_id", "step_key", "task_id"} & set(metric.labels)
        assert metric.text.endswith(".")
        assert metric.name.startswith("dagster_taskiq_worker_") == (metric in WORKER_METRICS)


def _queries() -> Iterator[tuple[str, str]]:
    for rule in _rules():
        yield rule["alert"], rule["expr"]
    for panel in _dashboard()["panels"]:
        for target in panel.get("targets", ()):
            yield panel["title"], target["expr"]


def _rules() -> list[Mapping[str, Any]]:
    groups = yaml.safe_load((MONITORING / "alerts.yaml").read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def _dashboard() -> Any:
    return json.loads((MONITORING / "dashboard.json").read_text())


@pytest.mark.parametrize(("title", "query"), list(_queries()))
def test_a_query_asks_for_metrics_and_labels_that_there_are(title: str, query: str) -> None:
    _check_query(query)


@pytest.mark.parametrize("rule", _rules(), ids=lambda rule: rule["alert"])
def test_an_alert_says_what_it_knows(rule: Mapping[str, Any]) -> None:
    """Its texts use only labels that its query leaves."""
    assert rule["labels"]["severity"] in ("critical", "warning")
    left = {it for found in re.findall(r"by \(([^)]*)\)", rule["expr"]) for it in found.split(", ")}
    if rule["expr"].startswith("up{"):
        left = _OF_TARGETS
    text = " ".join(rule["annotations"].values())
    assert set(re.findall(r"\$labels\.(\w+)", text)) <= left
    assert rule["annotations"]["summary"]
    for command in re.findall(r"dagster-taskiq ((?:\w+ )?\w+)", text):
        assert cli_runner().invoke(main, [*command.split(), "--help"]).exit_code == 0, command


def test_the_dashboards_variables_are_there_and_ask_for_what_is_there() -> None:
    dashboard = _dashboard()
    variables = dashboard["templating"]["list"]
    queries = [it["query"]["query"] for it in variables if it["type"] == "query"]
    for query in queries:
        ((name, label),) = re.findall(r"label_values\((\w+), (\w+)\)", query)
        assert label in SAMPLES[name]
    used = set(re.findall(r"\$\{?(\w+)", json.dumps(dashboard)))
    assert used - {"__rate_interval", "__all"} == {it["name"] for it in variables}
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert len(ids) == len(set(ids))


def test_panels_do_not_overlap() -> None:
    taken = set()
    for panel in _dashboard()["panels"]:
        at = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(at["x"], at["x"] + at["w"])
            for y in range(at["y"], at["y"] + at["h"])
        }
        assert at["x"] + at["w"] <= 24
        assert not cells & taken, panel["title"]
        taken |= cells


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_an_example_names_metrics_and_options_that_there_are(path: Path) -> None:
    """Also in its comments; it is YAML or JSON."""
    text = path.read_text(encoding="utf8")
    documents = list(yaml.safe_load_all(text))  # JSON is YAML
    assert all(documents)
    for name in re.findall(r"dagster_taskiq_[a-z_]+", text):
        assert name in SAMPLES or f"{name}_bucket" in SAMPLES, name
    for document in documents:
        for command in _commands(document):
            assert cli_runner().invoke(main, [*command, "--help"]).exit_code == 0, command


def _commands(value: Any) -> Iterator[list[str]]:
    """The arguments of each container, without the file that is only there in the image."""
    if isinstance(value, dict):
        for key, item in value.items():
            if key == "args" and item[0] == "dagster-taskiq":
                at = item.index("-y")
                yield [*item[1:at], *item[at + 2 :]]
            yield from _commands(item)
    elif isinstance(value, list):
        for item in value:
            yield from _commands(item)


def test_the_deployments_fit_to_their_autoscalers() -> None:
    """Names of what is scaled, slots of a worker, and time to drain."""
    documents = {
        (document["kind"], document["metadata"]["name"]): document["spec"]
        for path in EXAMPLES
        if path.name in ("kubernetes.yaml", "keda.yaml", "hpa.yaml")
        for document in yaml.safe_load_all(path.read_text())
    }
    assert ("Service", "dagster-taskiq-exporter") in documents
    for scaler, name, target in (
        ("ScaledObject", "worker-short", lambda it: it["triggers"][0]["metadata"]["targetValue"]),
        (
            "HorizontalPodAutoscaler",
            "worker-long",
            lambda it: it["metrics"][0]["external"]["target"]["averageValue"],
        ),
    ):
        spec = documents["Deployment", name]["template"]["spec"]
        arguments = spec["containers"][0]["args"]
        assert documents[scaler, name]["scaleTargetRef"]["name"] == name
        assert target(documents[scaler, name]) == arguments[arguments.index("-c") + 1]
        drain_seconds = int(arguments[arguments.index("--drain-timeout") + 1])
        assert spec["terminationGracePeriodSeconds"] > drain_seconds


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")
@pytest.mark.parametrize(
    "arguments", [("check", "config", "prometheus.yaml"), ("check", "rules", "alerts.yaml")]
)
def test_promtool_takes_the_rules(arguments: tuple[str, ...]) -> None:
    done = subprocess.run(
        ["promtool", *arguments], cwd=MONITORING, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr

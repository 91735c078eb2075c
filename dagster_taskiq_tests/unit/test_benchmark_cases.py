"""The benchmarks' tables of cases and contenders, and the code that they run; needs no server."""

from __future__ import annotations

import importlib
import sys
import time
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import psutil
import pytest
from dagster import Definitions

from benchmarks import processes
from benchmarks.cases import CASES, Case
from benchmarks.contenders import CONTENDERS, FORMER_VARIABLE, former_package
from benchmarks.jobs import JOBS_VARIABLE, define
from benchmarks.processes import Looks, wait_for_rest
from benchmarks.report import targets_table
from benchmarks.results import COLD, FORMER, Results, Sample


@pytest.mark.parametrize("case", CASES.values(), ids=lambda it: it.name)
def test_a_case_is_whole(case: Case) -> None:
    """Its title and jobs can be made, and it measures whom its targets compare."""
    assert "{" not in case.title.format(**asdict(case.plan))
    for name in case.job_names(case.sized(2, 2, 2, 60)):
        assert define(name).name == name
    assert set(case.contenders) <= set(CONTENDERS)
    for contender in [CONTENDERS[name] for name in case.contenders]:
        for target in case.targets if contender.is_judged else ():
            other = target.other(contender.name, contender.peer)
            assert target.against == FORMER or other in {None, *case.contenders}


def test_the_command_line_changes_a_plan() -> None:
    """What it does not say stays as the case has it."""
    plan = CASES["heavy-launch"].sized(None, 3, 5, None)
    assert (plan.slots, plan.runs) == (3, 5)
    assert plan.limit_seconds == CASES["heavy-launch"].plan.limit_seconds


@pytest.mark.parametrize("name", ["taskiq-redis", "celery-redis"])
def test_workers_include_the_same_module(name: str) -> None:
    """Both have the option under the same name; nothing is included unless asked for."""
    for command in CONTENDERS[name].worker_command("file", 2, 2, "a_module"):
        assert command[command.index("-i") + 1] == "a_module"
    assert not any("-i" in it for it in CONTENDERS[name].worker_command("file", 2, 2))


def test_variants_differ_in_what_they_are_compared_for() -> None:
    """No target is theirs; only the cold one's worker is started otherwise."""
    usual, cold, former = (CONTENDERS[f"taskiq-redis{it}"] for it in ("", "-cold", "-former"))
    command, cold_command, former_command = (
        it.worker_command("file", 2, 2)[0] for it in (usual, cold, former)
    )
    assert cold_command == [*command, "--no-warm-code"]
    assert former_command == command
    assert [it.is_judged for it in (usual, cold, former)] == [True, False, False]
    assert cold.peer == former.peer == usual.peer


def test_a_former_version_is_where_the_environment_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not a directory without it, or the present version would be compared with itself."""
    monkeypatch.delenv(FORMER_VARIABLE, raising=False)
    assert former_package() is None
    monkeypatch.setenv(FORMER_VARIABLE, str(tmp_path))
    assert former_package() is None
    (tmp_path / "dagster_taskiq").mkdir()
    assert former_package() == str(tmp_path)


def targets_reached(case: str, **values: dict[str, float]) -> list[tuple[str, str]]:
    """Of taskiq-redis; values by the contender with underscores."""
    samples = [Sample(case, it.replace("_", "-"), 0, values[it]) for it in values]
    rows = targets_table(Results(samples, plans={case: asdict(CASES[case].plan)})).rows
    assert {row[1] for row in rows} == {"taskiq-redis"}
    return [(row[2], row[4]) for row in rows if row[4] in {"met", "unknown"} or FORMER in row[2]]


def test_a_contender_is_compared_with_itself_without_warm_code() -> None:
    """And the cold one has no verdict."""
    reached = targets_reached(
        "heavy-memory",
        taskiq_redis={"worker_mib": 30},
        taskiq_redis_cold={"worker_mib": 100},
        celery_redis={"worker_mib": 60},
    )
    assert reached == [(f"worker_mib at most 0.4 of the {COLD} contender's", "met")]


def test_a_former_version_counts_only_where_it_was_measured() -> None:
    """The user names its package, or there is nothing to say of it."""
    own = {"p50_ms": 7.0}
    assert targets_reached("latency", taskiq_redis=own) == [("p50_ms at most 10", "met")]
    reached = targets_reached("latency", taskiq_redis=own, taskiq_redis_former={"p50_ms": 10.0})
    assert reached[1:] == [("p50_ms at most 0.8 of the former version's", "met")]


def test_the_heavy_location_has_its_assets_and_jobs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also the jobs that the environment names, for workers that must be warmed up."""
    monkeypatch.setenv("DAGSTER_TASKIQ_BENCHMARK_WEIGHT", "0.001")
    monkeypatch.setenv(JOBS_VARIABLE, "sleep_2_500")
    monkeypatch.delitem(sys.modules, "benchmarks.heavy", raising=False)
    heavy = importlib.import_module("benchmarks.heavy")
    monkeypatch.delitem(sys.modules, "benchmarks.heavy")
    definitions = cast("Definitions", heavy.defs())
    assert len(heavy.KEPT) == round(0.001 * heavy.MEMORY_BYTES / 411)
    assert len(list(definitions.resolve_asset_graph().get_all_asset_keys())) == 300
    repository = definitions.get_repository_def()
    names = {job.name for job in repository.get_all_jobs() if not job.name.startswith("__")}
    assert names == {"sleep_2_500", *(f"job_{index}" for index in range(20))}
    assert len(repository.get_job("job_7").nodes) == 1


class Process:
    """Uses a second of CPU time before each of its first looks, and then no more.

    Attributes:
        looked_at: the moment of each look, by ``time.monotonic``.
    """

    def __init__(self, busy_looks: int) -> None:
        self.looked_at: list[float] = []
        self._busy_looks = busy_looks

    def cpu_times(self) -> SimpleNamespace:
        self.looked_at.append(time.monotonic())
        past = float(min(len(self.looked_at), self._busy_looks))
        return SimpleNamespace(user=0.0, system=0.0, children_user=past, children_system=0.0)


def test_processes_are_at_rest_when_they_use_no_more_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also the time of children that have ended counts; the moment is the last busy look's."""
    monkeypatch.setattr(processes, "_REST_SECONDS", 0.3)
    monkeypatch.setattr(processes, "LOOK_AT_STORAGE_SECONDS", 0.02)
    for busy_looks in (4, 1):
        process = Process(busy_looks)
        begun_at = time.monotonic()
        rest_since = wait_for_rest(lambda it=process: [cast("psutil.Process", it)], 60)
        before, busy_at = [begun_at, *process.looked_at][busy_looks - 1 : busy_looks + 1]
        assert before <= rest_since <= busy_at
        assert process.looked_at[-1] - rest_since > 0.3


def test_looks_have_a_mean_and_a_most() -> None:
    """Without a look both are 0: the process was gone before the first."""
    values: Any = iter([1.0, 4.0, 1.0])
    looks = Looks(lambda _: next(values))
    assert (looks.mean, looks.most) == (0, 0)
    for _ in range(3):
        looks(1)
    assert (looks.mean, looks.most) == (2, 4)

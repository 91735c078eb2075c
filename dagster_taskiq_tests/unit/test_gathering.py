"""What the doctor looks at: dagster.yaml, the jobs of a module, and what is not there."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from dagster_taskiq._dagster.instance_facts import read_instance
from dagster_taskiq._dagster.job_facts import IN_MEMORY, IoManager, JobFacts, jobs_of
from dagster_taskiq.config.settings import Settings
from dagster_taskiq.doctor import Level, examine, gather
from dagster_taskiq.errors import ConfigError

JOBS = """\
import dagster as dg
from dagster_taskiq import taskiq_executor


class Own(dg.ConfigurableIOManager):
    def load_input(self, context): ...
    def handle_output(self, context, obj): ...


@dg.op
def one() -> int: return 1


def made(name, manager, executor=taskiq_executor):
    resources = {} if manager is None else {"io_manager": manager}
    @dg.job(name=name, executor_def=executor, resource_defs=resources)
    def the_job(): one()
    return the_job


@dg.asset
def thing(): ...


defs = dg.Definitions(
    assets=[thing],
    jobs=[
        made("usual", dg.fs_io_manager),
        made("nothing", None),
        made("named", dg.FilesystemIOManager(base_dir="/shared")),
        made("unnamed", dg.FilesystemIOManager()),
        made("memory", dg.mem_io_manager),
        made("own", Own()),
        made("configured", dg.fs_io_manager.configured({"base_dir": "/shared"})),
        made("told_late", dg.fs_io_manager.configured(lambda it: it["x"], {"x": str})),
        made("servers", None, taskiq_executor.configured({"broker": "redis://a"})),
        made("elsewhere", dg.fs_io_manager, dg.in_process_executor),
    ],
    executor=dg.in_process_executor,
)
alone = made("alone", dg.fs_io_manager)


@dg.job(
    executor_def=taskiq_executor, config={"execution": {"config": {"backend": "redis://b"}}}
)
def with_config(): one()
"""


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The present one, where modules may lie."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in ("jobs_of_doctor", "broken_of_doctor"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return tmp_path


def io_manager_of(job: JobFacts) -> IoManager:
    (found,) = job.io_managers
    return found


def test_io_managers_of_a_modules_jobs(directory: Path) -> None:
    """Of jobs with our executor: their kind, and the directory where it is known."""
    (directory / "jobs_of_doctor.py").write_text(JOBS)
    found = {it.name: io_manager_of(it) for it in jobs_of("jobs_of_doctor", "taskiq")}
    places = {
        name: (it.is_local, it.directory, it.is_directory_known) for name, it in found.items()
    }
    assert places == {
        "usual": (True, "", True),
        "nothing": (True, "", True),
        "named": (True, "/shared", True),
        "unnamed": (True, "", True),
        "memory": (False, "", True),
        "own": (False, "", True),
        "configured": (True, "/shared", True),
        "told_late": (True, "", False),
        "alone": (True, "", True),
        "servers": (True, "", True),
        "with_config": (True, "", True),
    }
    assert found["memory"].kind == IN_MEMORY
    assert found["own"].kind == "Own"


def test_the_servers_that_a_jobs_code_names(directory: Path) -> None:
    """With its executor, or with its config; others name none."""
    (directory / "jobs_of_doctor.py").write_text(JOBS)
    found = {it.name: it.executor_config for it in jobs_of("jobs_of_doctor", "taskiq")}
    assert found["servers"]["broker"] == "redis://a"
    assert found["with_config"]["backend"] == "redis://b"
    assert not any(found["usual"].get(name) for name in ("broker", "backend"))


@pytest.mark.parametrize("text", [None, "1 / 0", "import no_such_module"])
def test_a_module_that_cannot_be_loaded_is_a_finding(directory: Path, text: str | None) -> None:
    if text is not None:
        (directory / "broken_of_doctor.py").write_text(text)
    with pytest.raises(ConfigError, match="'broken_of_doctor' cannot be loaded here"):
        jobs_of("broken_of_doctor", "taskiq")


def home(directory: Path, text: str) -> Path:
    (directory / "dagster.yaml").write_text(text)
    return directory


def test_an_instance_that_is_set_in_no_way(tmp_path: Path) -> None:
    facts = read_instance(home(tmp_path, ""))
    assert (facts.has_file, facts.has_local_logs, facts.launcher) == (
        True,
        True,
        "DefaultRunLauncher",
    )
    assert (facts.is_monitoring, facts.start_timeout_seconds, facts.resumes) == (False, 180, 0)


def test_an_instance_with_our_launcher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its settings have what ``env:`` stands for."""
    monkeypatch.setenv("BROKER_OF_TEST", "redis://there")
    text = """\
run_launcher:
  module: dagster_taskiq.launcher
  class: TaskiqRunLauncher
  config: {broker: {env: BROKER_OF_TEST}}
run_monitoring: {enabled: true, start_timeout_seconds: 3600, max_resume_run_attempts: 3}
compute_logs:
  module: dagster._core.storage.noop_compute_log_manager
  class: NoOpComputeLogManager
"""
    facts = read_instance(home(tmp_path, text))
    assert facts.launcher_config is not None
    assert facts.launcher_config["broker"] == "redis://there"
    assert (facts.is_monitoring, facts.start_timeout_seconds, facts.resumes) == (True, 3600, 3)
    assert not facts.has_local_logs
    monkeypatch.delenv("BROKER_OF_TEST")
    facts = read_instance(home(tmp_path, text))
    assert facts.launcher_config is None
    assert "BROKER_OF_TEST" in facts.launcher_problem


@pytest.mark.parametrize(
    "text", ["run_launcher: {module: no.such, class: X}", "run_launcher: {module: os, class: X}"]
)
def test_a_launcher_that_is_not_installed_is_a_finding(tmp_path: Path, text: str) -> None:
    facts = read_instance(home(tmp_path, text))
    assert "is not installed here" in facts.launcher_problem


def test_nothing_is_started_to_look_at_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An embedded server that rests goes on resting; other checks are made."""
    monkeypatch.setenv("DAGSTER_HOME", str(home(tmp_path, "")))
    monkeypatch.delenv("DAGSTER_TASKIQ_BROKER_URL", raising=False)
    found = {it.name: finding for it, finding in examine(gather(Settings.from_config({})))}
    assert found["dagster_home"].level is Level.OK
    assert found["broker"].level is Level.FAIL
    assert "no process uses it" in found["broker"].advice
    assert not (tmp_path / "dagster_taskiq").exists()


def test_a_server_that_is_away_is_a_finding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DAGSTER_HOME", str(home(tmp_path, "")))
    settings = Settings.from_config({"broker": "redis://localhost:1"})
    found = {it.name: finding for it, finding in examine(gather(settings))}
    assert found["broker"].level is found["backend"].level is Level.FAIL
    assert "localhost:1" in found["broker"].summary
    assert found["probe"].level is found["workers"].level is Level.SKIP
    assert "localhost:1" in found["redis_data"].summary

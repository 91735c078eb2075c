"""``example/`` and the compose files: they fit together and to what their READMEs say."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from dagster_taskiq.cli import main
from dagster_taskiq.config.settings import Settings
from dagster_taskiq.config.settings_file import load_yaml
from dagster_taskiq.defaults import BACKEND_URL_VARIABLE, BROKER_URL_VARIABLE
from dagster_taskiq.demo.jobs import LONG_QUEUE, SHORT_QUEUE
from dagster_taskiq_tests.cli_runner import cli_runner

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "example"

SERVICES = {
    "postgresql",
    "redis",
    "codelocation",
    "worker-short",
    "worker-long",
    "daemon",
    "webserver",
}


def _services(path: Path) -> dict[str, dict[str, Any]]:
    services: dict[str, dict[str, Any]] = yaml.safe_load(path.read_text())["services"]
    return services


EXAMPLE_SERVICES = _services(EXAMPLE / "docker-compose.yaml")
DEVELOPMENT_SERVICES = _services(ROOT / "docker-compose.yaml")


@pytest.fixture
def _urls(monkeypatch: pytest.MonkeyPatch) -> None:
    environment = EXAMPLE_SERVICES["worker-short"]["environment"]
    for name in (BROKER_URL_VARIABLE, BACKEND_URL_VARIABLE):
        monkeypatch.setenv(name, _default(environment[name]))


def _default(value: str) -> str:
    """What Compose makes of a value where the user's environment says nothing."""
    return re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", value)


@pytest.mark.usefixtures("_urls")
def test_the_settings_are_valid_and_name_the_stacks_own_redis() -> None:
    """Workers and runs read the same file; its variables are those that the services get."""
    settings = Settings.from_config(load_yaml(EXAMPLE / "taskiq.yaml"))
    assert settings.broker_url == settings.backend_url == "redis://redis:6379/0"


def test_the_definitions_load_and_their_jobs_run_on_workers() -> None:
    """As the code location loads them: by the module's name, in a process of their own."""
    script = """
from dagster import Definitions
from example_code.definitions import defs
Definitions.validate_loadable(defs)
for job in defs.resolve_all_job_defs():
    print(job.name, job.executor_def.name)
print([schedule.name for schedule in defs.schedules])
"""
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script],
        capture_output=True,
        text=True,
        check=True,
        cwd=EXAMPLE,
        env={**os.environ, "TASKIQ_YAML": str(EXAMPLE / "taskiq.yaml")},
    )
    *jobs, schedules = run.stdout.splitlines()
    assert {"shop_day taskiq", "report_now taskiq"} <= set(jobs)
    assert all(line.endswith(" taskiq") for line in jobs)
    assert schedules == "['shop_day_schedule']"


def test_the_stack_is_complete() -> None:
    """Every service is watched, and what is to survive a restart is in a volume with a name."""
    assert set(EXAMPLE_SERVICES) == SERVICES
    volumes = set(yaml.safe_load((EXAMPLE / "docker-compose.yaml").read_text())["volumes"])
    for name, service in EXAMPLE_SERVICES.items():
        assert service["healthcheck"]["test"], name
        for volume in service.get("volumes", ()):
            assert volume.partition(":")[0] in volumes, f"{name} mounts a path of the host"
        for other, condition in service.get("depends_on", {}).items():
            assert other in SERVICES
            assert condition == {"condition": "service_healthy"}


@pytest.mark.parametrize(
    ("name", "queue"), [("worker-short", SHORT_QUEUE), ("worker-long", LONG_QUEUE)]
)
def test_the_workers_command_lines_are_accepted(name: str, queue: str) -> None:
    """Their options exist, each listens on its queue, and may drain before Docker kills it."""
    program, *arguments = shlex.split(EXAMPLE_SERVICES[name]["command"])
    assert program == "dagster-taskiq"
    assert arguments[arguments.index("-q") + 1] == queue
    drain_seconds = int(arguments[arguments.index("--drain-timeout") + 1])
    assert EXAMPLE_SERVICES[name]["stop_grace_period"] == "2m"
    assert drain_seconds < 120
    assert arguments[arguments.index("-y") + 1] == "taskiq.yaml"
    # --help last: click parses what stands before it, and ends
    result = cli_runner().invoke(main, [*_without_yaml(arguments), "--help"])
    assert result.exit_code == 0, result.output


def _without_yaml(arguments: list[str]) -> list[str]:
    at = arguments.index("-y")
    return arguments[:at] + arguments[at + 2 :]


def test_every_variable_of_the_configuration_is_set_by_the_stack() -> None:
    """Each ``{env: NAME}`` of the files that the image contains has a value in the services."""
    used = set()
    for file in ("dagster.yaml", "workspace.yaml", "taskiq.yaml"):
        used |= set(_variables(yaml.safe_load((EXAMPLE / file).read_text())))
    assert used
    for name in SERVICES - {"postgresql", "redis"}:
        assert used <= set(EXAMPLE_SERVICES[name]["environment"]), name


def _variables(value: Any) -> list[str]:
    if isinstance(value, Mapping):
        if set(value) == {"env"}:
            return [value["env"]]
        return [name for item in value.values() for name in _variables(item)]
    if isinstance(value, list):
        return [name for item in value for name in _variables(item)]
    return []


def test_the_image_contains_what_its_services_read() -> None:
    """Each file that the Dockerfile copies is there, and not shut out by the ignore file."""
    dockerfile = (EXAMPLE / "Dockerfile").read_text()
    lines = re.findall(r"^COPY (.*)$", dockerfile, re.MULTILINE)
    copied = [path for line in lines for path in line.split()[:-1]]
    allowed = (EXAMPLE / "Dockerfile.dockerignore").read_text().split()
    for path in copied:
        assert (ROOT / path).exists(), path
        assert f"!{path.partition('/')[0]}" in allowed, path


def test_the_readme_names_services_queues_and_jobs_that_exist() -> None:
    """What a newcomer is told to type or to look for."""
    text = (EXAMPLE / "README.md").read_text()
    for name in (*SERVICES, SHORT_QUEUE, LONG_QUEUE, "shop_day", "report_now"):
        assert f"`{name}`" in text, name
    for service in re.findall(r"docker compose (?:exec|logs -f|restart|kill) ([\w-]+)", text):
        assert service in SERVICES, service


def test_the_development_servers_are_reachable_from_this_machine_alone() -> None:
    """They have no passwords worth the name."""
    ports = {port for service in DEVELOPMENT_SERVICES.values() for port in service.get("ports", ())}
    assert {"127.0.0.1:5432:5432", "127.0.0.1:5672:5672", "127.0.0.1:6379:6379"} <= ports
    assert all(port.startswith("127.0.0.1:") for port in ports)

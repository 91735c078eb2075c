"""How Dagster's instance is set, by its dagster.yaml; nothing is connected to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from dagster_taskiq._dagster.instance_storage import instance_ref_of, unusable_config_as_error
from dagster_taskiq._dagster.names import ConfigurableClassData, process_schema
from dagster_taskiq.errors import ConfigError
from dagster_taskiq.servers.urls import redact

#: What Dagster waits for a run that is STARTING, unless told.
_START_TIMEOUT_SECONDS = 180

_LOCAL_LOGS = "LocalComputeLogManager"


@dataclass(frozen=True)
class InstanceFacts:
    """An instance as its dagster.yaml sets it.

    Attributes:
        home: its directory.
        has_file: whether there is a dagster.yaml.
        logs: class of its compute log manager.
        has_local_logs: whether that keeps what steps print on the host of the step.
        launcher: class of its run launcher.
        launcher_module: where that is.
        launcher_config: its settings, with what ``env:`` stands for; None where they are unusable.
        launcher_problem: why they are, in sentences.
        is_monitoring: whether Dagster looks after runs, and after those whose process dies.
        start_timeout_seconds: how long a run may be STARTING.
        resumes: how often it resumes a run whose process died.
    """

    home: Path
    has_file: bool
    logs: str = _LOCAL_LOGS
    has_local_logs: bool = True
    launcher: str = "DefaultRunLauncher"
    launcher_module: str = "dagster"
    launcher_config: Mapping[str, Any] | None = None
    launcher_problem: str = ""
    is_monitoring: bool = False
    start_timeout_seconds: int = _START_TIMEOUT_SECONDS
    resumes: int = 0


def read_instance(home: Path) -> InstanceFacts:
    """The facts of the instance of a DAGSTER_HOME.

    Raises:
        ConfigError: Dagster cannot use its dagster.yaml.
    """
    ref = instance_ref_of(home)
    with unusable_config_as_error(home):
        logs, launcher, settings = ref.compute_logs_data, ref.run_launcher_data, ref.settings
        monitoring: Any = settings.get("run_monitoring") or {}
    config, problem = _config_of(launcher) if launcher else (None, "")
    return InstanceFacts(
        home=home,
        has_file=(home / "dagster.yaml").exists(),
        logs=logs.class_name,
        has_local_logs=logs.class_name == _LOCAL_LOGS,
        launcher=launcher.class_name if launcher else "",
        launcher_module=launcher.module_name if launcher else "",
        launcher_config=config,
        launcher_problem=problem,
        is_monitoring=bool(monitoring.get("enabled")),
        start_timeout_seconds=int(monitoring.get("start_timeout_seconds", _START_TIMEOUT_SECONDS)),
        resumes=int(monitoring.get("max_resume_run_attempts", 0)),
    )


def _config_of(data: ConfigurableClassData) -> tuple[Mapping[str, Any] | None, str]:
    """The settings of a class that dagster.yaml names, or why there are none that it can use."""
    try:
        kind: Any = getattr(import_module(data.module_name), data.class_name)
        config, problems = process_schema(kind.config_type() or {}, data.config_dict)
    except (ImportError, AttributeError) as error:
        return None, f"{data.module_name}.{data.class_name} is not installed here: {error}."
    except ConfigError as error:
        return None, str(error)
    return (None, redact(" ".join(problems))) if problems else (config, "")

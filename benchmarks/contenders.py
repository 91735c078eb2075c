"""Who is measured: executors, and the servers below them.

Every contender runs the same jobs. What differs is the executor that ``jobs.py`` gives them (a
variable of the processes' environment), the run config, and the worker's command line.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

from dagster_taskiq.servers.kinds import ServerOptions

Family = Literal["taskiq", "celery", "multiprocess", "in-process"]
BrokerKind = Literal["rabbitmq", "redis", "embedded", "database"]
#: The names of ``results.COLD`` and ``results.FORMER``.
Variant = Literal["cold", "former"]

#: Queue of the steps, and that of the runs which a launcher sends. dagster-celery's runs need a
#: queue and worker of their own, or they take all slots and wait for steps that never start.
STEP_QUEUE = "dagster"
RUN_QUEUE = "runs"

#: Names a directory with another version's ``dagster_taskiq``, for the contender that runs that.
FORMER_VARIABLE = "DAGSTER_TASKIQ_BENCHMARK_FORMER"


@dataclass(frozen=True)
class Namespace:
    """Where one program run may write on the servers; None for a server that is not there."""

    postgres_url: str
    redis: ServerOptions | None
    rabbitmq: ServerOptions | None

    def offers(self, kind: BrokerKind | None) -> bool:
        """Whether a contender on such a broker can run."""
        if kind == "rabbitmq":
            return self.rabbitmq is not None and self.redis is not None
        return kind != "redis" or self.redis is not None


@dataclass(frozen=True)
class Contender:
    """One way to execute a job.

    Attributes:
        name: as on the command line.
        family: whose executor it is.
        broker: None where there is none; ``database`` is Dagster's.
        peer: the contender of dagster-celery that this one is compared with.
        executor: of the jobs; the family's own if not given.
        is_on_database: whether its backend is Dagster's database.
        variant: what it is to compare with, so that no target is its own: ``cold`` keeps no code
            warm, ``former`` is the version of the package that ``FORMER_VARIABLE`` names.
    """

    name: str
    family: Family
    broker: BrokerKind | None = None
    peer: str | None = None
    executor: Family | None = None
    is_on_database: bool = False
    variant: Variant | None = None

    @property
    def is_judged(self) -> bool:
        """Whether the targets are for it."""
        return self.family == "taskiq" and self.variant is None

    @property
    def job_executor(self) -> Family:
        """Whose executor the jobs get."""
        return self.executor or self.family

    @property
    def has_worker(self) -> bool:
        """Whether steps need a worker that somebody has started."""
        return self.broker is not None

    @property
    def ready_text(self) -> str:
        """What its worker writes when it takes steps."""
        return "is ready" if self.family == "taskiq" else " ready."

    def connection(self, space: Namespace) -> dict[str, Any]:
        """The settings of executor, worker and launcher that say where the servers are."""
        if self.broker == "embedded" or self.broker is None:
            return {}
        if self.broker == "database":
            return {"broker": space.postgres_url}
        assert space.redis is not None
        if self.family == "taskiq":
            settings: dict[str, Any] = {"config_source": {"key_prefix": space.redis.key_prefix}}
            if self.is_on_database:
                settings["backend"] = space.postgres_url
            if self.broker == "redis":
                return {"broker": space.redis.url, **settings}
            assert space.rabbitmq is not None
            # without anything else the backend is Redis
            return {"broker": space.rabbitmq.url, "backend": space.redis.url} | settings
        if self.broker == "rabbitmq":
            assert space.rabbitmq is not None
            url = space.rabbitmq.url.replace("amqp://", "pyamqp://", 1)
            return {"broker": url, "backend": "rpc://"}
        return {
            "broker": space.redis.url,
            "backend": space.redis.url,
            "config_source": _celery_key_prefix(f"{space.redis.key_prefix}-celery"),
        }

    def execution_config(self, space: Namespace, slots: int) -> dict[str, Any]:
        """``execution: config:`` of a run."""
        if self.job_executor == "multiprocess":
            return {"max_concurrent": slots}
        return {} if self.job_executor == "in-process" else self.connection(space)

    def worker_command(
        self, settings_file: str, slots: int, run_slots: int, includes: str | None = None
    ) -> list[list[str]]:
        """The commands that start its workers, one for steps and runs or one for each.

        Args:
            settings_file: with what ``connection`` says.
            slots: for steps.
            run_slots: for runs.
            includes: a module that workers import before there is a task.
        """
        if not self.has_worker:
            return []
        more = ["-i", includes] if includes else []
        if self.family == "taskiq":
            if self.variant == "cold":
                more.append("--no-warm-code")
            return [
                [
                    *(sys.executable, "-m", "dagster_taskiq", "worker", "start"),
                    *("-y", settings_file, "-n", "benchmark"),
                    *("-q", STEP_QUEUE, "-c", str(slots), "--run-slots", str(run_slots), *more),
                ]
            ]
        program = [sys.executable, "-m", "dagster_celery.cli", "worker", "start"]
        options = ["-A", "dagster_celery.app", "-y", settings_file, *more]
        kinds = [(STEP_QUEUE, slots), (RUN_QUEUE, run_slots)]
        return [
            [*program, *options, "-n", queue, "-q", queue, "--", f"--concurrency={count}"]
            for queue, count in kinds
            if count
        ]

    def run_launcher(self, space: Namespace) -> Mapping[str, Any] | None:
        """``run_launcher:`` of dagster.yaml; None for a contender that has none."""
        if self.family == "taskiq":
            module, name, queue = "dagster_taskiq.launcher", "TaskiqRunLauncher", STEP_QUEUE
        elif self.family == "celery":
            module, name, queue = "dagster_celery.launcher", "CeleryRunLauncher", RUN_QUEUE
        else:
            return None
        config = {**self.connection(space), "default_queue": queue}
        return {"module": module, "class": name, "config": config}


def former_package() -> str | None:
    """The directory of the former version's package, if the environment names one."""
    directory = Path(os.environ.get(FORMER_VARIABLE) or os.devnull).absolute()
    return str(directory) if (directory / "dagster_taskiq").is_dir() else None


def _celery_key_prefix(prefix: str) -> dict[str, Any]:
    """Celery's settings that put every key of its own below a prefix."""
    # here, so that the arithmetic of reports needs no Celery
    from dagster_celery.defaults import broker_transport_options  # noqa: PLC0415

    return {
        "broker_transport_options": {**broker_transport_options, "global_keyprefix": prefix},
        "result_backend_transport_options": {"global_keyprefix": prefix},
    }


_CONTENDERS = (
    Contender("taskiq-rabbitmq", "taskiq", "rabbitmq", peer="celery-rabbitmq"),
    Contender("taskiq-redis", "taskiq", "redis", peer="celery-redis"),
    Contender("taskiq-embedded", "taskiq", "embedded", peer="celery-redis"),
    Contender("taskiq-redis-database", "taskiq", "redis", "celery-redis", is_on_database=True),
    Contender(
        "taskiq-rabbitmq-database", "taskiq", "rabbitmq", "celery-rabbitmq", is_on_database=True
    ),
    Contender("taskiq-database", "taskiq", "database", "celery-redis", is_on_database=True),
    Contender("celery-rabbitmq", "celery", "rabbitmq"),
    Contender("celery-redis", "celery", "redis"),
    # what is left under CeleryRunLauncher, where celery_executor fails (README.md)
    Contender("celery-redis-whole-runs", "celery", "redis", executor="in-process"),
    Contender("multiprocess", "multiprocess"),
    Contender("in-process", "in-process"),
)


def _variants(contender: Contender) -> Iterator[Contender]:
    """What one of dagster-taskiq's is compared with; those on the database have none."""
    if contender.family == "taskiq" and not contender.is_on_database:
        for variant in get_args(Variant):
            yield replace(contender, name=f"{contender.name}-{variant}", variant=variant)


CONTENDERS: Mapping[str, Contender] = {
    it.name: it for contender in _CONTENDERS for it in (contender, *_variants(contender))
}

"""Each check of the doctor: green where all is well, and red, or a warning, where it is not."""

from __future__ import annotations

import importlib
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result

from dagster_taskiq._dagster.instance_facts import InstanceFacts
from dagster_taskiq._dagster.job_facts import IN_MEMORY, IoManager, JobFacts
from dagster_taskiq.cli import main
from dagster_taskiq.config.settings import Settings
from dagster_taskiq.connections import name_servers
from dagster_taskiq.doctor import CHECKS, Check, Level, examine, table_of_checks
from dagster_taskiq.doctor.evidence import Evidence, Versions
from dagster_taskiq.doctor.probe import Answer, Probe
from dagster_taskiq.messages.envelope import PROTOCOL, QueueKind
from dagster_taskiq.messages.queue_waits import QueueWait, WaitKind
from dagster_taskiq.messages.worker_records import WorkerRecord
from dagster_taskiq.overview import QueueView, ServerView
from dagster_taskiq.servers.facts import PostgresqlFacts, RedisFacts
from dagster_taskiq_tests.cli_runner import cli_runner
from dagster_taskiq_tests.unit.test_imports import PACKAGE

NOW = 1_700_000_000.0
HERE, ELSEWHERE = "here", "elsewhere"
BROKER, BACKEND = "amqp://rabbit", "redis://redis"
KEYS = {"signing_key": "k" * 32}
OWN = {"broker": BROKER, "backend": BACKEND}


def settings(**values: Any) -> Settings:
    return Settings.from_config({"broker": BROKER, "backend": BACKEND, **values})


WORKER = WorkerRecord(
    "id",
    f"w@{HERE}",
    HERE,
    7,
    ("dagster",),
    slots=4,
    run_slots=2,
    version="1.0",
    protocol=PROTOCOL,
    broker=BROKER,
    dagster="1.13.5",
    python="3.11.7",
    storage="postgresql:abc",
    sent_at=NOW - 3,
)
UNSIGNED = replace(WORKER, is_trusted=False)
FAR = replace(WORKER, worker_id="far", name=f"far@{ELSEWHERE}", host=ELSEWHERE)

INSTANCE = InstanceFacts(
    Path("/home"),
    has_file=True,
    logs="S3ComputeLogManager",
    has_local_logs=False,
    launcher="TaskiqRunLauncher",
    launcher_module="dagster_taskiq.launcher",
    launcher_config={"broker": BROKER, "backend": BACKEND},
    is_monitoring=True,
    start_timeout_seconds=180,
    resumes=3,
)
REDIS = RedisFacts("master", False, True, 0, "noeviction", NOW)
POSTGRESQL = PostgresqlFacts(150004, 97, False, False, True, False, NOW)


def queue(kind: QueueKind, name: str = "dagster", **values: Any) -> QueueView:
    view = QueueView(name, kind, 0, None, None, None, 0, [WORKER.name], None)
    return replace(view, **values)


STEPS, RUNS = queue(QueueKind.STEPS), queue(QueueKind.RUNS)

HEALTHY = Evidence(
    settings=settings(),
    host=HERE,
    now=NOW,
    versions=Versions("1.0", PROTOCOL, "1.13.5", "3.11.7"),
    home="/home",
    instance=INSTANCE,
    storage="postgresql:abc",
    servers=name_servers(settings()),
    server_views=(
        ServerView(("broker",), "RabbitMQ 3.12.1", BROKER, 0.001),
        ServerView(("backend",), "Redis 7.0.15", BACKEND, 0.001),
    ),
    workers=(WORKER, FAR),
    queues=(STEPS, RUNS),
    facts={"broker": None, "backend": REDIS, "instance": POSTGRESQL},
    facts_at={"broker": NOW, "backend": NOW, "instance": NOW},
    probes=(
        Probe(QueueKind.STEPS, "dagster", Answer.ANSWERED, 0.004),
        Probe(QueueKind.RUNS, "dagster", Answer.TAKEN, 0.004),
    ),
    jobs=(JobFacts("job", (IoManager("job", "io_manager", "S3PickleIOManager"),), OWN),),
)


def but(**values: Any) -> Evidence:
    return replace(HEALTHY, **values)


def of_instance(**values: Any) -> Evidence:
    return but(instance=replace(INSTANCE, **values))


def of_worker(**values: Any) -> Evidence:
    """With one more worker, which is like this."""
    return but(workers=(WORKER, replace(FAR, **values)))


def of_redis(**values: Any) -> Evidence:
    return but(facts={"backend": replace(REDIS, **values)})


def of_postgresql(**values: Any) -> Evidence:
    return but(facts={"backend": replace(POSTGRESQL, **values)})


def of_outputs(*found: IoManager) -> Evidence:
    return but(jobs=[JobFacts("job", found)])


def of_executor(**config: Any) -> Evidence:
    return but(jobs=[JobFacts("job"), JobFacts("other", executor_config=config)])


def local(**values: Any) -> IoManager:
    return replace(IoManager("job", "io_manager", "FilesystemIOManager", is_local=True), **values)


def away(role: str) -> Evidence:
    views = [
        replace(it, product=None, seconds=None, problem="Cannot reach it: refused.")
        if role in it.roles
        else it
        for it in HEALTHY.server_views
    ]
    return but(server_views=views)


SILENT = Probe(QueueKind.STEPS, "dagster", Answer.SILENT, 8.0)
OK, SKIP, WARN, FAIL = Level.OK, Level.SKIP, Level.WARN, Level.FAIL


@dataclass(frozen=True)
class Case:
    """What a check finds.

    Attributes:
        says: a part of its summary and advice.
    """

    check: str
    evidence: Evidence
    level: Level
    says: str


CASES = [
    Case("dagster_home", but(home=""), FAIL, "DAGSTER_HOME is not set Set it to the directory"),
    Case("dagster_home", but(instance=None, instance_problem="Dagster cannot."), FAIL, "cannot."),
    Case("dagster_home", but(instance=None), FAIL, "/home is no directory"),
    Case("dagster_home", of_instance(has_file=False), WARN, "no dagster.yaml"),
    Case(
        "same_instance", of_worker(storage="postgresql:x"), FAIL, "far@elsewhere has postgresql:x"
    ),
    Case("same_instance", but(storage=""), SKIP, "no instance"),
    Case("same_instance", but(workers=[replace(WORKER, storage="")]), SKIP, "no worker tells"),
    Case("sqlite", but(storage="sqlite:abc"), FAIL, "there are 2 hosts: elsewhere, here"),
    Case("sqlite", but(storage="sqlite:abc", workers=[FAR]), FAIL, "2 hosts"),
    Case("sqlite", but(storage="sqlite:abc", workers=[WORKER]), OK, "the only host"),
    Case("io_managers", but(jobs=None), SKIP, "-m MODULE"),
    Case("io_managers", but(jobs=()), SKIP, "no job with taskiq_executor"),
    Case("io_managers", but(jobs_problem="No module."), FAIL, "No module."),
    Case("io_managers", of_outputs(IoManager("j", "k", IN_MEMORY)), FAIL, "in memory"),
    Case(
        "io_managers", of_outputs(local()), FAIL, "job (FilesystemIOManager) keep outputs in local"
    ),
    Case("io_managers", of_outputs(local(directory="/shared")), WARN, "outputs in /shared"),
    Case("io_managers", of_outputs(local(is_directory_known=False)), WARN, "of their own"),
    Case("io_managers", replace(of_outputs(local()), workers=[WORKER]), OK, "the only host"),
    Case("compute_logs", of_instance(has_local_logs=True), WARN, "on the host of each step"),
    Case("compute_logs", replace(of_instance(has_local_logs=True), workers=[]), OK, "only host"),
    Case(
        "launcher_servers", of_instance(launcher="DefaultRunLauncher"), SKIP, "DefaultRunLauncher"
    ),
    Case("launcher_servers", of_instance(launcher_problem="No such."), FAIL, "No such."),
    Case(
        "launcher_servers",
        of_instance(launcher_config={"broker": "amqp://b", "backend": BACKEND}),
        FAIL,
        "its broker is amqp://b, key_prefix dagster-taskiq, and here amqp://rabbit",
    ),
    Case(
        "launcher_servers",
        of_instance(launcher_config={"broker": BROKER, "backend": "redis://b"}),
        FAIL,
        "its backend is redis://b",
    ),
    Case(
        "launcher_servers",
        of_instance(
            launcher_config={
                "broker": BROKER,
                "backend": BACKEND,
                "config_source": {"key_prefix": "p"},
            }
        ),
        FAIL,
        "key_prefix p",
    ),
    Case("launcher_servers", but(settings=settings(**KEYS)), FAIL, "signing keys are not those"),
    Case("executor_servers", but(jobs=None), SKIP, "-m MODULE"),
    Case("executor_servers", of_executor(max_concurrent=1), SKIP, "no job's code names servers"),
    Case("executor_servers", of_executor(**OWN), OK, "1 job with the broker"),
    Case(
        "executor_servers",
        of_executor(broker="redis://other"),
        FAIL,
        "job other: its broker is redis://other, key_prefix dagster-taskiq, and here amqp://rabbit",
    ),
    Case("executor_servers", of_executor(broker="nonsense"), FAIL, "settings cannot be used"),
    Case("run_monitoring", of_instance(is_monitoring=False), FAIL, "stays STARTED for ever"),
    Case("run_monitoring", of_instance(resumes=0), WARN, "max_resume_run_attempts is 0"),
    Case("run_monitoring", of_instance(launcher="Other", is_monitoring=False), SKIP, "Other"),
    Case(
        "start_timeout",
        but(queues=[replace(RUNS, depth=1, oldest_sent_at=NOW - 181)]),
        FAIL,
        "for 181 s, and 180 s fail it",
    ),
    Case(
        "start_timeout",
        but(queues=[replace(RUNS, depth=1, oldest_sent_at=NOW - 91)]),
        WARN,
        "for 91 s of 180 s",
    ),
    Case("start_timeout", but(queues=[replace(RUNS, depth=1)]), WARN, "how long is not known"),
    Case("start_timeout", but(queues=None), SKIP, "could not be read"),
    Case("start_timeout", of_instance(is_monitoring=False), SKIP, "run monitoring"),
    Case("broker", away("broker"), FAIL, "Cannot reach it"),
    Case("broker", but(servers_problem="No servers."), FAIL, "No servers."),
    Case("backend", away("backend"), FAIL, "redis://redis does not answer"),
    Case("redis_data", of_redis(eviction="allkeys-lru", memory_limit_bytes=1), FAIL, "evicts keys"),
    Case("redis_data", of_redis(eviction="allkeys-lru"), WARN, "would evict"),
    Case("redis_data", of_redis(has_log=False), WARN, "no append-only file"),
    Case("redis_data", but(facts={}), SKIP, "no Redis or Valkey is used"),
    Case("redis_data", but(facts={}, fact_problems={"backend": "No."}), SKIP, "No."),
    Case("redis_role", of_redis(is_cluster=True), FAIL, "a node of a cluster"),
    Case("redis_role", of_redis(role="slave"), FAIL, "a replica"),
    Case(
        "rabbitmq",
        but(server_views=[ServerView(("broker",), "RabbitMQ 3.7.28", BROKER, 0.001)]),
        WARN,
        "3.7.28 is old",
    ),
    Case(
        "rabbitmq",
        but(server_views=[ServerView(("broker",), "LavinMQ 2.0", BROKER, 0.001)]),
        WARN,
        "is no RabbitMQ",
    ),
    Case("rabbitmq", away("broker"), SKIP, "does not answer"),
    Case("rabbitmq", but(servers=None), SKIP, "no RabbitMQ"),
    Case("postgresql", of_postgresql(is_standby=True), FAIL, "backend: it is a standby"),
    Case("postgresql", of_postgresql(is_read_only=True), FAIL, "read-only"),
    Case("postgresql", of_postgresql(has_fsync=False), FAIL, "fsync is off"),
    Case("postgresql", of_postgresql(version=110022), WARN, "version 11 is old"),
    Case(
        "connections",
        but(facts={"instance": replace(POSTGRESQL, max_connections=9)}),
        FAIL,
        "all workers need 10 connections of 9 when they are idle",
    ),
    Case(
        "connections",
        of_worker(slots=60, run_slots=30),
        WARN,
        "64 slots for steps and 32 for runs may need 106",
    ),
    Case("connections", but(workers=[]), SKIP, "no worker is listed"),
    Case(
        "connections",
        but(facts={"broker": replace(POSTGRESQL, max_connections=10)}),
        WARN,
        "may need 20 connections of 10",
    ),
    Case(
        "connections",
        replace(of_worker(slots=90), facts={"instance": replace(POSTGRESQL, is_pooled=True)}),
        OK,
        "pooler",
    ),
    Case(
        "pooler",
        but(
            servers=name_servers(Settings.from_config({"broker": BACKEND})),
            facts={"backend": replace(POSTGRESQL, is_pooled=True)},
        ),
        WARN,
        "four times a second",
    ),
    Case("pooler", of_postgresql(is_pooled=True), OK, "woken through RabbitMQ"),
    Case("pooler", of_postgresql(), OK, "no pooler"),
    Case("clocks", but(facts={"backend": replace(REDIS, clock=NOW + 60)}), WARN, "60 s ahead"),
    Case("clocks", of_worker(sent_at=NOW + 60), WARN, "far@elsewhere is 60 s ahead of"),
    Case("clocks", of_worker(sent_at=NOW - 90), WARN, "far@elsewhere is 60 s behind"),
    Case(
        "clocks",
        replace(of_worker(sent_at=NOW + 400), settings=settings(**KEYS)),
        FAIL,
        "orders count for 300 s only",
    ),
    Case("clocks", but(facts={}, workers=[]), SKIP, "tells its time"),
    Case("clocks", of_redis(clock=None), OK, "within 1 s"),
    Case("workers", but(workers=()), FAIL, "no worker is alive"),
    Case("workers", but(workers=[], lost_workers=[FAR]), FAIL, "far@elsewhere was lost"),
    Case("workers", but(workers=[replace(WORKER, is_outdated=True)]), FAIL, "no worker is alive"),
    Case("workers", but(lost_workers=[FAR]), WARN, "lost: far@elsewhere"),
    Case("workers", but(workers=None), SKIP, "could not be asked"),
    Case("versions", of_worker(protocol=1), FAIL, "has protocol 1, and here is"),
    Case("versions", of_worker(dagster="1.12.9"), FAIL, "has Dagster 1.12, and here is 1.13"),
    Case("versions", of_worker(dagster="1.13.4"), WARN, "has Dagster 1.13.4"),
    Case("versions", of_worker(version="0.9"), WARN, "has dagster-taskiq 0.9"),
    Case("versions", of_worker(python="3.12.1"), WARN, "has Python 3.12"),
    Case("versions", of_worker(dagster="", python=""), OK, "Dagster 1.13.5"),
    Case("keys", but(settings=settings(**KEYS), workers=[UNSIGNED]), FAIL, "is not signed with"),
    Case("keys", of_worker(key_ids=("abc",)), FAIL, "far@elsewhere"),
    Case("keys", but(workers=[]), SKIP, "no worker"),
    Case("worker_servers", of_worker(other_backend="redis://x"), FAIL, "backend, redis://x"),
    Case("worker_servers", of_worker(broker="amqp://y"), WARN, "listens on amqp://y"),
    Case("worker_servers", but(workers=[]), SKIP, "no worker"),
    Case(
        "queues",
        but(
            queues=[
                STEPS,
                queue(
                    QueueKind.STEPS,
                    "far",
                    depth=1,
                    workers=[],
                    wait=QueueWait(WaitKind.UNSERVED, "Nobody."),
                ),
            ]
        ),
        FAIL,
        "tasks wait in queue far (steps): nobody takes them Nobody.",
    ),
    Case(
        "queues",
        but(queues=[replace(STEPS, workers=[], wait=QueueWait(WaitKind.PAUSED, "Paused.")), RUNS]),
        WARN,
        "queue dagster (steps) is held up Paused. `queue resume`",
    ),
    Case("queues", but(queues=[replace(STEPS, workers=[]), RUNS]), FAIL, "dagster for steps"),
    Case("queues", but(queues=[STEPS]), FAIL, "dagster for runs"),
    Case("queues", replace(of_instance(launcher="Other"), queues=[STEPS]), OK, "1 queue with"),
    Case("queues", but(queues=None), SKIP, "could not be read"),
    Case("probe", but(probes=[SILENT]), FAIL, "no worker took the probe within 8 s"),
    Case(
        "probe",
        but(probes=[replace(SILENT, answer=Answer.FAILED, problem="It refuses.")]),
        FAIL,
        "It refuses.",
    ),
    Case("probe", but(probes=[]), SKIP, "no worker with a free slot"),
    Case("probe", HEALTHY, OK, "dagster to a worker and the backend in 4 ms; dagster (runs) taken"),
]

BY_NAME = {check.name: check for check in CHECKS}


@pytest.mark.parametrize(
    "case", CASES, ids=lambda it: f"{it.check}-{it.level.value}-{it.says[:20]}"
)
def test_what_a_check_finds(case: Case) -> None:
    """Who is told of something wrong is told what to do."""
    finding = BY_NAME[case.check].of(case.evidence)
    assert finding.level is case.level
    assert case.says in f"{finding.summary} {finding.advice}"
    assert bool(finding.advice) == (finding.level in (WARN, FAIL))


@pytest.mark.parametrize("check", CHECKS, ids=lambda it: it.name)
def test_each_check_is_green_where_all_is_well(check: Check) -> None:
    """On PostgreSQL as the backend too."""
    assert check.of(HEALTHY).level is (SKIP if check.name == "pooler" else OK)
    assert check.of(of_postgresql()).level in (OK, SKIP)


@pytest.mark.parametrize("check", CHECKS, ids=lambda it: it.name)
def test_the_cases_here_have_every_level(check: Check) -> None:
    """That the table speaks of."""
    levels = {case.level for case in CASES if case.check == check.name}
    assert levels >= {level for level, says in ((FAIL, check.fails), (WARN, check.warns)) if says}
    assert (FAIL in levels, WARN in levels) == (bool(check.fails), bool(check.warns))


def test_nothing_is_known_and_nothing_breaks() -> None:
    """Where no server is set and nobody is there each check has an answer."""
    bare = Evidence(Settings(), HERE, NOW, HEALTHY.versions, servers_problem="Nothing is set.")
    found = {check.name: finding for check, finding in examine(bare)}
    assert not [name for name, it in found.items() if "has broken" in it.summary]
    assert {name for name, it in found.items() if it.level is FAIL} == {
        "dagster_home",
        "broker",
        "backend",
    }


def test_a_check_that_breaks_says_so() -> None:
    """And keeps no other from being made."""

    def broken(_: Evidence) -> Any:
        raise ZeroDivisionError("by zero")

    finding = Check(broken, "").of(HEALTHY)
    assert (finding.level, finding.summary) == (
        SKIP,
        "this check has broken, ZeroDivisionError: by zero",
    )


# --- the command ---


def call(monkeypatch: pytest.MonkeyPatch, evidence: Evidence, *arguments: str) -> Result:
    # by its name, as the package has the command under that of the module
    module = importlib.import_module("dagster_taskiq.cli.doctor")
    monkeypatch.setattr(module, "gather", lambda *_: evidence)
    return cli_runner().invoke(main, ["doctor", *arguments])


def test_the_command_is_green(monkeypatch: pytest.MonkeyPatch) -> None:
    done = call(monkeypatch, HEALTHY)
    assert (done.exit_code, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert len(lines) == len(CHECKS)
    assert lines[1] == "ok    broker: RabbitMQ 3.12.1 answers within 1 ms, amqp://rabbit"


def test_the_command_is_red(monkeypatch: pytest.MonkeyPatch) -> None:
    """A warning alone is no error."""
    done = call(monkeypatch, replace(away("broker"), lost_workers=[FAR]))
    assert done.exit_code == 1
    assert "FAIL  broker: amqp://rabbit does not answer\n      Cannot reach it" in done.stdout
    assert "WARN  workers: " in done.stdout
    assert done.stderr == "1 check has failed: broker.\n"
    assert call(monkeypatch, but(lost_workers=[FAR])).exit_code == 0


def test_the_commands_json(monkeypatch: pytest.MonkeyPatch) -> None:
    """Documented, like that of the listings."""
    done = call(monkeypatch, away("broker"), "--json")
    assert done.exit_code == 1
    found = json.loads(done.stdout)
    assert found["is_healthy"] is False
    by_name = {it["check"]: it for it in found["checks"]}
    assert set(by_name) == set(BY_NAME)
    assert by_name["broker"]["level"] == "FAIL"
    assert by_name["backend"]["advice"] is None
    text = (PACKAGE.parent / "docs" / "doctor.md").read_text(encoding="utf8")
    assert all(f"`{key}`" in text for key in ("checks", "is_healthy", *by_name["broker"]))


def test_texts_of_others_are_made_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    evidence = but(lost_workers=[replace(FAR, name="a\x1b[2Jb\nc")])
    done = call(monkeypatch, evidence)
    assert "\x1b" not in done.stdout
    assert len([line for line in done.stdout.splitlines() if line[0] != " "]) == len(CHECKS)


def test_the_document_has_the_table_of_the_code() -> None:
    """``python -m dagster_taskiq_tests.doctor_table`` writes it."""
    assert table_of_checks() in (PACKAGE.parent / "docs" / "doctor.md").read_text(encoding="utf8")

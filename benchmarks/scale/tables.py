"""The tables of ``docs/scaling.md``, in Markdown, from a file of figures."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from benchmarks.machine import sentence_of
from benchmarks.report import Table, number
from benchmarks.scale.crowd import CROWDS
from benchmarks.scale.model import Cluster, Resource, lease_costs, limits, needs, shares

SLOTS = (100, 1_000, 10_000)
STEP_SECONDS = {1: "1 s", 60: "60 s", 600: "10 min"}

#: Contenders that are measured, as the tables name them.
CONTENDERS = {"taskiq-redis": "Redis", "taskiq-rabbitmq": "RabbitMQ and Redis"}

Document = Mapping[str, Any]


def render(document: Document) -> dict[str, str]:
    """All tables that the figures suffice for, by name."""
    found: dict[str, str] = {"machine": sentence_of(document["machine"])}
    if document.get("measured"):
        found |= {"steps": _steps(document), "idle": _idle(document)}
    if document.get("simulated"):
        found["simulated"] = _simulated(document)
    if document.get("knee"):
        found["knee"] = _knee(document)
    if document.get("measured") and set(CROWDS) <= set(document.get("simulated") or ()):
        found |= {
            "costs": _costs(document),
            "check": _check(document),
            "first": _first(document),
            **{f"needs {name}": _needs(document, name) for name in document["measured"]},
        }
    return found


#: Of a line or column: its text, the name of its figure, what the figure is multiplied by.
_Line = tuple[str, str, float]


def _grid(head: str, columns: Mapping[str, Any], lines: Iterable[_Line]) -> str:
    """A table of figures; a line that no column has is left out."""
    rows = []
    for text, key, factor in lines:
        found = [it.get(key) for it in columns.values()]
        if any(value is not None for value in found):
            rows.append([text, *(_scaled(value, factor) for value in found)])
    return Table([head, *columns], rows).markdown()


def _scaled(value: float | None, factor: float) -> str:
    return number(None if value is None else value * factor)


def _by_name(document: Document) -> dict[str, Any]:
    return {CONTENDERS.get(name, name): it for name, it in document["measured"].items()}


# --- measured -----------------------------------------------------------------------------------

_STEP_ROWS: Sequence[_Line] = (
    ("loop: CPU of the run's process, ms", "loop_cpu_seconds", 1000),
    ("worker: CPU of its own process, ms", "worker_cpu_seconds", 1000),
    ("child: CPU, ms", "child_cpu_seconds", 1000),
    ("the message, bytes", "amqp_body_bytes", 1),
    ("the result, bytes", "result_bytes", 1),
    ("Redis: round trips", "redis_requests", 1),
    ("Redis: commands, with those inside scripts", "redis_commands", 1),
    ("Redis: bytes in", "redis_input_bytes", 1),
    ("Redis: bytes out", "redis_output_bytes", 1),
    ("Redis: CPU, ms", "redis_cpu_seconds", 1000),
    ("Redis: bytes written to its append-only file", "redis_file_bytes", 1),
    ("Redis: bytes that stay for an hour after the run, in its record", "record_bytes", 1),
    ("RabbitMQ: messages published", "amqp_publish", 1),
    ("RabbitMQ: frames in and out", "amqp_frames", 1),
    ("RabbitMQ: bytes in", "amqp_input_bytes", 1),
    ("RabbitMQ: bytes out", "amqp_output_bytes", 1),
    ("RabbitMQ: CPU, ms", "amqp_cpu_seconds", 1000),
    ("PostgreSQL: rows in the event log", "postgres_event_rows", 1),
    ("PostgreSQL: bytes of these events", "postgres_event_bytes", 1),
    ("PostgreSQL: bytes of the table with its indexes", "postgres_table_bytes", 1),
    ("PostgreSQL: WAL, bytes", "postgres_wal_bytes", 1),
    ("PostgreSQL: transactions", "postgres_commits", 1),
    ("PostgreSQL: connections opened", "postgres_sessions", 1),
    ("PostgreSQL: CPU, ms", "postgres_cpu_seconds", 1000),
)


def _steps(document: Document) -> str:
    steps = {name: it["step"] for name, it in _by_name(document).items()}
    return _grid("of one step", steps, _STEP_ROWS)


_PER_SECOND = (
    ("CPU, % of a core", "cpu_percent"),
    ("Redis: round trips/s", "redis_requests_per_s"),
    ("Redis: bytes in/s", "redis_input_bytes_per_s"),
    ("RabbitMQ: frames/s", "amqp_frames_per_s"),
)
#: Groups of figures that have these.
_WAITING = {
    "idle_worker": "idle worker",
    "idle_run": "run that waits for its one step, the renewal of that step included",
}
#: With the group before the figure's name.
_HELD_ROWS = (
    ("worker: connections to Redis", "worker redis_connections"),
    ("worker: connections to RabbitMQ", "worker amqp_connections"),
    ("worker: open files, without its slots", "worker worker_files"),
    ("worker: open files for each slot", "slot worker_files"),
    ("child: open files", "idle_worker child_files"),
    ("worker: memory without its slots, MiB", "worker mib"),
    ("worker: memory for each slot, MiB", "slot mib"),
    ("slot: connections to PostgreSQL held while idle", "slot postgres_connections"),
    ("run: connections to Redis", "idle_run redis_connections"),
    ("run: connections to RabbitMQ", "idle_run amqp_connections"),
    ("run: connections to PostgreSQL held", "idle_run postgres_connections"),
    ("run: memory, MiB", "idle_run mib"),
    (
        "connections to PostgreSQL at most, seen while two slots and a run worked",
        "peak postgres_connections",
    ),
)


def _idle(document: Document) -> str:
    columns = {
        name: {f"{group} {key}": figures[group][key] for group in figures for key in figures[group]}
        for name, figures in _by_name(document).items()
    }
    rows = [
        (f"{what}: {text}", f"{group} {key}")
        for group, what in _WAITING.items()
        for text, key in _PER_SECOND
    ]
    return _grid("", columns, [(text, key, 1) for text, key in (*rows, *_HELD_ROWS)])


# --- simulated ----------------------------------------------------------------------------------

_SIMULATION_ROWS: Sequence[_Line] = (
    ("workers", "workers", 1),
    ("slots of each", "slots", 1),
    ("lease, s", "lease_seconds", 1),
    ("runs", "runs", 1),
    ("steps ended/s", "steps_per_s", 1),
    ("claims renewed/s", "claims_renewed_per_s", 1),
    ("lists of workers read/s", "inspections_per_s", 1),
    ("server: round trips/s", "requests_per_s", 1),
    ("server: commands/s, with those inside scripts", "commands_per_s", 1),
    ("server: CPU, % of a core", "cpu_percent", 1),
    ("server: MB/s in", "input_bytes_per_s", 1e-6),
    ("server: MB/s out", "output_bytes_per_s", 1e-6),
    ("server: connections", "connections", 1),
    ("server: memory, MiB", "memory_bytes", 2**-20),
    ("renewal of a worker's claims: p50, ms", "renewal_p50_ms", 1),
    ("renewal: p99, ms", "renewal_p99_ms", 1),
    ("renewal: max, ms", "renewal_max_ms", 1),
    ("least slack, % of the lease (5/6 is all there can be)", "worst_slack_share", 100),
    ("claims lost", "lost_claims", 1),
    ("order to cancel to its worker: p50, ms", "cancel_p50_ms", 1),
    ("order to cancel: p99, ms", "cancel_p99_ms", 1),
    ("order to cancel: max, ms", "cancel_max_ms", 1),
    ("simulation: late by, p99, ms", "generator_lag_p99_ms", 1),
    ("simulation: CPU, % of a core", "generator_cpu_percent", 1),
)


def _simulated(document: Document) -> str:
    found = document["simulated"]
    columns = {name: found[name] for name in CROWDS if name in found}
    return _grid("", columns, _SIMULATION_ROWS)


_KNEE_COLUMNS: Sequence[_Line] = (
    ("claims renewed/s", "claims_renewed_per_s", 1),
    ("offered", "offered_claims_per_s", 1),
    ("server: CPU, %", "cpu_percent", 1),
    ("renewal: p50, ms", "renewal_p50_ms", 1),
    ("p99, ms", "renewal_p99_ms", 1),
    ("max, ms", "renewal_max_ms", 1),
    ("least slack, % of the lease", "worst_slack_share", 100),
)


def _knee(document: Document) -> str:
    rows = []
    for level in document["knee"]:
        cells = [_scaled(level.get(key), factor) for _, key, factor in _KNEE_COLUMNS]
        slots = level["claims_renewed_per_s"] * 5  # of a lease of 30 s, renewed every 5 s
        rows.append([f"{level['lease_seconds']:.2f}", *cells, f"{slots:,.0f}"])
    head = ["lease, s", *(text for text, _, _ in _KNEE_COLUMNS), "busy slots at a lease of 30 s"]
    level = document["knee"][0]
    crowd = f"{level['workers']:,} workers with {level['slots']} claims each, {level['server']}:"
    return f"{crowd}\n\n{Table(head, rows).markdown()}"


# --- computed -----------------------------------------------------------------------------------


def _lease(document: Document) -> dict[str, Any]:
    simulated = document["simulated"]
    return lease_costs([simulated[name] for name in ("idle", "busy", "listing")])


def _costs(document: Document) -> str:
    lease = _lease(document)
    rows = [
        [text, number(1e6 * lease[key]["cpu_seconds"]), number(lease[key]["bytes"])]
        for text, key in (
            ("an idle worker, for each second", "worker_second"),
            ("a claim renewed once", "renewed_claim"),
            ("a worker in a list of workers that a run reads", "listed_worker"),
        )
    ]
    table = Table(["", "CPU of the server, µs", "bytes in and out"], rows).markdown()
    return (
        f"{table}\n\nConnections of a worker: {number(lease['connections_per_worker'])}; memory of "
        f"the server for a connection: {number(lease['bytes_per_connection'] / 1024)} KiB."
    )


def _check(document: Document) -> str:
    """What the model says of the simulation that it was not made from."""
    seen = document["simulated"]["working"]
    slots = seen["workers"] * seen["slots"]
    cluster = Cluster(
        slots,
        # as many steps as there were, whatever they were meant to take
        slots / seen["steps_per_s"],
        seen["slots"],
        slots // seen["runs"],
        seen["lease_seconds"],
    )
    found = needs(cluster, next(iter(document["measured"].values())), _lease(document))
    megabytes = (seen["input_bytes_per_s"] + seen["output_bytes_per_s"]) / 1e6
    rows = [
        ("CPU, % of a core", 100 * found[Resource.REDIS_CPU], seen["cpu_percent"]),
        ("in and out, MB/s", found[Resource.REDIS_NETWORK], megabytes),
        ("connections", found[Resource.REDIS_CONNECTIONS], seen["connections"]),
    ]
    cells = [[text, number(computed), number(measured)] for text, computed, measured in rows]
    return Table(["Redis in the simulation *working*", "computed", "seen"], cells).markdown()


def _clusters() -> list[Cluster]:
    return [Cluster(slots, seconds) for slots in SLOTS for seconds in STEP_SECONDS]


def _title(cluster: Cluster) -> str:
    return f"{cluster.slots:,} slots, {STEP_SECONDS[int(cluster.step_seconds)]}"


def _needs(document: Document, name: str) -> str:
    figures, lease = document["measured"][name], _lease(document)
    limit = limits(figures)
    clusters = _clusters()
    found = [needs(cluster, figures, lease) for cluster in clusters]
    rows = [
        ["steps/s", *(number(cluster.steps_per_second) for cluster in clusters), ""],
        *(
            [
                resource.value,
                *(_marked(it[resource], limit[resource]) for it in found),
                number(limit[resource]),
            ]
            for resource in found[0]
        ),
    ]
    return Table(["", *map(_title, clusters), "what there is"], rows).markdown()


def _marked(need: float, limit: float) -> str:
    return f"**{number(need)}**" if need > limit else number(need)


def _first(document: Document) -> str:
    lease = _lease(document)
    rows = []
    for cluster in _clusters():
        cells = []
        for figures in document["measured"].values():
            first = list(shares(cluster, figures, lease).items())[:4]
            said = [f"{it.value.partition(',')[0]} {number(100 * share)} %" for it, share in first]
            cells.append("<br>".join(said))
        rows.append([_title(cluster), *cells])
    return Table(["", *_by_name(document)], rows).markdown("---")

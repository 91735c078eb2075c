"""``worker ping``: a health check, which imports neither Dagster nor Taskiq.

Dagster is imported after all where the servers are found by a dagster.yaml that names a storage.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Mapping, Sequence

import click

from dagster_taskiq.backend import Backend
from dagster_taskiq.cli.asking import ask_backend
from dagster_taskiq.cli.completing import complete_worker
from dagster_taskiq.cli.finding import explain_names, no_worker
from dagster_taskiq.cli.options import config_yaml_option, read_settings, say_errors
from dagster_taskiq.cli.tables import plain_line
from dagster_taskiq.errors import DagsterTaskiqError
from dagster_taskiq.messages.control import ping_order, refuses
from dagster_taskiq.messages.signing import Signer
from dagster_taskiq.messages.worker_records import WorkerRecord, is_named

#: How long ``worker ping`` waits, unless told. A worker whose backend is PostgreSQL looks for
#: orders every 5 s where there are a thousand.
_PING_SECONDS = 10.0

#: Pauses between two looks for answers: the first, and the longest.
_FIRST_LOOK_SECONDS, _LONGEST_LOOK_SECONDS = 0.005, 0.1


@click.command("ping")
@click.argument("name", shell_complete=complete_worker)
@click.option(
    "--timeout",
    "-t",
    type=click.FloatRange(min=0, min_open=True),
    default=_PING_SECONDS,
    show_default=True,
    help="Seconds to wait for the answer.",
)
@config_yaml_option
@say_errors
@explain_names
def worker_ping(name: str, timeout: float, config_yaml: str | None) -> None:
    """Ask a worker for a sign of life, and say how long its answer took.

    The exit code is 1 where it does not answer in time, or one of several does not.
    """
    settings = read_settings(config_yaml)

    async def ping(backend: Backend) -> tuple[list[WorkerRecord], Mapping[str, float]]:
        running = await backend.workers()
        named = [it for it in running if is_named(it, name)]
        if not named:
            raise DagsterTaskiqError(no_worker(name, running))
        for record in named:
            if refusal := refuses(settings.signer(), record):
                raise DagsterTaskiqError(f"The ping would be of no use: {refusal}")
        return named, await _answers(backend, settings.signer(), named, timeout)

    records, seconds = ask_backend(settings, ping) or ([], {})
    for record in records:
        if record.worker_id in seconds:
            milliseconds = 1000 * seconds[record.worker_id]
            click.echo(plain_line(f"{record.name} has answered within {milliseconds:.0f} ms."))
    silent = ", ".join(it.name for it in records if it.worker_id not in seconds)
    if silent or not records:
        has_not = plain_line(f"No answer within {timeout:g} s from {silent}.")
        raise DagsterTaskiqError(has_not if silent else no_worker(name, []))


async def _answers(
    backend: Backend, signer: Signer, records: Sequence[WorkerRecord], timeout_seconds: float
) -> Mapping[str, float]:
    """After how many seconds each worker has answered, by its id; without those that have not."""
    asked = {}
    for record in records:
        ping_id = uuid.uuid4().hex
        asked[record.worker_id] = ping_id, time.monotonic()
        await backend.send_control(record.worker_id, ping_order(signer, record, ping_id))
    answers: dict[str, float] = {}
    deadline, pause = time.monotonic() + timeout_seconds, _FIRST_LOOK_SECONDS
    while len(answers) < len(asked) and time.monotonic() < deadline:
        await asyncio.sleep(pause)
        pause = min(1.5 * pause, _LONGEST_LOOK_SECONDS)
        for record in await backend.workers():
            ping_id, at = asked.get(record.worker_id, ("", 0.0))
            if ping_id in record.pings and record.is_trusted:
                answers.setdefault(record.worker_id, time.monotonic() - at)
    return answers

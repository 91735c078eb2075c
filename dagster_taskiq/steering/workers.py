"""Orders to workers, and their answers."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dagster_taskiq.backend import Backend
from dagster_taskiq.messages.control import refuses, worker_order
from dagster_taskiq.messages.signing import Signer
from dagster_taskiq.messages.worker_records import WorkerRecord

#: Pauses between two looks for answers: the first, and the longest.
_FIRST_LOOK_SECONDS, _LONGEST_LOOK_SECONDS = 0.005, 0.1


@dataclass(frozen=True)
class Told:
    """Workers that were given an order.

    Attributes:
        records: of those that were told.
        ping_ids: what the record of each that has obeyed names, by the worker's id.
        refusals: why others were not told, since the order would be of no use; sentences.
        told_at: on the monotonic clock, in seconds.
    """

    records: Sequence[WorkerRecord]
    ping_ids: Mapping[str, str]
    refusals: Sequence[str]
    told_at: float


async def give_order(
    backend: Backend, signer: Signer, records: Sequence[WorkerRecord], kind: str, **details: Any
) -> Told:
    """Tell workers to do something; ``answers_of`` waits until they have done it.

    Args:
        kind: see ``OrderKind``, with its details.

    Raises:
        ServerError: the backend is away or refuses.
    """
    refusals, told, ping_ids = [], [], {}
    for record in records:
        if refusal := refuses(signer, record):
            refusals.append(refusal)
            continue
        ping_id = uuid.uuid4().hex
        order = worker_order(signer, record, kind, ping_id, **details)
        await backend.send_control(record.worker_id, order)
        told.append(record)
        ping_ids[record.worker_id] = ping_id
    return Told(told, ping_ids, refusals, time.monotonic())


async def answers_of(backend: Backend, told: Told, timeout_seconds: float) -> Mapping[str, float]:
    """After how many seconds each worker has answered that it has obeyed, by its id.

    Those that have not answered in time are left out.

    Raises:
        ServerError: the backend is away or refuses.
    """
    answers: dict[str, float] = {}
    deadline, pause = time.monotonic() + timeout_seconds, _FIRST_LOOK_SECONDS
    while len(answers) < len(told.records) and time.monotonic() < deadline:
        await asyncio.sleep(pause)
        pause = min(1.5 * pause, _LONGEST_LOOK_SECONDS)
        for record in await backend.workers():
            if told.ping_ids.get(record.worker_id) in record.pings and record.is_trusted:
                answers.setdefault(record.worker_id, time.monotonic() - told.told_at)
    return answers

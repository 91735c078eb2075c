"""Where a Redis saturates: the renewals of a crowd, recorded once and sent again and again.

A worker in Python needs three times as much CPU time for a renewal as the server does, so a crowd
on one machine cannot saturate the server. A renewal is the same bytes each time, though (but for
the name that a new epoch would get), so here the product makes it once for each worker, and
afterwards a loop that does nothing else sends it and waits for the answer.
"""

from __future__ import annotations

import asyncio
import functools
import random
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import redis

from benchmarks.processes import allow_connections
from benchmarks.scale.records import Record, renewal_figures
from benchmarks.scale.redis_stats import RedisStats
from dagster_taskiq.backend import Claim
from dagster_taskiq.backend.redis import RedisBackend
from dagster_taskiq.defaults import INTERRUPT_AFTER_LEASE_SHARE, RENEWALS_PER_LEASE
from dagster_taskiq.messages.results import Place
from dagster_taskiq.messages.signing import Signer
from dagster_taskiq.servers.kinds import ServerOptions
from dagster_taskiq.worker.observer import LeaseRenewal
from dagster_taskiq_tests.proxy import Reader, proxied

#: Of the claims while they are recorded, much longer than all of it takes.
_LEASE_SECONDS = 3600.0

#: So much is left of a lease, at worst, where a worker begins to stop its steps.
STOPS_AT_SLACK_SHARE = 1 - INTERRUPT_AFTER_LEASE_SHARE

#: Renewals a second are multiplied by this from one level to the next.
_GROWTH = 1.25

#: How long to let a level settle, of its time.
_SETTLE_SHARE = 0.25


@dataclass(frozen=True)
class Recorded:
    """A worker's renewal of its claims: what it sends, and how long the answer is."""

    request: bytes
    answer_bytes: int


async def _record_renewals(options: ServerOptions, workers: int, slots: int) -> list[Recorded]:
    """Claim a task for each slot of each worker, and record a renewal of each worker's claims."""
    sent, received = bytearray(), bytearray()

    def make_reader(is_to_server: bool) -> Reader:
        return (sent if is_to_server else received).extend

    with proxied(options.url, make_reader) as proxy:
        direct = RedisBackend(options, Signer())
        through_proxy = RedisBackend(
            ServerOptions(proxy.url, key_prefix=options.key_prefix), Signer()
        )
        await through_proxy.startup()
        run_id = str(uuid.uuid4())
        epoch = await direct.open_run(
            run_id, generation=0, token="t", is_resumable=False, lease_seconds=_LEASE_SECONDS
        )
        found = []
        for _ in range(workers):
            claims = [_claim(run_id, epoch) for _ in range(slots)]
            await asyncio.gather(*(direct.claim(it, needs_live_run=True) for it in claims))
            del sent[:], received[:]
            await through_proxy.renew(claims)
            found.append(Recorded(bytes(sent), len(received)))
        await through_proxy.shutdown()
        await direct.shutdown()
    return found


def _claim(run_id: str, epoch: str) -> Claim:
    worker_id = uuid.uuid4().hex
    return Claim(
        run_id=run_id,
        task_id=str(uuid.uuid4()),
        token=uuid.uuid4().hex,
        lease_seconds=_LEASE_SECONDS,
        epoch=epoch,
        place=Place(f"worker@{worker_id[:12]}", worker_id, worker_id[:12], 12345, 1),
    )


@dataclass
class _Level:
    """One rate, and what is seen at it.

    Attributes:
        slots: claims that each renewal is for.
        record: what was seen since the level began, or has ended.
    """

    lease_seconds: float
    slots: int
    record: Record = field(default_factory=Record)

    @property
    def pause_seconds(self) -> float:
        """Between two renewals of a worker."""
        return self.lease_seconds / RENEWALS_PER_LEASE


class _Replayer(asyncio.Protocol):
    """One worker's connection: it renews after each pause, or once the answer is there."""

    def __init__(self, recorded: Recorded, level: _Level) -> None:
        self._recorded = recorded
        self._level = level
        self._transport: asyncio.WriteTransport | None = None
        self._loop = asyncio.get_running_loop()
        self._due_at = self._loop.time()
        self._sent_at = self._previous_sent_at = 0.0
        self._missing = self._lost = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin at a moment of its own."""
        assert isinstance(transport, asyncio.WriteTransport)
        self._transport = transport
        self._due_at += random.uniform(0, self._level.pause_seconds)
        self._loop.call_at(self._due_at, self._send)

    def _send(self) -> None:
        assert self._transport is not None
        if self._transport.is_closing():
            return
        self._previous_sent_at, self._sent_at = self._sent_at, self._loop.time()
        self._missing, self._lost = self._recorded.answer_bytes, 0
        self._transport.write(self._recorded.request)

    def data_received(self, data: bytes) -> None:
        """Note a whole answer, and plan the next renewal."""
        self._missing -= len(data)
        self._lost += data.count(b"*5\r\n:0\r\n")
        if self._missing > 0:
            return
        now, level = self._loop.time(), self._level
        left = 1 - (now - (self._previous_sent_at or self._sent_at)) / level.lease_seconds
        renewal = LeaseRenewal(level.slots, self._lost, now - self._sent_at, left)
        level.record.renewed(renewal)
        self._due_at = max(now, self._due_at + level.pause_seconds)
        self._loop.call_at(self._due_at, self._send)


def find_knee(
    options: ServerOptions,
    workers: int = 1000,
    slots: int = 8,
    first_lease_seconds: float = 30.0,
    level_seconds: float = 8.0,
) -> Iterator[dict[str, Any]]:
    """Renew the claims of a crowd more and more often until the server cannot follow.

    A lease half as long is the same to the server as twice as many workers.

    Yields:
        the figures of each level: the first is of the lease given, and the last is one at which a
        worker would stop its steps, or at which the server took less than it was offered.
    """
    allow_connections()
    recorded = asyncio.run(_record_renewals(options, workers, slots))
    lease_seconds = first_lease_seconds
    while True:
        figures = asyncio.run(_one_level(options, recorded, slots, lease_seconds, level_seconds))
        yield figures
        if figures["is_saturated"]:
            return
        # finer where it becomes interesting
        lease_seconds /= 2.0 if figures["cpu_percent"] < 30 else _GROWTH


async def _one_level(
    options: ServerOptions,
    recorded: Sequence[Recorded],
    slots: int,
    lease_seconds: float,
    level_seconds: float,
) -> dict[str, Any]:
    level = _Level(lease_seconds, slots)
    loop = asyncio.get_running_loop()
    parts = urlsplit(options.url)
    transports = []
    for one in recorded:
        make = functools.partial(_Replayer, one, level)
        transport, _ = await loop.create_connection(make, parts.hostname or "", parts.port or 6379)
        transports.append(transport)
    with redis.Redis.from_url(options.url) as client:
        await asyncio.sleep(max(level.pause_seconds * 1.5, _SETTLE_SHARE * level_seconds))
        before, began = await asyncio.to_thread(RedisStats.look, client), time.process_time()
        level.record = record = Record()
        await asyncio.sleep(max(level_seconds, 2 * level.pause_seconds))
        level.record = Record()
        after = await asyncio.to_thread(RedisStats.look, client)
        record.cpu_seconds = time.process_time() - began
    for transport in transports:
        transport.abort()
    figures = renewal_figures([record], after.at_seconds - before.at_seconds)
    offered = len(recorded) * slots / level.pause_seconds
    carried, slack = figures["claims_renewed_per_s"] or 0.0, figures["worst_slack_share"] or 0.0
    return {
        "workers": len(recorded),
        "slots": slots,
        "lease_seconds": lease_seconds,
        "offered_claims_per_s": offered,
        **after.figures_since(before),
        **figures,
        "is_saturated": carried < 0.9 * offered or slack < STOPS_AT_SLACK_SHARE,
    }

"""What every backend keeps of attempts that have ended: the last of each group, and counters."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Sequence
from typing import cast

import pytest

from dagster_taskiq.defaults import HISTORY_ENDS, HISTORY_EXPIRES_SECONDS
from dagster_taskiq.messages.attempt_ends import (
    AttemptEnd,
    Counted,
    Counter,
    EndOutcome,
    HistoryBatch,
)
from dagster_taskiq.messages.signing import Signer
from dagster_taskiq_tests.contract.backend_bench import (
    KINDS,
    Bench,
    Kind,
    MemoryHarness,
    PostgresHarness,
    RedisHarness,
    an_end,
    shared_bench,
)

SENT = Counter("queue", "steps", Counted.SENT)
FAILED = Counter("queue", "steps", Counted.FAILED)


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> Kind:
    return cast("Kind", request.param)


@pytest.fixture
def bench(kind: Kind) -> Iterator[Bench]:
    with shared_bench(kind) as bench:
        yield bench


def add(bench: Bench, *ends: AttemptEnd) -> None:
    bench.call(bench.backend.add_history(HistoryBatch(ends)))


def ended(bench: Bench, most: int = HISTORY_ENDS) -> list[str]:
    """The ids of what has ended."""
    return [end.task_id for end in bench.call(bench.backend.ended(most))]


def ends(count: int, outcome: EndOutcome, is_retried: bool = False) -> Sequence[AttemptEnd]:
    """Some ends, one after the other."""
    before = time.time() - count
    name = f"{outcome.value} retried" if is_retried else outcome.value
    return [
        an_end(f"{name} {number}", outcome, ended_at=before + number, is_retried=is_retried)
        for number in range(count)
    ]


def test_a_new_server_has_no_history(bench: Bench) -> None:
    assert ended(bench) == []
    assert bench.call(bench.backend.counts()) == {}


def test_what_ends_is_listed_whole_with_the_newest_first(bench: Bench) -> None:
    """By when it ended, not by when it was told: runs tell it every few seconds."""
    now = time.time()
    whole = an_end(
        "whole",
        EndOutcome.LOST,
        step_key='ä"[x]',
        attempt=3,
        is_retried=True,
        job="job",
        worker="w@h",
        host="h",
        slot=0,
        sent_at=now - 10,
        started_at=now - 9,
        ended_at=now - 1,
    )
    old = an_end("old", EndOutcome.SUCCEEDED, ended_at=now - 2, reason="", step_key="")
    new = an_end("new", ended_at=now)
    add(bench, new, whole)
    add(bench, old)
    assert bench.call(bench.backend.ended()) == [new, whole, old]


@pytest.mark.parametrize(
    ("outcome", "is_retried"),
    [
        (EndOutcome.SUCCEEDED, False),
        (EndOutcome.CANCELLED, False),
        (EndOutcome.FAILED, True),
        (EndOutcome.LOST, True),
    ],
)
def test_many_of_one_kind_push_out_no_failure(
    bench: Bench, outcome: EndOutcome, is_retried: bool
) -> None:
    """The one failure of the night is found behind a thousand others, of which the last are."""
    add(bench, an_end("lost", EndOutcome.LOST), an_end("failed"))
    many = ends(1000, outcome, is_retried)
    for start in range(0, len(many), 250):
        add(bench, *many[start : start + 250])
    found = ended(bench, 5000)  # all that is kept
    assert {"lost", "failed"} < set(found)
    newest = [end.task_id for end in reversed(many)][:HISTORY_ENDS]
    assert [task_id for task_id in found if task_id not in ("lost", "failed")] == newest


def test_the_last_few_of_each_group_can_be_asked_for(bench: Bench) -> None:
    """A page that is refreshed each second need not have all."""
    add(bench, *ends(5, EndOutcome.SUCCEEDED), *ends(5, EndOutcome.FAILED))
    assert set(ended(bench, 2)) == {"succeeded 3", "succeeded 4", "failed 3", "failed 4"}
    assert ended(bench, 0) == []


def test_counters_grow(bench: Bench) -> None:
    other = Counter('a "queue", ä', "runs", Counted.RETRIED)
    for _ in range(2):
        bench.call(bench.backend.add_history(HistoryBatch(counts={SENT: 3, other: 1})))
    bench.call(bench.backend.add_history(HistoryBatch(counts={SENT: 1})))
    assert bench.call(bench.backend.counts()) == {SENT: 7, other: 2}


def test_an_empty_batch_adds_nothing(bench: Bench) -> None:
    add(bench)
    assert ended(bench) == []
    assert bench.call(bench.backend.counts()) == {}


def test_a_batch_that_is_sent_again_counts_once(bench: Bench) -> None:
    """Its answer may have been lost."""
    batch = HistoryBatch([an_end("task")], {FAILED: 1})
    for _ in range(2):
        bench.call(bench.backend.add_history(batch))
    assert ended(bench) == ["task"]
    assert bench.call(bench.backend.counts()) == {FAILED: 1}


def test_many_add_at_once(bench: Bench) -> None:
    """Runs that count the same do not wait for each other for ever, and none is forgotten."""
    backends = [bench.open() for _ in range(4)]
    counters = [Counter(name, "steps", Counted.SENT) for name in "abcdefgh"]

    def batch(number: int) -> HistoryBatch:
        order = counters if number % 2 else counters[::-1]
        added = ends(20, EndOutcome.SUCCEEDED)
        return HistoryBatch(added, dict.fromkeys(order, 1))

    async def add_all() -> None:
        await asyncio.gather(
            *(backends[n % 4].add_history(batch(n)) for n in range(60)),
        )

    bench.call(add_all())
    assert bench.call(bench.backend.counts()) == dict.fromkeys(counters, 60)


def test_the_history_is_no_part_of_the_epoch(bench: Bench) -> None:
    """It neither begins one nor ends with one, unless the server's data goes."""
    epoch = bench.open_run()
    add(bench, an_end("task"))
    assert bench.call(bench.backend.epoch()) == epoch
    bench.harness.restart()
    assert ended(bench) == ["task"]
    add(bench, an_end("later"))
    assert len(ended(bench)) == 2
    bench.harness.forget()
    assert ended(bench) == []
    assert bench.call(bench.backend.counts()) == {}


def test_what_is_old_is_left_out(bench: Bench) -> None:
    """And what claims to be of the future, which would stand before all others for ever."""
    now = time.time()
    add(bench, an_end("old", ended_at=now - HISTORY_EXPIRES_SECONDS - 1))
    add(bench, an_end("future", ended_at=now + 24 * 3600))
    add(bench, an_end("young", ended_at=now - HISTORY_EXPIRES_SECONDS + 60))
    assert ended(bench) == ["young"]


def test_old_ends_go_and_counters_stay(bench: Bench) -> None:
    """By the server's clock, where nothing is added that would push them out."""
    bench.call(bench.backend.add_history(HistoryBatch([an_end("task")], {FAILED: 1})))
    server = bench.harness
    if isinstance(server, MemoryHarness):
        server.sleep(HISTORY_EXPIRES_SECONDS + 1)
    elif isinstance(server, PostgresHarness):
        server.execute("UPDATE {s}.history SET added_at = added_at - interval '8 days'")
        server.execute("UPDATE {s}.batches SET added_at = added_at - interval '8 days'")
        assert ended(bench) == []
        bench.call(bench.backend.tidy())
        assert server.execute("SELECT 1 FROM {s}.history UNION ALL SELECT 1 FROM {s}.batches") == []
    else:
        assert isinstance(server, RedisHarness)
        kept = [ttl for key, ttl in server.ttls().items() if not key.endswith(":counts")]
        assert all(0 < ttl <= HISTORY_EXPIRES_SECONDS for ttl in kept)
        server.client.delete(*(key for key in server.ttls() if ":history:" in key))
    assert ended(bench) == []
    assert bench.call(bench.backend.counts()) == {FAILED: 1}


def test_what_is_not_signed_is_left_out(bench: Bench) -> None:
    """Where there is a key; without one all is shown."""
    signed, other = bench.open(Signer(["k" * 32])), bench.open(Signer(["o" * 32]))
    for name, backend in (("signed", signed), ("other", other), ("unsigned", bench.backend)):
        bench.call(backend.add_history(HistoryBatch([an_end(name)])))
    assert [end.task_id for end in bench.call(signed.ended())] == ["signed"]
    assert sorted(ended(bench)) == ["other", "signed", "unsigned"]


def put_nonsense(bench: Bench) -> None:
    """Put what none of ours writes where the history is."""
    server = bench.harness
    if isinstance(server, RedisHarness):
        server.client.lpush(server.key("history:failed"), b"\xff{", '{"task_id": []}')
        server.client.hset(server.key("counts"), "nonsense", "text")
        server.client.hset(server.key("counts"), '["queue", "steps", "sent"]', "text")
    elif isinstance(server, PostgresHarness):
        server.execute(
            "INSERT INTO {s}.history (group_name, data) VALUES ('failed', '\\xff7b'), ('x', '{}')"
        )
        server.execute("INSERT INTO {s}.counts VALUES ('nonsense', 1), ('[1, 2, 3]', -1)")


def test_nonsense_is_left_out(bench: Bench) -> None:
    """It keeps nothing from being added or read."""
    put_nonsense(bench)
    bench.call(bench.backend.add_history(HistoryBatch([an_end("task")], {SENT: 1, FAILED: 1})))
    assert ended(bench) == ["task"]
    found = bench.call(bench.backend.counts())
    assert found == {SENT: 1, FAILED: 1}


@pytest.mark.parametrize("kind", ["redis"])
def test_a_key_of_another_type_makes_room(kind: Kind) -> None:
    with shared_bench(kind) as bench:
        server = cast("RedisHarness", bench.harness)
        server.client.set(server.key("counts"), "x")
        server.client.set(server.key("history:failed"), "x")
        bench.call(bench.backend.add_history(HistoryBatch([an_end("task")], {SENT: 1})))
        assert ended(bench) == ["task"]
        assert bench.call(bench.backend.counts()) == {SENT: 1}

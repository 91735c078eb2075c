"""What every broker promises: order, who gets what, that nothing is lost, and outages.

One suite over all kinds of servers, the ones in memory first. What only one kind shows is tested
in ``test_redis_broker`` and ``test_amqp_broker``; passwords and TLS in ``test_broker_connections``.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections import Counter
from collections.abc import Awaitable, Iterator
from typing import TypeVar, cast

import pytest

from dagster_taskiq.brokers import Delivery, parking
from dagster_taskiq.brokers.base import Listener
from dagster_taskiq.brokers.looks import MAX_PEEK_BYTES, PriorityGroup, WaitingTask
from dagster_taskiq.errors import (
    ConfigError,
    MalformedTaskError,
    OtherBackendError,
    UnreachableServerError,
)
from dagster_taskiq_tests.contract.broker_bench import (
    AT_ONCE_SECONDS,
    IN_HAND_SECONDS,
    KINDS,
    PATIENCE_SECONDS,
    SECRET,
    Consumer,
    Everything,
    Harness,
    Kind,
    consuming,
    eventually,
    opened,
    opened_harness,
    run,
    task,
)

T = TypeVar("T")


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> Kind:
    """Of the server; pytest goes through the module with one after the other."""
    return cast("Kind", request.param)


@pytest.fixture
def harness(kind: Kind) -> Iterator[Harness]:
    """A server of that kind without queues."""
    with opened_harness(kind) as harness:
        yield harness


# --- order ---


def test_higher_priority_comes_first_and_then_what_was_sent_first(
    harness: Harness,
) -> None:
    async def test() -> None:
        queue = harness.queue()
        priorities = [0, 5, 10, 5, 1, 10, 9, 0, 5]
        async with consuming(harness, queue) as consumer:
            for number, priority in enumerate(priorities):
                await consumer.broker.kick(task(queue, f"{number}", priority=priority))
            seen = [int(await consumer.finish()) for _ in priorities]
        assert seen == sorted(range(len(priorities)), key=lambda number: -priorities[number])

    run(test())


def test_order_holds_across_senders_and_between_kick_and_kick_many(
    harness: Harness,
) -> None:
    async def test() -> None:
        queue = harness.queue()
        async with (
            opened(harness) as first,
            opened(harness) as second,
            consuming(harness, queue) as consumer,
        ):
            for number in range(0, 30, 3):
                await first.kick(task(queue, f"{number}", priority=3))
                await second.kick_many(
                    [task(queue, f"{number + more}", priority=3) for more in (1, 2)]
                )
            assert [int(await consumer.finish()) for _ in range(30)] == list(range(30))

    run(test())


def test_a_missing_priority_is_five_and_others_are_clamped(harness: Harness) -> None:
    async def test() -> None:
        queue = harness.queue()
        async with consuming(harness, queue) as consumer:
            await consumer.broker.kick_many(
                [
                    task(queue, "below", priority=-3),
                    task(queue, "four", priority=4),
                    task(queue, "missing"),
                    task(queue, "text", priority="6"),
                    task(queue, "junk", priority="junk"),
                    task(queue, "ten", priority=10),
                    task(queue, "above", priority=99),
                ]
            )
            seen = [await consumer.finish() for _ in range(7)]
        assert seen == ["ten", "above", "text", "missing", "junk", "four", "below"]

    run(test())


def test_queues_are_looked_at_in_turn(harness: Harness) -> None:
    """A full queue, even one of higher priority, does not starve the others of a listener."""

    async def test() -> None:
        queues = [harness.queue(name) for name in "abc"]
        async with consuming(harness, *queues) as consumer:
            for queue, priority in zip(queues, (9, 5, 1), strict=True):
                await consumer.broker.kick_many(
                    [task(queue, f"{queue[-1]}{number}", priority=priority) for number in range(3)]
                )
            seen = [await consumer.finish() for _ in range(9)]
        assert [{text[0] for text in seen[first : first + 3]} for first in (0, 3, 6)] == [
            set("abc")
        ] * 3
        assert [text for text in seen if text[0] == "a"] == ["a0", "a1", "a2"]

    run(test())


# --- who gets what ---


def test_a_busy_listener_holds_nothing(harness: Harness) -> None:
    """Messages that a listener has not asked for go to those who ask, also after an ack."""

    async def test() -> None:
        queue = harness.queue()
        async with (
            consuming(harness, queue) as busy,
            consuming(harness, queue) as idle,
        ):
            await busy.until_idle()
            await busy.broker.kick_many([task(queue, f"{number}") for number in range(5)])
            assert await busy.finish() == "0"  # acked at its claim, and now busy with it
            assert await busy.broker.depth(queue) == 4
            assert [await idle.finish() for _ in range(4)] == ["1", "2", "3", "4"]

    run(test())


def test_an_idle_listener_takes_one_message_of_all_its_queues(
    harness: Harness,
) -> None:
    """Messages that arrive at once in several queues do not all stick to the first who wakes."""

    async def test() -> None:
        queues = [harness.queue(name) for name in "abcd"]
        async with (
            opened(harness) as sender,
            consuming(harness, *queues) as one,
            consuming(harness, *queues) as other,
        ):
            await one.until_idle()
            await sender.kick_many([task(queue, queue[-1]) for queue in queues])
            first = await one.take()
            rest = [await other.finish() for _ in range(3)]
            assert {first.data.decode(), *rest} == set("abcd")

    run(test())


def test_messages_wait_for_the_first_listener(harness: Harness) -> None:
    async def test() -> None:
        queue = harness.queue()
        async with opened(harness) as sender:
            await sender.kick(task(queue, "early"))
            assert await sender.depth(queue) == 1
        async with consuming(harness, queue) as consumer:
            assert await consumer.finish() == "early"

    run(test())


def test_a_thousand_messages_in_one_go(harness: Harness) -> None:
    async def test() -> None:
        queue = harness.queue()
        async with opened(harness) as sender:
            await sender.kick_many([task(queue, f"{number}") for number in range(1000)])
            assert await sender.depth(queue) == 1000
        async with consuming(harness, queue) as consumer:
            assert [int(await consumer.finish()) for _ in range(1000)] == list(range(1000))

    run(test())


def test_large_messages_arrive_whole(harness: Harness) -> None:
    """Also more of them than are sent in one batch."""

    async def test() -> None:
        queue = harness.queue()
        texts = [f"{number}" * 700_000 for number in range(10)]
        async with consuming(harness, queue) as consumer:
            messages = [task(queue, text) for text in texts]
            for number, message in enumerate(messages):
                message.task_id = f"{number}"
            await consumer.broker.kick_many(messages)
            assert [await consumer.finish() for _ in texts] == texts

    run(test())


def test_every_task_is_done_once_by_several_listeners(harness: Harness) -> None:
    """1,000 tasks, 4 queues, 3 listeners, and senders that go on meanwhile."""

    async def test() -> None:
        queues = [harness.queue(name) for name in "abcd"]
        seen: Counter[str] = Counter()

        async def work() -> None:
            async with consuming(harness, *queues) as consumer:
                while sum(seen.values()) < 1000:
                    try:
                        delivery = await consumer.take(0.2)
                    except asyncio.TimeoutError:
                        continue
                    seen[delivery.data.decode()] += 1
                    await delivery.ack()

        async def send(queue: str) -> None:
            async with opened(harness) as sender:
                for first in range(0, 250, 50):
                    numbers = range(first, first + 50)
                    await sender.kick_many([task(queue, f"{queue[-1]}{n}") for n in numbers])

        await asyncio.gather(*(work() for _ in range(3)), *(send(queue) for queue in queues))
        assert len(seen) == 1000
        assert set(seen.values()) == {1}
        async with opened(harness) as broker:
            assert [await broker.depth(queue) for queue in queues] == [0] * 4

    run(test())


def test_a_task_that_is_sent_again_keeps_its_place_or_comes_twice(harness: Harness) -> None:
    """Waiting or in hand: the sender of the second was not sure about the first."""

    async def test() -> None:
        queue = harness.queue()
        async with consuming(harness, queue) as consumer:
            broker = consumer.broker
            await broker.kick_many([task(queue, text) for text in "abc"])
            await broker.kick(task(queue, "a", priority=1))
            in_hand = await consumer.take()
            await broker.kick_many([task(queue, "a"), task(queue, "b", priority=0)])
            again = [] if harness.is_searchable else ["a", "a", "b"]
            assert await broker.depth(queue) == 2 + len(again)
            await in_hand.release()
            seen = [await consumer.finish() for _ in range(3 + len(again))]
            assert seen == ["a", "b", "c", *again]
            assert await broker.depth(queue) == 0

    run(test())


# --- other queues to listen on ---


def test_an_idle_listener_turns_to_other_queues(harness: Harness) -> None:
    async def test() -> None:
        first, second = harness.queue("first"), harness.queue("second")
        async with consuming(harness, first) as consumer, opened(harness) as sender:
            await consumer.until_idle()
            consumer.broker.listen_on([second])
            await sender.kick_many([task(first, "elsewhere"), task(second, "here")])
            assert await consumer.finish() == "here"
            consumer.broker.listen_on([first, second])
            assert await consumer.finish() == "elsewhere"

    run(test())


def test_a_listener_without_queues_rests_and_what_it_left_is_for_others(harness: Harness) -> None:
    async def test() -> None:
        queue = harness.queue()
        async with consuming(harness, queue) as resting, consuming(harness, queue) as other:
            await resting.until_idle()
            resting.broker.listen_on([])
            await resting.broker.kick_many([task(queue, f"{number}") for number in range(3)])
            assert [await other.finish() for _ in range(3)] == ["0", "1", "2"]
            assert not resting.ask().done()
            await other.stop()
            await resting.broker.kick(task(queue, "after"))
            resting.broker.listen_on([queue])
            assert await resting.finish() == "after"

    run(test())


def test_a_message_in_work_is_settled_whatever_is_listened_on(harness: Harness) -> None:
    async def test() -> None:
        queue, other = harness.queue(), harness.queue("other")
        async with consuming(harness, queue) as consumer:
            await consumer.broker.kick_many([task(queue, "acked"), task(queue, "released")])
            acked, released = await consumer.take(), await consumer.take()
            consumer.broker.listen_on([other])
            consumer.ask()
            await consumer.broker.kick(task(other, "next"))
            next_one = await consumer.take()  # it has turned by now
            await acked.ack()
            await released.release()
            await next_one.ack()
            await eventually(lambda: _has_depth(consumer, queue, 1))
            consumer.broker.listen_on([queue])
            assert await consumer.finish() == "released"

    run(test())


async def _has_depth(consumer: Consumer, queue: str, depth: int) -> bool:
    return await consumer.broker.depth(queue) == depth


def test_what_is_taken_while_the_listener_is_told_to_rest_goes_back(harness: Harness) -> None:
    """A worker that has said that it is paused begins with nothing any more."""

    async def test() -> None:
        queue = harness.queue()
        async with consuming(harness, queue) as consumer, opened(harness) as sender:
            new_listener = consumer.broker.listener

            def listener() -> Listener:
                made = new_listener()
                look = made.look

                async def look_and_be_told() -> Delivery | None:
                    delivery = await look()
                    consumer.broker.listen_on([])
                    return delivery

                made.look = look_and_be_told  # type: ignore[method-assign]
                return made

            consumer.broker.listener = listener  # type: ignore[method-assign]
            await sender.kick(task(queue, "one"))
            pending = consumer.ask()
            await eventually(lambda: _is_back(consumer, queue, pending))
            assert not pending.done()

    run(test())


async def _is_back(consumer: Consumer, queue: str, pending: asyncio.Task[object]) -> bool:
    has_turned = not consumer.broker.queues
    return pending.done() or (has_turned and await _has_depth(consumer, queue, 1))


def test_turning_again_and_again_loses_nothing(harness: Harness) -> None:
    async def test() -> None:
        queues = [harness.queue(f"{number}") for number in range(3)]
        sent = {f"{number}" for number in range(60)}
        async with consuming(harness, *queues) as turning, opened(harness) as sender:
            done: set[str] = set()
            for number in range(60):
                await sender.kick(task(queues[number % 3], f"{number}"))
                turning.broker.listen_on([queues[number % 2]] if number % 5 else [])
                pending = turning.ask()
                if pending.done():
                    done.add(await turning.finish())
            turning.broker.listen_on(queues)
            while done < sent:
                done.add(await turning.finish())
            assert [await sender.depth(queue) for queue in queues] == [0, 0, 0]

    run(test())


# --- settling ---


def test_an_acked_task_is_forgotten(harness: Harness) -> None:
    async def test() -> None:
        queue = harness.queue()
        async with consuming(harness, queue) as consumer:
            await consumer.broker.kick(task(queue, "once"))
            delivery = await consumer.take()
            await delivery.ack()
            await delivery.ack()
            await delivery.release()  # too late, and without effect
            assert delivery.settled
        async with opened(harness) as broker:
            assert await broker.depth(queue) == 0
            assert await broker.absent(queue, ["once"]) == {"once"}

    run(test())


def test_ack_and_release_at_once_settle_once(harness: Harness) -> None:
    async def test() -> None:
        queue = harness.queue()
        async with consuming(harness, queue) as consumer:
            await consumer.broker.kick(task(queue, "once"))
            delivery = await consumer.take()
            await asyncio.gather(delivery.ack(), delivery.release(), delivery.ack())
            assert await consumer.broker.depth(queue) == 0
            await consumer.broker.kick(task(queue, "next"))
            assert await consumer.finish() == "next"

    run(test())


def test_a_released_task_is_back_in_its_place_at_once(harness: Harness) -> None:
    async def test() -> None:
        queue = harness.queue()
        async with (
            consuming(harness, queue) as one,
            consuming(harness, queue) as other,
        ):
            await one.broker.kick_many([task(queue, text, priority=5) for text in "abc"])
            first, second = await one.take(), await one.take()
            await one.broker.kick(task(queue, "d", priority=5))
            await one.broker.kick(task(queue, "e", priority=4))
            await second.release()
            await first.release()
            seen = await other.finish_many(5, AT_ONCE_SECONDS)
        assert seen == ["a", "b", "c", "d", "e"]

    run(test())


def test_a_release_wakes_an_idle_listener(harness: Harness) -> None:
    async def test() -> None:
        queue = harness.queue()
        async with (
            consuming(harness, queue) as one,
            consuming(harness, queue) as idle,
        ):
            await one.broker.kick(task(queue, "a"))
            delivery = await one.take()
            await idle.until_idle()
            await delivery.release()
            assert (await idle.take(AT_ONCE_SECONDS)).data == b"a"

    run(test())


def test_a_dead_listeners_task_goes_back_to_its_place(
    harness: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The connection breaks between the take and the ack, and the worker is never seen again."""
    harness.hasten(monkeypatch, in_hand_seconds=IN_HAND_SECONDS)

    async def test() -> None:
        queue = harness.queue()
        async with consuming(harness, queue) as survivor:
            async with (
                harness.network() as network,
                consuming(network, queue) as victim,
            ):
                await victim.broker.kick_many([task(queue, text) for text in "abc"])
                assert (await victim.take()).data == b"a"
                assert await survivor.finish() == "b"
                network.close()

            async def is_back() -> bool:
                # on Redis a look gives back what is overdue
                delivery = await survivor.take()
                await (delivery.ack if delivery.data == b"a" else delivery.release)()
                return delivery.data == b"a"

            await eventually(is_back)
            assert await survivor.finish() == "c"
            assert await survivor.broker.depth(queue) == 0

    run(test())


def test_what_a_living_worker_has_in_hand_stays_there(
    harness: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For as long as it takes: a launched run is acked only when its code is loaded.

    Then it is given back like any other, or does not come again where it is acked.
    """
    harness.hasten(monkeypatch, in_hand_seconds=2.0, hold_every_seconds=0.1, slow_look_seconds=0.1)

    async def test() -> None:
        queue = harness.queue()
        async with (
            consuming(harness, queue) as slow,
            consuming(harness, queue) as other,
        ):
            await slow.broker.kick_many([task(queue, text) for text in "ab"])
            first, second = await slow.take(), await slow.take()
            with pytest.raises(asyncio.TimeoutError):
                await other.take(harness.in_vain_seconds(3.0))
            await second.ack()
            await first.release()
            assert await other.finish() == "a"
            # longer in hand than it may be without a word, had the ack not ended that
            with pytest.raises(asyncio.TimeoutError):
                await other.take(harness.in_vain_seconds(0.5))

    run(test())


def test_a_shut_down_listeners_task_goes_back(
    harness: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    harness.hasten(monkeypatch, in_hand_seconds=IN_HAND_SECONDS, slow_look_seconds=IN_HAND_SECONDS)

    async def test() -> None:
        queue = harness.queue()
        async with consuming(harness, queue) as consumer:
            await consumer.broker.kick(task(queue, "a"))
            await consumer.take()
        async with consuming(harness, queue) as consumer:
            assert await consumer.finish() == "a"

    run(test())


def test_a_late_release_leaves_another_listeners_task_alone(
    harness: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    harness.hasten(monkeypatch, in_hand_seconds=0.0)

    async def test() -> None:
        queue = harness.queue()
        async with (
            consuming(harness, queue) as other,
            harness.network() as network,
            consuming(network, queue) as slow,
        ):
            await slow.broker.kick(task(queue, "a"))
            late = await slow.take()
            monkeypatch.undo()
            network.cut()
            taken = await other.take()
            await late.release()
            assert await other.broker.depth(queue) == 0
            await taken.release()
            await eventually(lambda: _is(other.broker.depth(queue), 1))

    run(test())


@pytest.mark.parametrize("waits", [True, False], ids=["waits", "in other hands"])
def test_a_late_ack_forgets_the_task_or_raises(
    harness: Harness, monkeypatch: pytest.MonkeyPatch, waits: bool
) -> None:
    """The task went back meanwhile; the worker that acks it has claimed it all the same."""
    harness.hasten(monkeypatch, in_hand_seconds=0.0)

    async def test() -> None:
        queue = harness.queue()
        async with (
            consuming(harness, queue) as other,
            harness.network() as network,
            consuming(network, queue) as slow,
        ):
            await slow.broker.kick(task(queue, "a"))
            late = await slow.take()
            monkeypatch.undo()
            network.cut()
            copy = await other.take()
            if waits:
                await copy.release()
                await eventually(lambda: _is(other.broker.depth(queue), 1))
            if harness.is_searchable:
                await late.ack()
                await copy.release()
                assert await other.broker.depth(queue) == 0
                assert await other.broker.absent(queue, ["a"]) == {"a"}
            else:
                with pytest.raises(UnreachableServerError, match="delivered again"):
                    await late.ack()
                assert not late.settled
                await copy.release()
                assert await other.finish() == "a"

    run(test())


def test_a_listener_that_is_cancelled_leaves_nothing_behind(
    harness: Harness,
) -> None:
    """Wherever the cancel meets it: in the look, in the wait, or as a message comes."""

    async def test() -> None:
        queues = [harness.queue(name) for name in "ab"]
        async with (
            opened(harness) as sender,
            consuming(harness, *queues) as other,
        ):
            for round_ in range(20):
                async with consuming(harness, *queues) as consumer:
                    consumer.ask()
                    await asyncio.sleep(0.001 * round_)
                    sent = asyncio.ensure_future(
                        sender.kick_many([task(queue, f"{round_}") for queue in queues])
                    )
                    await asyncio.sleep(0.0005 * (round_ % 5))
                    await consumer.stop()
                    await sent
                    seen = await other.finish_many(2, AT_ONCE_SECONDS)
                    assert seen == [f"{round_}"] * 2

    run(test())


def test_a_refused_message_is_dropped_and_the_listener_goes_on(harness: Harness) -> None:
    class Good(Everything):
        def admit(self, data: bytes) -> object:
            if data.startswith(b"bad"):
                raise MalformedTaskError("it is bad")
            return data.decode().upper()

    admission = Good()

    async def test() -> None:
        queue = harness.queue()
        async with consuming(harness, queue, admission=admission) as consumer:
            await consumer.broker.kick_many(
                [task(queue, text) for text in ("bad 1", "good 1", "bad 2", "good 2")]
            )
            first = await consumer.take()
            assert first.content == "GOOD 1"
            await first.ack()
            assert await consumer.finish() == "good 2"
            assert admission.refusals == ["it is bad"] * 2
            assert await consumer.broker.depth(queue) == 0
            assert await consumer.broker.absent(queue, ["bad 1"]) == {"bad 1"}

    run(test())


def test_a_message_for_another_worker_goes_back(harness: Harness, kind: Kind) -> None:
    """When what waits behind it has been seen; it keeps its place in the queue."""

    looks: list[bytes] = []

    class Ours(Everything):
        def admit(self, data: bytes) -> object:
            if data.startswith(b"theirs"):
                looks.append(data)
                raise OtherBackendError("it is theirs", "run", b"note on " + data)
            return data

    async def are_seen_again() -> bool:
        return looks.count(b"theirs 3") >= 3

    async def test() -> None:
        queue = harness.queue()
        async with opened(harness) as sender:
            await sender.take_note("run")
            texts = ("theirs 1", "theirs 2", "ours 1", "theirs 3", "ours 2")
            await sender.kick_many([task(queue, text) for text in texts])
            async with consuming(harness, queue, admission=Ours()) as consumer:
                assert await consumer.finish_many(2, AT_ONCE_SECONDS) == ["ours 1", "ours 2"]
                # a worker whose slots are taken asks for nothing: it must not hold them meanwhile
                await eventually(lambda: holds(sender.depth(queue), 3))
                # one that has nothing else to do looks at them again and again
                consumer.ask()
                await eventually(are_seen_again)
            note = await sender.take_note("run")
            assert note is not None
            assert note.startswith(b"note on theirs")
            assert await sender.take_note("another run") is None
            async with consuming(harness, queue) as consumer:
                seen = await consumer.finish_many(3, AT_ONCE_SECONDS)
                assert seen == ["theirs 1", "theirs 2", "theirs 3"]

    run(test())


async def holds(value: Awaitable[int], expected: int) -> bool:
    return await value == expected


def test_many_messages_for_another_worker_keep_no_worker_from_its_own(
    harness: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As long as a worker may keep so many, whatever their priority."""

    class Ours(Everything):
        def admit(self, data: bytes) -> object:
            if data.startswith(b"theirs"):
                raise OtherBackendError("it is theirs", "run", b"note")
            return data

    monkeypatch.setattr(parking, "MOST_PARKED", 20)

    async def test() -> None:
        queue = harness.queue()
        async with opened(harness) as sender:
            theirs = [task(queue, f"theirs {number}", priority=9) for number in range(19)]
            await sender.kick_many([*theirs, task(queue, "ours", priority=0)])
            async with consuming(harness, queue, admission=Ours()) as consumer:
                assert await consumer.finish() == "ours"
            async with consuming(harness, queue) as consumer:
                seen = await consumer.finish_many(19, PATIENCE_SECONDS)
                assert seen == [message.task_id for message in theirs]

    run(test())


# --- looking into a queue ---


def test_depth_counts_what_waits(harness: Harness) -> None:
    async def test() -> None:
        queue, other = harness.queue(), harness.queue("other")
        async with consuming(harness, queue) as consumer:
            broker = consumer.broker
            assert await broker.depth(queue) == 0
            assert await broker.depth(other) == 0  # does not exist on RabbitMQ
            await broker.kick_many([task(queue, text) for text in "abc"])
            assert await broker.depth(queue) == 3
            delivery = await consumer.take()
            assert await broker.depth(queue) == 2
            await delivery.release()
            await eventually(lambda: _is(broker.depth(queue), 3))
            await broker.kick(task(other, "d"))
            assert await broker.depth(other) == 1

    run(test())


async def _is(value: Awaitable[T], expected: T) -> bool:
    return await value == expected


def test_a_look_into_a_queue_takes_nothing(harness: Harness) -> None:
    """Where queues are searchable, the next tasks are shown in their order with their messages."""

    async def test() -> None:
        queue, empty = harness.queue(), harness.queue("empty")
        async with opened(harness) as broker:
            long = "long" * MAX_PEEK_BYTES
            for text, priority in (("low", 1), ("high", 9), (long, 5), ("later", 1)):
                message = task(queue, text, priority=priority)
                message.task_id = text[:5]
                await broker.kick(message)
            queues, found = await broker.queues_with_tasks(), await broker.peek(queue, 3)
            groups = await broker.by_priority(queue)
            if not harness.is_searchable:
                assert queues is found is groups is await broker.places(queue, ["low"]) is None
                return
            places = await broker.places(queue, ["later", "low", "high", "longl", "nobody's"])
            assert places == {"high": 1, "longl": 2, "low": 3, "later": 4}
            assert await broker.places(queue, []) == await broker.places(empty, ["low"]) == {}
            assert queues == {queue}
            assert found == [
                WaitingTask("high", 9, b"high"),
                WaitingTask("longl", 5, b""),
                WaitingTask("low", 1, b"low"),
            ]
            assert groups == [
                PriorityGroup(count, it) for count, it in zip((1, 1, 2), found, strict=True)
            ]
            assert await broker.peek(empty, 3) == await broker.by_priority(empty) == []
            assert await broker.depth(queue) == 4
        async with consuming(harness, queue) as consumer:
            delivery = await consumer.take()
            assert delivery.data == b"high"
            assert await consumer.broker.places(queue, ["high", "low"]) == {"low": 2}
            await delivery.ack()

    run(test())


def test_a_server_says_what_it_is(harness: Harness) -> None:
    """Its own name and version, for people."""

    async def test() -> None:
        async with opened(harness) as broker:
            name, _, version = (await broker.product()).partition(" ")
        assert name in ("memory", "RabbitMQ", "Redis", "Valkey", "PostgreSQL")
        assert version[:1].isdigit() or name == "memory"

    run(test())


def test_absent_is_what_is_certainly_gone(harness: Harness) -> None:
    """A broker that can look into its queue knows each task; the other one only an empty queue."""

    async def test() -> None:
        queue = harness.queue()
        is_exact = harness.is_searchable
        async with consuming(harness, queue) as consumer:
            broker = consumer.broker
            assert await broker.absent(queue, ["a", "b"]) == {"a", "b"}
            assert await broker.absent(queue, []) == set()
            await broker.kick_many([task(queue, text) for text in "ab"])
            assert await broker.absent(queue, ["a", "b", "c"]) == ({"c"} if is_exact else set())
            in_hand = await consumer.take()
            assert await broker.absent(queue, ["a", "b", "c"]) == ({"c"} if is_exact else set())
            await in_hand.ack()
            assert await broker.absent(queue, ["a", "b"]) == ({"a"} if is_exact else set())

    run(test())


def test_withdrawn_tasks_never_run(harness: Harness) -> None:
    """Where the broker can: RabbitMQ takes nothing out and says so."""

    async def test() -> None:
        queue = harness.queue()
        async with consuming(harness, queue) as consumer:
            broker = consumer.broker
            await broker.kick_many([task(queue, f"{number}") for number in range(1000)])
            in_hand = await consumer.take()
            wanted = [f"{number}" for number in range(998)] + ["unknown"]
            withdrawn = await broker.withdraw(queue, wanted)
            if not harness.is_searchable:
                assert withdrawn == set()
                return
            assert withdrawn == set(wanted) - {"0", "unknown"}  # not what is in hand
            assert await broker.withdraw(queue, wanted) == set()
            await in_hand.release()
            assert [await consumer.finish() for _ in range(3)] == ["0", "998", "999"]
            assert await broker.absent(queue, wanted) == set(wanted)

    run(test())


# --- waking ---


def test_an_idle_listener_wakes_at_once(harness: Harness) -> None:
    async def test() -> None:
        queues = [harness.queue(name) for name in "abc"]
        async with (
            opened(harness) as sender,
            consuming(harness, *queues) as consumer,
        ):
            for queue in (queues[2], queues[0]):
                await consumer.until_idle()
                await sender.kick(task(queue, "wake up"))
                await (await consumer.take(AT_ONCE_SECONDS)).ack()

    run(test())


@pytest.mark.parametrize("at_once", [True, False], ids=["kick_many", "kick"])
def test_n_tasks_wake_n_idle_listeners(harness: Harness, at_once: bool) -> None:
    async def test() -> None:
        queues = [harness.queue(name) for name in "ab"]
        async with opened(harness) as sender:
            workers = [consuming(harness, *queues) for _ in range(8)]
            consumers = [await worker.__aenter__() for worker in workers]
            try:
                for consumer in consumers:
                    await consumer.until_idle()
                messages = [task(queues[number % 2], f"{number}") for number in range(8)]
                if at_once:
                    await sender.kick_many(messages)
                else:
                    await asyncio.gather(*map(sender.kick, messages))
                # nobody acks or asks again, so each must have woken for one of its own
                taken = await asyncio.gather(*(c.take(AT_ONCE_SECONDS) for c in consumers))
                assert {delivery.data for delivery in taken} == {m.message for m in messages}
            finally:
                for worker in workers:
                    await worker.__aexit__(None, None, None)

    run(test())


# --- outages ---


def test_an_unreachable_server_is_reported_quickly(harness: Harness) -> None:
    async def test() -> None:
        broker = harness.nowhere()
        place = re.escape(broker.address.rpartition("@")[2])
        for action in (
            broker.startup,
            lambda: broker.kick(task("q", "a")),
            lambda: broker.depth("q"),
            lambda: broker.absent("q", ["a"]),
        ):
            start = time.monotonic()
            with pytest.raises(UnreachableServerError, match=place) as caught:
                await action()
            assert time.monotonic() - start < AT_ONCE_SECONDS
            assert SECRET not in str(caught.value)
            assert SECRET not in caught.value.address
        await broker.shutdown()

    run(test())


def test_a_cut_connection_is_restored(harness: Harness, caplog: pytest.LogCaptureFixture) -> None:
    """Idle or just woken, the listener goes on, and the sender hardly notices."""

    async def test() -> None:
        queue = harness.queue()
        async with (
            harness.network() as network,
            opened(network) as sender,
            consuming(network, queue) as consumer,
        ):
            for round_ in range(5):
                await consumer.until_idle()
                network.cut()
                await sender.kick(task(queue, f"{round_}"))
                assert await consumer.finish() == f"{round_}"

    run(test())
    assert SECRET not in caplog.text


def test_an_outage_is_survived_and_logged_once(
    harness: Harness, caplog: pytest.LogCaptureFixture
) -> None:
    async def test() -> None:
        queue = harness.queue()
        async with (
            harness.network() as network,
            opened(network) as sender,
            consuming(network, queue) as consumer,
        ):
            await consumer.until_idle()
            network.close()
            start = time.monotonic()
            with pytest.raises(UnreachableServerError, match=network.place):
                await sender.kick(task(queue, "lost"))
            assert time.monotonic() - start < 1 + AT_ONCE_SECONDS
            with pytest.raises(asyncio.TimeoutError):
                await consumer.take(harness.in_vain_seconds(1.5))  # several tries to connect
            await network.open()
            await sender.kick(task(queue, "found"))
            assert await consumer.finish() == "found"

    with caplog.at_level(logging.INFO):
        run(test())
    ours = [r.getMessage() for r in caplog.records if r.name == "dagster_taskiq.brokers.outage"]
    assert len(ours) == 2
    assert "goes on when it is back" in ours[0]
    assert "again after" in ours[1]
    assert "error when creating transport" not in caplog.text
    assert "reader exited abnormally" not in caplog.text


def test_a_frozen_server_is_survived(harness: Harness) -> None:
    """Nothing answers, with the connections up; calls end in time, and all works afterwards."""

    async def test() -> None:
        queue = harness.queue()
        async with (
            harness.network() as network,
            opened(network) as sender,
            consuming(network, queue) as consumer,
        ):
            await sender.kick(task(queue, "a"))
            assert await consumer.finish() == "a"
            network.freeze()
            start = time.monotonic()
            with pytest.raises(UnreachableServerError):
                await sender.depth(queue)
            with pytest.raises(asyncio.TimeoutError):
                await consumer.take(harness.in_vain_seconds(1.5))
            assert time.monotonic() - start < 3 + AT_ONCE_SECONDS
            network.thaw()
            await eventually(lambda: _succeeds(sender.kick(task(queue, "b"))))
            assert await consumer.finish() == "b"

    run(test())


def test_a_server_that_lost_everything_takes_tasks_again(harness: Harness) -> None:
    """It says that it has none of the old ones, whose sender sends them again."""

    async def test() -> None:
        queue = harness.queue()
        async with opened(harness) as sender, consuming(harness, queue) as consumer:
            await sender.kick_many([task(queue, text) for text in "abc"])
            assert await consumer.finish() == "a"
            await harness.forget()
            assert await sender.depth(queue) == 0
            assert await sender.absent(queue, "abc") == set("abc")
            await sender.kick_many([task(queue, text) for text in "bc"])
            assert [await consumer.finish() for _ in range(2)] == ["b", "c"]

    run(test())


async def _succeeds(call: Awaitable[object]) -> bool:
    try:
        await call
    except UnreachableServerError:
        return False
    return True


# --- use ---


def test_a_broker_without_queues_cannot_listen(harness: Harness) -> None:
    async def test() -> None:
        async with opened(harness) as broker:
            with pytest.raises(ConfigError, match="without queues"):
                await anext(broker.listen())

    run(test())


def test_a_task_without_a_queue_is_refused(harness: Harness) -> None:
    async def test() -> None:
        async with opened(harness) as broker:
            with pytest.raises(ConfigError, match="queue_name"):
                await broker.kick(task("", "a"))

    run(test())


def test_a_listener_ends_with_its_broker(harness: Harness) -> None:
    async def test() -> None:
        async with opened(harness, harness.queue()) as broker:
            consumer = Consumer(broker)
            await consumer.until_idle()
            await broker.shutdown()
            with pytest.raises(StopAsyncIteration):
                await consumer.take()

    run(test())

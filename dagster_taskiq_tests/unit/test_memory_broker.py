"""What only the broker in memory has: accidents at once, threads, queues that are searched or not.

What it shares with all brokers is tested in ``contract/test_brokers``.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from typing import Any

import pytest
from taskiq import BrokerMessage

from dagster_taskiq.aio.loop_thread import LoopThread
from dagster_taskiq.brokers import Delivery
from dagster_taskiq.brokers.memory import MemoryBroker, MemoryQueues
from dagster_taskiq.errors import ConfigError, UnreachableServerError

PATIENCE_SECONDS = 20.0


def run(test: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(test, PATIENCE_SECONDS))


def task(task_id: str, queue: str = "q") -> BrokerMessage:
    return BrokerMessage(
        task_id=task_id,
        task_name="execute_plan",
        message=task_id.encode(),
        labels={"queue_name": queue},
    )


async def take(broker: MemoryBroker) -> Delivery:
    delivery = await broker.listener().look()
    assert delivery is not None
    return delivery


async def finish(broker: MemoryBroker) -> bytes:
    """The text of the next task, as soon as there is one; it is acked."""
    listener = broker.listener()
    while (delivery := await listener.look()) is None:
        await listener.wait()
    await delivery.ack()
    return delivery.data


def test_a_listener_in_another_thread_is_woken() -> None:
    """Its event loop is another one than the sender's."""
    queues = MemoryQueues()
    is_waiting = threading.Event()

    async def listen() -> None:
        waiting = asyncio.ensure_future(MemoryBroker(queues, ["q"]).listener().wait())
        await asyncio.sleep(0)
        is_waiting.set()
        await asyncio.wait_for(waiting, PATIENCE_SECONDS)

    async def end(listening: asyncio.Task[None]) -> None:
        await listening

    thread = LoopThread("listener")
    try:
        listening = thread.spawn(listen(), "listener")
        assert is_waiting.wait(PATIENCE_SECONDS)
        run(MemoryBroker(queues).kick(task("a")))
        thread.call(end(listening))
    finally:
        thread.stop()


def test_a_listener_whose_event_loop_is_gone_is_no_obstacle() -> None:
    """A test that ended in the middle of a wait leaves its listener behind."""
    queues = MemoryQueues()
    loop = asyncio.new_event_loop()
    waiting = loop.create_task(MemoryBroker(queues, ["q"]).listener().wait())
    loop.run_until_complete(asyncio.sleep(0))
    loop.close()
    run(MemoryBroker(queues).kick(task("a")))
    waiting.get_coro().close()


def test_a_frozen_server_answers_nobody_and_keeps_what_is_in_hand() -> None:
    async def test() -> None:
        queues = MemoryQueues("ours")
        broker = MemoryBroker(queues, ["q"])
        await broker.kick_many([task("a"), task("b")])
        delivery = await take(broker)
        waiting = asyncio.ensure_future(MemoryBroker(queues, ["other"]).listener().wait())
        await asyncio.sleep(0)
        queues.freeze()
        await waiting  # the next look says why
        for call in (broker.startup(), broker.kick(task("c")), take(broker), delivery.ack()):
            with pytest.raises(UnreachableServerError, match=r"memory://ours.*thaw"):
                await call
        queues.thaw()
        assert await broker.depth("q") == 1
        await delivery.ack()
        assert await broker.absent("q", ["a", "b"]) == {"a"}

    run(test())


def test_a_lost_broker_loses_what_it_has_in_hand_and_no_other_does() -> None:
    async def test() -> None:
        queues = MemoryQueues()
        lost, other = MemoryBroker(queues, ["q"]), MemoryBroker(queues, ["q"])
        await other.kick_many([task(task_id) for task_id in "abc"])
        late, kept = await take(lost), await take(other)
        lost.disconnect()
        with pytest.raises(UnreachableServerError, match=r"connect\(\)"):
            await lost.depth("q")
        assert await other.depth("q") == 2
        assert await finish(other) == b"a"
        lost.connect()
        await late.release()  # nothing is left of that delivery
        await kept.release()
        assert [await finish(lost) for _ in range(2)] == [b"b", b"c"]

    run(test())


def test_a_server_that_forgot_a_task_in_hand_takes_it_anew() -> None:
    """Its release brings nothing back, whether tasks are found by their ids or not."""

    async def test() -> None:
        for is_searchable in (True, False):
            queues = MemoryQueues(is_searchable=is_searchable)
            broker = MemoryBroker(queues, ["q"])
            await broker.kick(task("a"))
            first = await take(broker)
            queues.forget()
            assert await broker.absent("q", ["a"]) == {"a"}
            await first.release()
            assert await broker.depth("q") == 0
            await broker.kick(task("a"))
            await (await take(broker)).ack()
            assert await broker.absent("q", ["a"]) == {"a"}

    run(test())


def test_several_messages_are_sent_all_or_none() -> None:
    async def test() -> None:
        broker = MemoryBroker(MemoryQueues())
        with pytest.raises(ConfigError, match="queue_name"):
            await broker.kick_many([task("a"), task("b", queue="")])
        assert await broker.depth("q") == 0

    run(test())

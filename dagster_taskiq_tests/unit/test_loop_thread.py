"""Coroutines run in the thread, answer or raise to the caller, and end with it."""

from __future__ import annotations

import asyncio
import threading
from contextlib import suppress

import pytest

from dagster_taskiq.aio.loop_thread import LoopThread, to_its_end

SECONDS = 30.0


@pytest.fixture
def thread() -> LoopThread:
    return LoopThread("test-loop")


def test_a_call_returns_what_the_coroutine_does(thread: LoopThread) -> None:
    """And it runs in the thread of that name."""

    async def name() -> str:
        return threading.current_thread().name

    assert thread.call(name()) == "test-loop"
    thread.stop()


def test_a_call_raises_what_the_coroutine_does(thread: LoopThread) -> None:
    """The thread goes on after it."""

    async def fail() -> None:
        raise ValueError("no")

    async def work() -> int:
        return 1

    with pytest.raises(ValueError, match="no"):
        thread.call(fail())
    assert thread.call(work()) == 1
    thread.stop()


def test_calls_share_one_event_loop(thread: LoopThread) -> None:
    """So that connections can be used from call to call."""

    async def loop() -> asyncio.AbstractEventLoop:
        return asyncio.get_running_loop()

    assert thread.call(loop()) is thread.call(loop())
    thread.stop()


def test_an_interrupted_call_is_cancelled(
    thread: LoopThread, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What nobody waits for any more does not run on."""
    cancelled = threading.Event()

    async def wait() -> None:
        try:
            await asyncio.sleep(SECONDS)
        except asyncio.CancelledError:
            cancelled.set()
            raise

    submit = asyncio.run_coroutine_threadsafe

    def interrupted(*arguments: object) -> object:
        future = submit(*arguments)  # type: ignore[arg-type]

        def result() -> None:
            started.wait(SECONDS)
            raise KeyboardInterrupt

        future.result = result  # type: ignore[method-assign]
        return future

    started = threading.Event()
    thread.spawn(_set_soon(started), "started")
    monkeypatch.setattr(asyncio, "run_coroutine_threadsafe", interrupted)
    with pytest.raises(KeyboardInterrupt):
        thread.call(wait())
    monkeypatch.undo()
    assert cancelled.wait(SECONDS)
    thread.stop()


async def _set_soon(event: threading.Event) -> None:
    await asyncio.sleep(0.01)
    event.set()


def test_background_tasks_run_beside_calls(thread: LoopThread) -> None:
    """And carry their names."""
    ran = threading.Event()

    async def work() -> None:
        ran.set()

    assert thread.spawn(work(), "worker").get_name() == "worker"
    assert ran.wait(SECONDS)
    thread.stop()


def test_stop_cancels_what_runs_and_ends_the_thread(thread: LoopThread) -> None:
    """Clean-up code of background tasks runs first."""
    cleaned_up = threading.Event()
    started = threading.Event()

    async def work() -> None:
        started.set()
        try:
            await asyncio.sleep(SECONDS)
        finally:
            await asyncio.sleep(0)
            cleaned_up.set()

    thread.spawn(work(), "worker")
    assert started.wait(SECONDS)
    thread.stop()
    assert cleaned_up.is_set()
    assert "test-loop" not in [it.name for it in threading.enumerate()]


def test_stop_may_be_repeated(thread: LoopThread) -> None:
    """An error on the way to an end stops it twice."""
    thread.stop()
    thread.stop()


@pytest.mark.parametrize("fails", [False, True])
def test_what_is_done_to_its_end_cannot_lose_a_cancellation(fails: bool) -> None:
    """It goes on to its end, whatever it does with a cancellation, and the caller is cancelled."""
    begun, goes_on, ended = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def deaf() -> None:
        begun.set()
        with suppress(asyncio.CancelledError):
            await goes_on.wait()
        ended.set()
        if fails:
            raise ValueError("no")

    async def test() -> None:
        caller = asyncio.create_task(to_its_end(deaf()))
        await begun.wait()
        for _ in range(3):
            caller.cancel()
            await asyncio.sleep(0)
            await asyncio.sleep(0)  # the caller has had its turn, and what it waits for, too
            assert not caller.done()
        assert not ended.is_set()
        goes_on.set()
        await asyncio.wait({caller}, timeout=SECONDS)
        assert caller.cancelled()
        assert ended.is_set()

    asyncio.run(test())


def test_what_is_done_to_its_end_raises_its_error() -> None:
    async def fail() -> None:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        asyncio.run(to_its_end(fail()))

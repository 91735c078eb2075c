"""Servers cannot be reached for a while, by anybody or by one worker, in the ways that there are.

A broker that is away while the backend is there takes nothing from running steps; how it comes
back is in ``test_restarts``.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from dagster_taskiq_tests.acceptance.harness import (
    BrokerKind,
    Run,
    Stack,
    WorkerProcess,
    is_running,
    open_stack,
    until,
)
from dagster_taskiq_tests.faults.checks import (
    LEASE_SECONDS,
    LONG_SECONDS,
    TEST_SECONDS,
    await_crowd,
    check_crowd,
    check_each_once,
    embedded_client,
    start,
)
from dagster_taskiq_tests.faults.jobs import VARIED_STEPS
from dagster_taskiq_tests.proxy import Mode, Proxy, proxied

pytestmark = pytest.mark.timeout(TEST_SECONDS)

MODES = (Mode.REFUSE, Mode.DROP, Mode.HOLD)

#: Long enough that a loaded machine gets to renew it between the end of a short outage and the
#: moment at which steps are stopped. That an outage may last all of half a lease is shown in
#: virtual time, by ``unit/test_leases.py``.
SHORT_LEASE_SHARE = 0.4
LONG_LEASE_SECONDS = 15.0


class Part:
    """A worker and a run that reach their servers through proxies of their own."""

    def __init__(
        self, stack: Stack, mode: Mode, proxies: list[Proxy], config: dict[str, str]
    ) -> None:
        self.mode = mode
        self._stack = stack
        self._proxies = proxies
        self._config = config
        self.worker: WorkerProcess

    def start_worker(self, slots: int) -> None:
        self.worker = self._stack.worker(
            slots=slots,
            queues=[self.mode.value],
            settings=self._stack.settings_file(**self._config),
        )

    def start_run(self, job: str, lease_seconds: float) -> Run:
        """On the queue that only this worker listens on."""
        return start(
            self._stack,
            job,
            lease_seconds=lease_seconds,
            default_queue=self.mode.value,
            **self._config,
        )

    def set(self, mode: Mode) -> None:
        for proxy in self._proxies:
            proxy.set(mode)


@contextmanager
def open_parts(kind: BrokerKind, directory: Path) -> Iterator[list[Part]]:
    """For each way to fail a part whose backend can fail so, which may be the broker, too."""
    with ExitStack() as exits, open_stack(kind, directory) as stack:
        backend = stack.backend or stack.broker
        assert backend is not None
        key = "backend" if stack.backend else "broker"
        parts = []
        for mode in MODES:
            proxy = exits.enter_context(proxied(backend.url))
            parts.append(Part(stack, mode, [proxy], {key: proxy.url}))
        yield parts


@contextmanager
def failing(parts: list[Part], seconds: float) -> Iterator[None]:
    """Let each fail in its way for so long, beside what the caller does meanwhile."""
    ends_at = time.monotonic() + seconds
    for part in parts:
        part.set(part.mode)
    try:
        yield
        time.sleep(max(0.0, ends_at - time.monotonic()))
    finally:
        for part in parts:
            part.set(Mode.PASS)


def check_unnoticed(run: Run, worker: WorkerProcess, pids: set[int]) -> None:
    """After a short outage: the same processes go on with the same attempts."""
    assert all(map(is_running, pids))
    run.open_gate()
    check_each_once(run.wait(LONG_SECONDS), VARIED_STEPS)
    assert "Stopping task" not in worker.log


def await_held(run: Run) -> set[int]:
    """Wait until a ``varied`` has its two long steps running; their processes."""

    def pids() -> set[int]:
        return {note.pid for note in run.notes("ran") if note.step.startswith("held")}

    until(lambda: len(pids()) == 2, "both are running", LONG_SECONDS)
    return pids()


@pytest.mark.parametrize("kind", ["redis", "rabbitmq", "postgres"])
def test_an_outage_shorter_than_half_a_lease(kind: BrokerKind, tmp_path: Path) -> None:
    """Nothing comes of it, whether connections are refused, vanish or hang."""
    with open_parts(kind, tmp_path) as parts:
        for part in parts:
            part.start_worker(2)
        runs = [part.start_run("varied", LONG_LEASE_SECONDS) for part in parts]
        pids = [await_held(run) for run in runs]
        with failing(parts, SHORT_LEASE_SHARE * LONG_LEASE_SECONDS):
            pass
        time.sleep(LONG_LEASE_SECONDS / 2)  # whoever has noticed something would act by now
        for part, run, held in zip(parts, runs, pids, strict=True):
            check_unnoticed(run, part.worker, held)


@pytest.mark.parametrize("kind", ["redis", "rabbitmq", "postgres"])
def test_an_outage_of_three_leases(kind: BrokerKind, tmp_path: Path) -> None:
    """Running steps are stopped and go through their retry policy; what waited runs; all once."""
    with open_parts(kind, tmp_path) as parts:
        for part in parts:
            part.start_worker(3)
        runs = [part.start_run("crowd", LEASE_SECONDS) for part in parts]
        pids = [pid for run in runs for pid in await_crowd(run)]
        with failing(parts, 3 * LEASE_SECONDS):
            until(lambda: not any(map(is_running, pids)), "all are stopped", 2 * LEASE_SECONDS + 3)
        for run in runs:
            check_crowd(run.wait(LONG_SECONDS))


@pytest.mark.parametrize("is_short", [True, False], ids=["short", "three leases"])
def test_an_embedded_server_is_frozen(is_short: bool, tmp_path: Path) -> None:
    """As with another server that does not answer; there is no network to it that could fail."""
    with open_stack("embedded", tmp_path) as stack:
        worker = stack.worker(slots=2 if is_short else 3).await_ready()
        lease = LONG_LEASE_SECONDS if is_short else LEASE_SECONDS
        run = start(stack, "varied" if is_short else "crowd", lease_seconds=lease)
        pids = await_held(run) if is_short else set(await_crowd(run))
        with embedded_client(stack) as client:
            server = client.info("server")["process_id"]
        os.kill(server, signal.SIGSTOP)
        try:
            time.sleep((SHORT_LEASE_SHARE if is_short else 3) * lease)
        finally:
            os.kill(server, signal.SIGCONT)
        if is_short:
            check_unnoticed(run, worker, pids)
        else:
            check_crowd(run.wait(LONG_SECONDS))


# --- one worker is cut off ----------------------------------------------------------------------


@contextmanager
def open_cut_off(kind: BrokerKind, directory: Path) -> Iterator[tuple[Stack, list[Part]]]:
    """For each way to fail a worker that reaches all its servers through proxies."""
    with ExitStack() as exits, open_stack(kind, directory) as stack:
        parts = []
        for mode in (Mode.DROP, Mode.HOLD):
            config, proxies = {}, []
            for key, server in (("broker", stack.broker), ("backend", stack.backend)):
                if server is not None:
                    proxies.append(exits.enter_context(proxied(server.url)))
                    config[key] = proxies[-1].url
            parts.append(Part(stack, mode, proxies, config))
        yield stack, parts


@pytest.mark.parametrize("kind", ["redis", "rabbitmq", "postgres", "rabbitmq+postgres"])
def test_a_worker_is_cut_off(kind: BrokerKind, tmp_path: Path) -> None:
    """For a third of the lease it is not noticed, for four leases its steps are lost, and once.

    Those that are lost go to another worker; the one that was cut off works again afterwards.
    """
    with open_cut_off(kind, tmp_path) as (stack, parts):
        for part in parts:
            part.start_worker(3)
        runs = [start(stack, "varied", lease_seconds=9, default_queue=p.mode.value) for p in parts]
        pids = [await_held(run) for run in runs]
        with failing(parts, 3):
            pass
        time.sleep(4)  # whoever has noticed something would act by now
        for part, run, held in zip(parts, runs, pids, strict=True):
            check_unnoticed(run, part.worker, held)

        runs = [start(stack, "crowd", default_queue=part.mode.value) for part in parts]
        lost = [pid for run in runs for pid in await_crowd(run)]
        with failing(parts, 4 * LEASE_SECONDS):
            until(lambda: not any(map(is_running, lost)), "all are stopped", 2 * LEASE_SECONDS + 3)
            other = stack.worker(slots=3, queues=[part.mode.value for part in parts]).await_ready()
        for run in runs:
            check_crowd(run.wait(LONG_SECONDS))
        other.terminate()
        assert other.wait() == 0
        for part in parts:
            check_each_once(part.start_run("single", LEASE_SECONDS).wait(), ["quick"])

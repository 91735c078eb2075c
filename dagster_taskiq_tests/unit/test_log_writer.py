"""The worker's log never waits for its reader, loses nothing silently, and lets the worker end."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pytest

from dagster_taskiq.worker.log_writer import LogWriter

SECONDS = 30.0

#: More than the writer keeps, and more than a pipe takes.
MANY = 20_000


@dataclass
class Log:
    """A log into a pipe that nobody reads until ``read``."""

    logger: logging.Logger
    writer: LogWriter
    reader: int

    def read(self) -> list[str]:
        """End the log; all of its lines."""
        with ThreadPoolExecutor(1) as pool:
            lines = pool.submit(os.fdopen(self.reader, closefd=False).readlines)
            assert self.writer.stop(SECONDS)
            os.close(self.writer._target)
            return [line.rstrip("\n") for line in lines.result(SECONDS)]


def fill(pipe: int) -> None:
    """Write empty lines until the pipe takes no more."""
    os.set_blocking(pipe, False)
    try:
        while os.write(pipe, b"\n"):
            pass
    except BlockingIOError:
        os.set_blocking(pipe, True)


@pytest.fixture
def log() -> Iterator[Log]:
    reader, target = os.pipe()
    writer = LogWriter(target, lines=100)
    logger = logging.Logger("a worker")
    logger.addHandler(writer)
    yield Log(logger, writer, reader)
    os.close(reader)


def test_lines_are_written_in_their_order(log: Log) -> None:
    """With their arguments and tracebacks as they were when they were logged."""
    for number in range(50):
        log.logger.warning("line %d", number)
    try:
        raise RuntimeError("as was to be shown")
    except RuntimeError:
        log.logger.exception("error")
    lines = log.read()
    assert lines[:50] == [f"line {number}" for number in range(50)]
    assert lines[-1] == "RuntimeError: as was to be shown"


def test_a_reader_that_pauses_holds_nobody_up(log: Log) -> None:
    """What does not fit is counted, and the log says so when somebody reads again."""
    fill(log.writer._target)
    logging_thread = threading.Thread(
        target=lambda: [log.logger.warning("line %d", number) for number in range(MANY)],
        daemon=True,
    )
    logging_thread.start()
    logging_thread.join(SECONDS)
    assert not logging_thread.is_alive()
    assert not log.writer.stop(0.1)
    lines = log.read()
    written = [line for line in lines if line.startswith("line")]
    missing = sum(int(line.split()[0]) for line in lines if "missing" in line)
    assert missing == MANY - len(written) > 0


def test_a_reader_that_is_gone_holds_nobody_up() -> None:
    """The worker goes on, as its steps do not depend on its log."""
    reader, target = os.pipe()
    os.close(reader)
    writer = LogWriter(target)
    writer.emit(logging.makeLogRecord({"msg": "nobody hears it"}))
    assert writer.stop(SECONDS)
    os.close(target)


def test_a_process_ends_though_nobody_reads_what_it_has_logged() -> None:
    """Also what it still prints, and what Python writes when it ends, waits for nobody."""
    script = (
        "import logging, sys\n"
        "from dagster_taskiq.worker import log_writer\n"
        "log_writer._STOP_SECONDS = 0.1\n"
        "with log_writer.log_to_standard_error('INFO', '%(message)s'):\n"
        f"    for number in range({MANY}): logging.info('line %d', number)\n"
        f"print('x' * {1 << 20})\n"
        f"print('x' * {1 << 20}, file=sys.stderr)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    try:
        assert process.wait(SECONDS) == 0
    finally:
        process.kill()
        process.communicate()

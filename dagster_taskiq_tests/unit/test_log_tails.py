"""What steps print reaches the worker's own output: all of it, once, while it is written."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from dagster_taskiq.worker import log_tails
from dagster_taskiq.worker.log_tails import LogTails

SECONDS = 30.0

OWNER = 4711


class Output:
    """A pipe that stands for standard output, and what has come out of it."""

    def __init__(self) -> None:
        self.reader, self.writer = os.pipe()
        self.data = b""
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        while chunk := os.read(self.reader, 65536):
            self.data += chunk

    def await_data(self, data: bytes) -> None:
        until(lambda: self.data == data, f"{data!r} has come out, not {self.data!r}")

    def close(self) -> None:
        os.close(self.writer)
        self._thread.join(SECONDS)
        os.close(self.reader)


@pytest.fixture
def output() -> Iterator[Output]:
    output = Output()
    yield output
    output.close()


@pytest.fixture
def tails() -> Iterator[LogTails]:
    tails = LogTails()
    yield tails
    tails.stop()


def until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.005)


def test_lines_come_while_the_file_grows(tails: LogTails, output: Output, tmp_path: Path) -> None:
    """Whole lines at once, what has no end of line with the end of the step."""
    path = tmp_path / "out"
    path.write_bytes(b"before\n")
    tails.begin(OWNER, str(path), output.writer)
    output.await_data(b"before\n")
    with path.open("ab", buffering=0) as file:
        file.write(b"one\ntw")
        output.await_data(b"before\none\n")
        file.write(b"o\nthree")
        output.await_data(b"before\none\ntwo\n")
    tails.end(OWNER, str(path))
    output.await_data(b"before\none\ntwo\nthree")


def test_each_file_has_its_own_end(tails: LogTails, output: Output, tmp_path: Path) -> None:
    """The end of one file, or of another process's, does not end a copy."""
    paths = [tmp_path / name for name in ("a", "b")]
    for path in paths:
        path.touch()
        tails.begin(OWNER, str(path), output.writer)
    tails.end(OWNER, str(paths[0]))
    tails.end(OWNER + 1)
    until(lambda: len(tails._tails) == 1, "one of them is left")
    paths[1].write_bytes(b"b\n")
    output.await_data(b"b\n")
    tails.end(OWNER)
    until(lambda: not tails._tails, "none is left")


def test_nothing_is_lost_at_the_end(output: Output, tmp_path: Path) -> None:
    """Stopping copies what nobody has seen yet, however much, and leaves no descriptor open."""
    tails = LogTails()
    before = psutil.Process().num_fds()
    text = b"".join(b"line %d\n" % number for number in range(50_000)) + b"last"
    path = tmp_path / "out"
    path.write_bytes(text)
    tails.begin(OWNER, str(path), output.writer)
    tails.stop()
    output.await_data(text)
    assert psutil.Process().num_fds() == before


def test_a_line_without_end_is_not_kept_for_ever(
    tails: LogTails, output: Output, tmp_path: Path
) -> None:
    """A progress bar, say, which never ends its line."""
    path = tmp_path / "out"
    path.write_bytes(b"x" * 200_000)
    tails.begin(OWNER, str(path), output.writer)
    until(lambda: len(output.data) > 100_000, "most of it has come out")


def test_a_file_that_is_not_there(
    tails: LogTails, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It is said, and the step goes on."""
    tails.begin(OWNER, str(tmp_path / "none"), 1)
    assert "only in its log in the UI" in caplog.text


def test_files_do_not_pile_up_where_nobody_reads(
    tails: LogTails,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The steps go on, and it is said once; when somebody reads, output is copied again."""
    monkeypatch.setattr(log_tails, "_MOST_FILES", 3)
    reader, writer = os.pipe()
    path = tmp_path / "out"
    path.write_bytes(b"x\n" * 100_000)  # more than the pipe takes
    before = psutil.Process().num_fds()
    for _ in range(10):
        tails.begin(OWNER, str(path), writer)
        tails.end(OWNER)
    assert psutil.Process().num_fds() == before + 3
    assert caplog.text.count("only in their logs") == 1
    read = threading.Thread(target=_read_all, args=(reader,), daemon=True)
    read.start()
    until(lambda: not tails._tails, "all that was open is copied")
    tails.begin(OWNER, str(path), writer)
    tails.end(OWNER)
    until(lambda: not tails._tails, "it is copied, too")
    os.close(writer)
    read.join(SECONDS)
    os.close(reader)


def _read_all(reader: int) -> None:
    while os.read(reader, 65536):
        pass

"""What a launcher does in the background: until it is done, and not after the launcher's end."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from dagster_taskiq.launch.background import Background

SECONDS = 30.0


@pytest.fixture
def background() -> Iterator[Background]:
    background = Background()
    yield background
    background.close()


def threads(name: str) -> list[threading.Thread]:
    return [it for it in threading.enumerate() if it.name == name]


class Job:
    """Is done at its n-th call; may be held in one."""

    def __init__(self, calls: int) -> None:
        self.left = calls
        self.calls = 0
        self.is_under_way = threading.Event()
        self.go_on = threading.Event()

    def __call__(self) -> bool:
        self.calls += 1
        self.is_under_way.set()
        assert self.go_on.wait(SECONDS)
        self.left -= 1
        return self.left <= 0


def test_a_job_is_repeated_until_it_is_done(
    background: Background, caplog: pytest.LogCaptureFixture
) -> None:
    """Also after an error, which is said; then its thread ends."""
    answers = iter([False, OSError("away"), True])

    def look() -> bool:
        answer = next(answers)
        if isinstance(answer, OSError):
            raise answer
        return answer

    background.repeat("repeated", look, 0.001, "Cannot look")
    for thread in threads("repeated"):
        thread.join(SECONDS)
    assert threads("repeated") == []
    assert next(answers, None) is None
    assert caplog.messages == ["Cannot look: OSError: away"]


def test_what_comes_during_the_last_look_is_looked_at_too(background: Background) -> None:
    """The look under way may not have seen it; and there is one thread for both."""
    job = Job(1)
    background.repeat("asked again", job, 0.001, "Cannot look")
    assert job.is_under_way.wait(SECONDS)
    background.repeat("asked again", job, 0.001, "Cannot look")
    (thread,) = threads("asked again")
    job.go_on.set()
    thread.join(SECONDS)
    assert job.calls == 2


def test_nothing_is_done_after_the_end(
    background: Background, caplog: pytest.LogCaptureFixture
) -> None:
    """An error of the call under way is that of an end, and not said."""
    is_under_way, go_on = threading.Event(), threading.Event()

    def look() -> bool:
        is_under_way.set()
        assert go_on.wait(SECONDS)
        raise OSError("left")

    background.repeat("ended", look, 0.001, "Cannot look")
    assert is_under_way.wait(SECONDS)
    (thread,) = threads("ended")
    background.close()
    go_on.set()
    thread.join(SECONDS)
    assert not thread.is_alive()
    assert caplog.messages == []

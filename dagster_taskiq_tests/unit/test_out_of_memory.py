"""Which of the kernel's counters of kills for lack of memory is read."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dagster_taskiq.worker import out_of_memory


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Writes the files of a host."""
    monkeypatch.setattr(out_of_memory, "_GROUPS", tmp_path / "groups")
    monkeypatch.setattr(out_of_memory, "_OWN_GROUPS", tmp_path / "own")
    monkeypatch.setattr(out_of_memory, "_OF_HOST", tmp_path / "vmstat")
    out_of_memory._counter.cache_clear()

    def write(**files: str) -> None:
        for name, text in files.items():
            path = tmp_path / name.replace("__", "/")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)

    yield write
    out_of_memory._counter.cache_clear()


EVENTS = "low 0\nhigh 0\nmax 9\noom 8\noom_kill {}\noom_group_kill 0\n"


@pytest.mark.parametrize(
    ("own", "place"),
    [
        ("0::/system.slice/w.service\n", "groups__system.slice__w.service__memory.events"),
        ("0::/\n", "groups__memory.events"),
        ("0::/elsewhere/on/the/host\n", "groups__memory.events"),
        ("9:cpu:/\n4:memory:/w\n0::/\n", "groups__memory__w__memory.oom_control"),
        ("4:cpu,memory:/docker/abc\n", "groups__memory__memory.oom_control"),
        ("0::/\n", "vmstat"),
        ("", "vmstat"),
    ],
)
def test_the_narrowest_counter_is_read(host: Callable[..., None], own: str, place: str) -> None:
    """Of the worker's own control group, else the container's, else the host's; as it is now."""
    host(vmstat=EVENTS.format(70))
    host(own=own, **{place: EVENTS.format(3)})
    assert out_of_memory.count_oom_kills() == 3
    host(**{place: EVENTS.format(4)})
    assert out_of_memory.count_oom_kills() == 4


def test_where_nobody_counts(host: Callable[..., None]) -> None:
    """As on macOS, or in an old kernel."""
    assert out_of_memory.count_oom_kills() == 0
    out_of_memory._counter.cache_clear()
    host(vmstat="pgfault 1\n")
    assert out_of_memory.count_oom_kills() == 0

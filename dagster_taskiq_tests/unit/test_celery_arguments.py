"""What teams pass to ``celery worker`` after ``--`` is read, ignored with a word, or refused."""

from __future__ import annotations

import warnings
from dataclasses import replace

import pytest

from dagster_taskiq.cli.celery_arguments import (
    _MEANINGLESS,
    CeleryArguments,
    read_celery_arguments,
    read_status_arguments,
)
from dagster_taskiq.errors import ConfigError

NOTHING = CeleryArguments(None, (), (), None, None, None, None, None, None)


def read(*arguments: str) -> CeleryArguments:
    """Without a warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return read_celery_arguments(arguments)


def test_no_arguments() -> None:
    """Most teams pass none."""
    assert read() == NOTHING


@pytest.mark.parametrize("separator", [" ", "="])
def test_every_argument_that_has_a_meaning(separator: str) -> None:
    """In both of the ways to write a value."""
    options = {
        "--hostname": "w@%h",
        "--queues": "a,b",
        "--include": "m.n",
        "--concurrency": "4",
        "--loglevel": "debug",
        "--max-tasks-per-child": "10",
        "--max-memory-per-child": "2000",
        "--soft-time-limit": "5",
        "--time-limit": "7.5",
    }
    text = " ".join(f"{option}{separator}{value}" for option, value in options.items())
    assert read(*text.split()) == CeleryArguments(
        "w", ("a", "b"), ("m.n",), 4, "DEBUG", 10, 2000, 5.0, 7.5
    )


def test_short_options() -> None:
    """Celery's letters, apart from their value and joined to it."""
    expected = replace(
        NOTHING,
        name="w",
        queues=("a", "b"),
        include=("m", "n"),
        concurrency=3,
        log_level="INFO",
    )
    assert read("-n", "w", "-Q", "a, b", "-I", "m,n", "-c", "3", "-l", "INFO") == expected
    assert read("-nw", "-Qa,b", "-Im", "-In", "-c3", "-lINFO") == expected


def test_repeated_lists_add_up() -> None:
    """``-Q a -Q b`` is both; empty parts are none."""
    assert read("-Q", "a,", "-Q", ",b").queues == ("a", "b")


SPELLINGS = [(spelling, value) for names, value in _MEANINGLESS.items() for spelling in names]


@pytest.mark.parametrize(("option", "takes_value"), SPELLINGS)
def test_an_argument_that_means_nothing_warns_by_name(option: str, takes_value: bool) -> None:
    """And is ignored, with its value."""
    arguments = [option, "5"] if takes_value else [option]
    with pytest.warns(UserWarning, match=f"{option} ") as caught:
        assert read_celery_arguments([*arguments, "-c", "2"]).concurrency == 2
    assert len(caught) == 1


def test_every_option_of_celerys_worker_is_known() -> None:
    """Celery itself says which there are, in all their spellings."""
    celery = pytest.importorskip("celery.bin.worker")
    ours = {"-n", "--hostname", "-Q", "--queues", "-I", "--include", "-c", "--concurrency", "-l"}
    ours |= {"--loglevel", "--max-tasks-per-child", "--max-memory-per-child", "--help"}
    ours |= {"--soft-time-limit", "--time-limit"}
    theirs = {spelling for option in celery.worker.params for spelling in option.opts}
    assert theirs - ours - {spelling for spelling, _ in SPELLINGS} == set()


@pytest.mark.parametrize("level", ["fatal", "FATAL", "critical"])
def test_every_log_level_of_celery_is_one_of_pythons(level: str) -> None:
    """Celery's FATAL is Python's CRITICAL."""
    assert read("-l", level).log_level == "CRITICAL"


def test_status_takes_names() -> None:
    """``-d`` chooses workers; its other options mean nothing here."""
    assert read_status_arguments([]) == ()
    assert read_status_arguments(["-d", "a@h,b@h", "--destination=c@h"]) == ("a@h", "b@h", "c@h")
    with pytest.warns(UserWarning, match="--timeout"):
        assert read_status_arguments(["-t", "5", "-d", "a@h"]) == ("a@h",)
    with pytest.raises(ConfigError, match="--beat"):
        read_status_arguments(["--beat"])


@pytest.mark.parametrize(
    "arguments",
    [
        ["--no-such-thing"],
        ["-c", "many"],
        ["-c"],
        ["--max-tasks-per-child", "1.5"],
        ["--time-limit", "soon"],
        ["--time-limit=-1"],
        ["--soft-time-limit", "inf"],
        ["stray"],
        # an abbreviation is not guessed at: --max- could be either
        ["--concur", "3"],
        ["--pool"],
        ["--loglevel", "loud"],
    ],
    ids=str,
)
def test_what_is_no_argument_of_celerys_is_refused(arguments: list[str]) -> None:
    """In one line, and never by ending the process as argparse does."""
    with pytest.raises(ConfigError) as caught:
        read_celery_arguments(arguments)
    assert "\n" not in str(caught.value)
    assert arguments[0].lstrip("-").partition("=")[0] in str(caught.value)


@pytest.mark.parametrize("option", ["-c", "--max-tasks-per-child", "--max-memory-per-child"])
def test_negative_numbers_are_refused(option: str) -> None:
    """A worker with -1 slots would take no task; 0 is Celery's word for its default."""
    joint = "=" if option.startswith("--") else ""
    with pytest.raises(ConfigError, match="less than 0"):
        read(f"{option}{joint}-1")
    given = read(f"{option}{joint}0")
    values = (given.concurrency, given.max_tasks_per_child, given.max_memory_per_child)
    assert not any(values)

"""How attempts that have ended are asked for and shown."""

from __future__ import annotations

import re
import time
from collections.abc import Collection, Sequence

import click

from dagster_taskiq.cli.finding import nearest
from dagster_taskiq.cli.tables import (
    DASH,
    echo_fields,
    echo_sentence,
    echo_table,
    plain_line,
    seconds_in_words,
    short_id,
    time_since,
)
from dagster_taskiq.messages.attempt_ends import AttemptEnd, EndGroup, EndOutcome
from dagster_taskiq.overview import TaskStatus

#: States that stand for several outcomes: all of them, and what failed or was lost and is tried
#: again.
_ENDED = "ended"
_RETRIED = "retried"

_IN_FLIGHT = [status.value for status in TaskStatus]
_OVER = [*(outcome.value for outcome in EndOutcome), _RETRIED, _ENDED]

_UNITS = {"s": 1, "min": 60, "m": 60, "h": 3600, "d": 86400}


_KNOWN = tuple(dict.fromkeys([*_IN_FLIGHT, *_OVER]))


def _read_states(
    ctx: click.Context, param: click.Parameter, texts: tuple[str, ...]
) -> frozenset[str]:
    """The states in texts that have several between commas."""
    states = frozenset(word.strip() for text in texts for word in text.split(","))
    for state in sorted(states.difference(_KNOWN)):
        hint = nearest(state, _KNOWN)
        text = f"{state!r} is no state.{hint} There are {', '.join(_KNOWN)}."
        raise click.BadParameter(text, ctx, param)
    return states


def _complete_states(_ctx: click.Context, _param: click.Parameter, begun: str) -> list[str]:
    before, comma, last = begun.rpartition(",")
    return [before + comma + state for state in _KNOWN if state.startswith(last)]


def _read_since(ctx: click.Context, param: click.Parameter, text: str | None) -> float | None:
    """A length of time in seconds."""
    if text is None:
        return None
    found = re.fullmatch(r"(\d{1,9}(?:\.\d+)?) *(s|min|m|h|d)", text)
    if found is None:
        text = f"{text!r} is no time: say it like 90s, 30min, 12h or 2d."
        raise click.BadParameter(text, ctx, param)
    return float(found[1]) * _UNITS[found[2]]


states_option = click.option(
    "--state",
    "states",
    multiple=True,
    metavar="STATE[,STATE...]",
    callback=_read_states,
    shell_complete=_complete_states,
    help=f"Only those in this state: {', '.join(_IN_FLIGHT)}; or, of those that have ended, "
    f"{', '.join(_OVER)}. May be repeated.",
)
since_option = click.option(
    "--since",
    "since_seconds",
    metavar="TIME",
    callback=_read_since,
    help="Of those that have ended, only since this time ago, such as 90s, 30min, 12h or 2d; "
    "without --state all of them, beside those in flight.",
)


class Wanted:
    """Which tasks are asked for.

    Args:
        states: from ``states_option``.
        since_seconds: from ``since_option``; None without one.

    Attributes:
        in_flight: states of tasks in flight; empty for none.
        over: the same of those that have ended.
    """

    def __init__(self, states: frozenset[str], since_seconds: float | None) -> None:
        self._since_seconds = since_seconds
        self.in_flight: Collection[str] = states.intersection(_IN_FLIGHT)
        self.over: Collection[str] = states.intersection(_OVER)
        if not states:
            self.in_flight = frozenset(_IN_FLIGHT)
            self.over = frozenset() if since_seconds is None else {_ENDED}

    def of(self, ends: Sequence[AttemptEnd]) -> list[AttemptEnd]:
        """Those of the ends that are asked for."""
        since = 0.0 if self._since_seconds is None else time.time() - self._since_seconds
        return [end for end in ends if end.ended_at >= since and self._has_state(end)]

    def _has_state(self, end: AttemptEnd) -> bool:
        states = {end.outcome.value, _ENDED} | ({_RETRIED} if end.is_retried else set())
        return not states.isdisjoint(self.over)


# --- how they look ---


def echo_ended(ends: Sequence[AttemptEnd]) -> None:
    """Write tables of attempts that have ended, one for each run, and below each why."""
    for number, run_id in enumerate(dict.fromkeys(end.run_id for end in ends)):
        if number:
            click.echo()
        own = [end for end in ends if end.run_id == run_id]
        jobs = sorted({end.job for end in own if end.job})
        click.echo(plain_line(f"run {run_id}" + (f", job {', '.join(jobs)}" if jobs else "")))
        echo_ended_of_run(own)


def echo_ended_of_run(ends: Sequence[AttemptEnd]) -> None:
    """Write a table of a run's attempts, and below it why they have not succeeded."""
    rows = [("task", "step", "try", "state", "ended", "took", "worker")]
    rows += [
        (
            short_id(end.task_id),
            end.step_key or "(the run)",
            str(end.attempt),
            _state_of(end),
            f"{time_since(end.ended_at)} ago",
            _took(end),
            end.worker or DASH,
        )
        for end in ends
    ]
    red = [number for number, end in enumerate(ends, 1) if end.group is EndGroup.FAILED]
    echo_table(rows, red=red, indent="  ")
    reasons: dict[str, list[str]] = {}
    for end in ends:
        if end.reason:
            reasons.setdefault(end.reason, []).append(short_id(end.task_id))
    for reason, ids in reasons.items():
        echo_sentence(f"{', '.join(ids)}: {reason}", indent="  ")


def echo_end(end: AttemptEnd) -> None:
    """Write all that is known of an attempt that has ended."""
    echo_fields(
        {
            "task": end.task_id,
            "run": end.run_id,
            "job": end.job or DASH,
            "step": end.step_key or "(the run)",
            "attempt": str(end.attempt),
            "state": f"{_state_of(end)} {time_since(end.ended_at)} ago",
            "queue": end.queue,
            "sent": _moment(end.sent_at),
            "started": _moment(end.started_at),
            "ended": _moment(end.ended_at),
            "worker": f"{end.worker}, slot {end.slot}" if end.worker else DASH,
            "reason": end.reason or DASH,
        }
    )


def _state_of(end: AttemptEnd) -> str:
    return f"{end.outcome.value}, {_RETRIED}" if end.is_retried else end.outcome.value


def _took(end: AttemptEnd) -> str:
    return DASH if end.started_at is None else seconds_in_words(end.ended_at - end.started_at)


def _moment(at: float | None) -> str:
    """A time of the day here, such as ``2026-01-31 04:05:06 +0100``."""
    try:
        return DASH if at is None else time.strftime("%Y-%m-%d %H:%M:%S %z", time.localtime(at))
    except (OverflowError, ValueError, OSError):  # somebody else may have written it
        return DASH

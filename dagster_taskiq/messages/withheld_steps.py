"""Steps that a run holds back, as its loop tells them to people; signed with a key.

They are ready and were not sent, since a limit of the run or a pool of Dagster is reached. Nothing
is decided by it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from dagster_taskiq.errors import UntrustedError
from dagster_taskiq.messages.plain_json import parse_object
from dagster_taskiq.messages.plain_text import plain_name, plain_sentence
from dagster_taskiq.messages.signing import Purpose, Signer

#: How many steps of a run are named; the others are counted.
MOST_WITHHELD = 20

#: The longest text that is believed, in bytes: it is some hundred. With 20 steps, each of a pool of
#: its own, and all names and reasons as long as they may be, it has 83 KB.
_MAX_BYTES = 128 * 2**10


@dataclass(frozen=True)
class WithheldGroup:
    """Steps of a run that one limit holds back.

    Attributes:
        pool: of Dagster, whose slots are taken; empty where the run's own limits are reached.
        reason: sentences for people.
        steps: the keys of those that are named, each with the time since when it is held back, by
            the clock of the run's host; seconds since the epoch.
    """

    pool: str
    reason: str
    steps: tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class Withheld:
    """All that a run holds back; nothing by default.

    Attributes:
        more: how many steps are held back that no group names.
    """

    groups: tuple[WithheldGroup, ...] = ()
    more: int = 0

    def without(self, step_keys: Collection[str]) -> Withheld:
        """The same but for some steps, of which something later is known."""
        left = [
            WithheldGroup(it.pool, it.reason, steps)
            for it in self.groups
            if (steps := tuple(step for step in it.steps if step[0] not in step_keys))
        ]
        return Withheld(tuple(left), self.more)


def write_withheld(signer: Signer, run_id: str, withheld: Withheld) -> bytes:
    """The text as it is stored; what is too long is cut as its reader would cut it."""
    groups = [
        {
            "pool": plain_name(it.pool),
            "reason": plain_sentence(it.reason),
            "steps": [[plain_name(key), since] for key, since in it.steps],
        }
        for it in withheld.groups
    ]
    # in UTF-8, since its reader believes so many bytes: an escaped character takes up to twelve
    text = json.dumps({"groups": groups, "more": withheld.more}, ensure_ascii=False)
    return signer.seal(Purpose.WITHHELD, run_id, text.encode())


def read_withheld(signer: Signer, run_id: str, data: bytes) -> Withheld:
    """What is stored of a run; texts in it are safe to show.

    What is not signed as it must be, or is nothing of the kind, is nothing.
    """
    if data:
        with suppress(UntrustedError, ValueError, KeyError, TypeError, OverflowError):
            return _read(parse_object(signer.unseal(Purpose.WITHHELD, run_id, data), _MAX_BYTES))
    return Withheld()


def _read(values: dict[str, Any]) -> Withheld:
    groups = tuple(
        WithheldGroup(
            plain_name(str(it["pool"])),
            plain_sentence(str(it["reason"])),
            tuple((plain_name(str(key)), _seconds(since)) for key, since in it["steps"]),
        )
        for it in values["groups"]
    )
    if sum(len(it.steps) for it in groups) > MOST_WITHHELD:
        raise ValueError("it names more steps than a run does")
    return Withheld(groups, max(0, int(values["more"])))


def _seconds(value: Any) -> float:
    seconds = float(value)
    if not math.isfinite(seconds):
        raise ValueError("it is no time")
    return seconds

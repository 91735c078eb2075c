"""Logs what is refused or cannot be read, but not each of it: a flood must not fill the disk."""

from __future__ import annotations

import logging

from dagster_taskiq.messages.plain_text import plain_name, plain_reason

logger = logging.getLogger(__name__)

#: Of how many things of one server it is said that they cannot be read.
_MOST_UNREADABLE = 100


class Refusals:
    """Counts what one reader refuses.

    Args:
        source: where it comes from, for the log.
    """

    def __init__(self, source: str) -> None:
        self._source = source
        self._counts: dict[type[Exception], int] = {}

    @property
    def count(self) -> int:
        """How many there have been."""
        return sum(self._counts.values())

    def note(self, what: str, error: Exception) -> None:
        """Count one; logs the first, the tenth, the hundredth, ... of each kind of error.

        Args:
            what: was refused, with an article.
        """
        count = self._counts[type(error)] = self._counts.get(type(error), 0) + 1
        if str(count).strip("0") == "1":
            so_far = f" ({count} of this kind so far)" if count > 1 else ""
            reason = plain_reason(str(error))
            logger.error("Refused %s from %s: %s.%s", what, self._source, reason, so_far)


class Unreadable:
    """Says once of each thing on a server that it holds what none of ours has written.

    Args:
        address: of the server.
    """

    def __init__(self, address: str) -> None:
        self._address = address
        self._said: set[str] = set()

    def note(self, what: str, problem: str) -> None:
        """Say that something cannot be read.

        Args:
            what: it is, with an article; begins the sentence.
        """
        if what not in self._said and len(self._said) < _MOST_UNREADABLE:
            self._said.add(what)
            logger.warning(
                "%s at %s cannot be read, and is ignored: %s.",
                plain_name(what),
                self._address,
                plain_name(problem),
            )

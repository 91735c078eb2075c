"""Counts and logs what is refused, but not each message: a flood of them must not fill the disk."""

from __future__ import annotations

import logging

from dagster_taskiq.messages.plain_text import plain_reason

logger = logging.getLogger(__name__)


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

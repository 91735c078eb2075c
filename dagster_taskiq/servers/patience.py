"""How long to go on asking servers that are away or refuse."""

from __future__ import annotations

import time
from collections.abc import Callable

from dagster_taskiq.errors import RefusedByServerError, ServerError


class Patience:
    """One for whatever asks again and again: a run's loop, a worker that starts.

    While nothing has worked yet, it bears a server that is away for the setting's time, and no
    refusal. Once something has worked, it bears a server that is away without an end, since what is
    under way goes on meanwhile, and a refusal for the setting's time, unless that is final.

    Args:
        seconds: the setting ``server_patience_seconds``.
        has_worked: whether these settings are known to have worked.
        now: the clock, in seconds.
    """

    def __init__(
        self,
        seconds: float,
        *,
        has_worked: bool = False,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self.seconds = seconds
        self._has_worked = has_worked
        self._now = now
        self._away: dict[str, tuple[str, float]] = {}

    def note(self, what: str, error: ServerError) -> bool:
        """Note that something has failed.

        Args:
            what: was tried. Its success is what ends the outage.

        Returns:
            whether the outage of this server is news.

        Raises:
            ServerError: asking again is of no use, or was not for the whole time.
        """
        if not is_passing(error, has_worked=self._has_worked):
            raise error
        is_refused = isinstance(error, RefusedByServerError)
        is_new = error.address not in self._away
        _, since = self._away.setdefault(error.address, (what, self._now()))
        if (is_refused or not self._has_worked) and self._now() - since >= self.seconds:
            raise out_of_patience(error, self.seconds)
        return is_new

    def worked(self, what: str) -> None:
        """Note that something has worked; what was away to it is back."""
        self._has_worked = True
        self._away = {key: it for key, it in self._away.items() if it[0] != what}

    @property
    def is_waiting(self) -> bool:
        """Whether a server is away."""
        return bool(self._away)


def is_passing(error: ServerError, *, has_worked: bool) -> bool:
    """Whether it is of use to try again.

    Args:
        has_worked: whether the same settings are known to have worked.
    """
    if isinstance(error, RefusedByServerError):
        return has_worked and not error.is_final
    return True


def out_of_patience(error: ServerError, seconds: float) -> ServerError:
    """The same error, which says how long it was borne."""
    if not seconds:
        return error
    text = f"{error} It stayed so for {seconds:g} s (server_patience_seconds)."
    return type(error)(error.address, text)

"""How the page is reached, and what it offers. It needs nothing of the extra."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from urllib.parse import quote


@dataclass(frozen=True)
class Address:
    """Where the page listens."""

    host: str
    port: int

    @property
    def is_loopback(self) -> bool:
        """Whether only this host reaches it."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False


@dataclass(frozen=True)
class Face:
    """How this page is reached, and what it offers.

    Attributes:
        prefix: of its paths, such as ``/taskiq``; empty for none.
        dagster_url: of Dagster's UI, without a slash at its end; empty where it is not known.
        may_act: whether workers, queues and tasks can be ordered about here.
        may_log_out: whether there is a login that can be left.
    """

    prefix: str = ""
    dagster_url: str = ""
    may_act: bool = False
    may_log_out: bool = False

    def path(self, *parts: str, **query: str) -> str:
        """A path of this page; whatever is in its parts is quoted."""
        path = "/".join(quote(part, safe="") for part in parts)
        options = "&".join(f"{key}={quote(value, safe='')}" for key, value in query.items())
        return f"{self.prefix}/{path}" + (f"?{options}" if options else "")

    def run_in_dagster(self, run_id: str) -> str:
        """Where Dagster's UI shows a run; empty where that is not known."""
        return f"{self.dagster_url}/runs/{quote(run_id, safe='')}" if self.dagster_url else ""

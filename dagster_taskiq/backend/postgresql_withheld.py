"""What runs hold back, on PostgreSQL: a table beside that of the runs, whose rows change often."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

from dagster_taskiq.backend.withheld import WithheldBackend
from dagster_taskiq.messages.signing import Signer
from dagster_taskiq.messages.withheld_steps import Withheld, write_withheld


class PostgresqlWithheld(WithheldBackend):
    """See ``WithheldBackend``."""

    _signer: Signer

    @abstractmethod
    async def _call(
        self, function: str, *values: Any, is_urgent: bool = False
    ) -> list[tuple[Any, ...]]: ...

    async def tell_withheld(self, run_id: str, withheld: Withheld, *, token: str) -> bool:
        """See ``WithheldBackend``."""
        data = write_withheld(self._signer, run_id, withheld) if withheld != Withheld() else None
        ((is_kept,),) = await self._call("tell_withheld", run_id, token, data)
        return bool(is_kept)

"""The pauses of queues in memory."""

from __future__ import annotations

from dagster_taskiq.backend.memory_server import MemoryServer
from dagster_taskiq.backend.pauses import PauseBackend
from dagster_taskiq.messages.queue_pauses import QueuePause, readable_pauses, write_pause
from dagster_taskiq.messages.signing import Signer


class MemoryPauses(PauseBackend):
    """See ``PauseBackend``."""

    _server: MemoryServer
    _signer: Signer

    async def pause_queue(self, pause: QueuePause) -> None:
        """See ``PauseBackend``."""
        with self._server.reached() as session:
            session.pauses[pause.queue] = write_pause(self._signer, pause)

    async def resume_queue(self, queue: str) -> bool:
        """See ``PauseBackend``."""
        with self._server.reached() as session:
            return session.pauses.pop(queue, None) is not None

    async def paused_queues(self) -> dict[str, QueuePause]:
        """See ``PauseBackend``."""
        with self._server.reached() as session:
            return readable_pauses(self._signer, session.pauses)

"""The pauses of queues, which hold for all workers and outlive them."""

from __future__ import annotations

from abc import ABC, abstractmethod

from dagster_taskiq.messages.queue_pauses import QueuePause


class PauseBackend(ABC):
    """Keeps which queues are paused, until they are resumed or the server loses its data."""

    @abstractmethod
    async def pause_queue(self, pause: QueuePause) -> None:
        """Keep a pause, in place of an earlier one of its queue."""

    @abstractmethod
    async def resume_queue(self, queue: str) -> bool:
        """End the pause of a queue, as people name it; False where there was none."""

    @abstractmethod
    async def paused_queues(self) -> dict[str, QueuePause]:
        """The pauses, by queue; those that cannot be believed are left out."""

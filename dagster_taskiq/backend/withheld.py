"""What runs hold back, kept for people."""

from __future__ import annotations

from abc import ABC, abstractmethod

from dagster_taskiq.messages.withheld_steps import Withheld


class WithheldBackend(ABC):
    """Keeps which steps a run's loop holds back; ``RunReport.withheld`` has it."""

    @abstractmethod
    async def tell_withheld(self, run_id: str, withheld: Withheld, *, token: str) -> bool:
        """Keep what a loop holds back, in place of what it has told before.

        It is known only while that loop lives, and goes when the loop closes the run.

        Args:
            token: of the loop, as it has opened the run.

        Returns:
            whether it is kept: not where the server does not know the loop, or not any more.
        """
